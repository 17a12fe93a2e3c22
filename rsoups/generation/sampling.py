"""Inverse-transform sampling: one uniform number per token, which may be a row's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def fast_sampling(
    device: torch.device | str, watch: Callable[[Tensor, Tensor], None] | None = None
) -> AbstractContextManager[Any]:
    """Return a context for `generate()` in which a CPU draws tokens by inverting their distribution function.

    `torch.multinomial` draws an exponential number for every token of the vocabulary instead, one after the other: a fifth
    of the time of a whole PPO run with the embedded policy. Other devices draw in parallel and are left alone.

    Args:
        device: Device of the probabilities.
        watch: Function that gets each draw: probabilities (or weights), (B, V), and the drawn tokens, (B, 1).
    """
    if torch.device(device).type != "cpu" and watch is None:
        return nullcontext()
    return _Draws(draw if torch.device(device).type == "cpu" else None, watch)


class _Draws(TorchFunctionMode):
    """Replaces `torch.multinomial(probabilities, num_samples=1)` in this thread and context, and nothing else."""

    def __init__(
        self, own: Callable[[Tensor], Tensor] | None, watch: Callable[[Tensor, Tensor], None] | None = None
    ) -> None:
        super().__init__()
        self.own, self.watch = own, watch

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        is_draw = func is torch.multinomial and kwargs.keys() <= {"num_samples"}
        if not is_draw or (*args[1:], *kwargs.values()) != (1,):
            return func(*args, **kwargs)
        drawn = self.own(args[0]) if self.own is not None else func(*args, **kwargs)
        if self.watch is not None:
            self.watch(args[0], drawn)
        return drawn


def draw(probabilities: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draw one index for each row, (B, 1); an index of weight 0 is never drawn.

    Args:
        probabilities: Probabilities or weights (B, V).
        uniform: Random numbers (B, 1), float64 within [0, 1); from torch's generator if None.
    """
    cumulative = probabilities.double().cumsum(-1)
    whole = cumulative[:, -1:].contiguous()
    at = (torch.rand_like(whole) if uniform is None else uniform.to(whole)) * whole
    at = torch.minimum(at, torch.nextafter(whole, torch.zeros_like(whole)))  # the product may round up to the whole
    return torch.searchsorted(cumulative, at, right=True)  # the first index whose sum is above
