"""What is checked before the first step of PPO: that what is sampled, scored and trained is one and the same policy.

Sampling goes through transformers' `generate`, the update through `PPOTrainer`'s own forward. Where the two differ, by a
dropout, a setting of the base's generation_config, or a head that changes its logits, PPO optimizes something else in silence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsoups.common.errors import TrainingError

# Attributes of modules and configs that are a probability of noise in training mode.
_NOISE = ("drop", "jitter")
# Largest mean difference of log-probabilities, in nats per token, that rounding explains.
_ROUNDING, _ROUNDING_OF_HALF = 1e-3, 0.1


def silence_noise(model: nn.Module) -> None:
    """Set every dropout, layer dropout and router jitter of a model to 0, of whatever kind it is."""
    places: list[Any] = list(model.modules())
    configs = {id(config): config for module in places if (config := getattr(module, "config", None)) is not None}
    for config in list(configs.values()):
        configs |= {id(part): part for part in vars(config).values() if hasattr(part, "to_dict")}
    for place in [*places, *configs.values()]:
        if isinstance(place, nn.modules.dropout._DropoutNd):
            place.p = 0.0
        for name, value in list(vars(place).items()):
            if isinstance(value, float) and value > 0 and any(word in name.lower() for word in _NOISE):
                setattr(place, name, 0.0)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """A context after which all random number generators go on as if it had not been."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def check_no_noise(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Compare two forwards in training mode.

    Args:
        model: Whose modules are looked through for the culprit.
        forward: One forward.

    Raises:
        TrainingError: They differ; the module that is the first to differ is named.
    """
    first, second = forward(), forward()
    if float((first - second).abs().max()) <= _ROUNDING:
        return
    culprit = _first_to_differ(model, forward)
    raise TrainingError(
        f"two forwards of one batch in training mode differ by up to {float((first - second).abs().max()):.3g} nats per token; "
        f"the first module to differ is {culprit}: switch its dropout or noise off in the base's config (rollout and update "
        "must see one policy), or pass --disable_dropout false to train with it"
    )


def _first_to_differ(model: nn.Module, forward: Callable[[], Tensor]) -> str:
    """Name and class of the first module whose output differs between two forwards although its input does not."""
    runs: list[list[tuple[str, list[Tensor], list[Tensor]]]] = []

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value.detach().float().clone()]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        return [tensor for part in parts for tensor in tensors(part)]

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: Any, kwargs: Any, output: Any) -> None:
            runs[-1].append((f"{name} ({type(module).__name__})", tensors([*arguments, kwargs]), tensors(output)))

        return record

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        for _ in range(2):
            runs.append([])
            forward()
    finally:
        for handle in handles:
            handle.remove()

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    for (name, inputs, outputs), (_, other_inputs, other_outputs) in zip(*runs, strict=False):
        if same(inputs, other_inputs) and not same(outputs, other_outputs):
            return name
    return "not to be told from its inputs"


class Sampler:
    """Watches `generate` draw tokens: log p of each, under the distribution that it was drawn from.

    Attributes:
        logps: One (B,) for each drawn token.
        tokens: The tokens, one (B,) for each.
    """

    def __init__(self) -> None:
        self.logps: list[Tensor] = []
        self.tokens: list[Tensor] = []

    def __call__(self, probabilities: Tensor, drawn: Tensor) -> None:
        weights = probabilities.double()
        self.logps.append((weights.gather(-1, drawn) / weights.sum(-1, keepdim=True)).log()[:, 0].cpu())
        self.tokens.append(drawn[:, 0].cpu())

    def of(self, responses: list[list[int]]) -> list[Tensor]:
        """Log p of responses' tokens, which begin with what was drawn."""
        if not self.tokens:
            return []
        tokens, logps = torch.stack(self.tokens, 1), torch.stack(self.logps, 1)
        found = []
        for row, response in enumerate(responses):
            length = min(len(response), tokens.shape[1])
            if tokens[row, :length].tolist() != response[:length]:
                return []
            found.append(logps[row, :length])
        return found


def check_sampler(sampled: list[Tensor], scored: list[Tensor], half: bool) -> float:
    """Compare log p of the sampled tokens by the sampler and by the trainer's forward.

    Args:
        sampled, scored: For each response, log p of its tokens.
        half: Whether the model computes in 16 or fewer bits.

    Returns:
        The mean difference, in nats per token.

    Raises:
        TrainingError: They differ by more than rounding does.
    """
    apart = torch.cat([a - b[: len(a)].cpu() for a, b in zip(sampled, scored, strict=True)]).abs()
    mean = float(apart.nan_to_num(posinf=1e3).mean())
    if mean > (_ROUNDING_OF_HALF if half else _ROUNDING):
        raise TrainingError(
            f"the log-probabilities of sampled tokens differ by {mean:.3g} nats per token between generation and PPO's own "
            "forward: a setting of generation, or the model's own code, changes what is sampled. PPO would optimize another "
            "policy than the one that writes; please report the base's class and config"
        )
    return mean


def check_references(kl: float, what: str) -> None:
    """Refuse a policy that is not its reference before any step.

    Raises:
        TrainingError: KL is not 0.
    """
    if abs(kl) > _ROUNDING:
        raise TrainingError(
            f"before the first step the policy is {kl:.3g} nats per token from its reference ({what}): a fresh adapter must "
            "change nothing. Look for modules that are trained beside the LoRA, or for dropout"
        )
