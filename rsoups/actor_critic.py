"""One forward for actor and critic: log-probabilities of a response's tokens, and values of the states before them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK = 4_096  # response tokens whose logits exist at one time


class ValueHead(nn.Linear):
    """The critic: V(s) = start + w·s + b, float32, (..., hidden) -> (..., 1); w and b start at 0.

    Attributes:
        start: What a score is before any training. A head that must first grow towards it, a clip of the value per rollout,
            passes through values that differ from token to token for no reason, and its advantages with them.
    """

    def __init__(self, hidden_size: int, device: torch.device | str | None = None):
        super().__init__(hidden_size, 1, device=device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.start = 0.0

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) + self.start


def add_actor_critic_forward(causal_lm: Any, temperature: float) -> None:
    """Let ``causal_lm(..., response_length=T)`` return ``(log-probabilities, values)``, each (B, T) float32.

    Both belong to the last T tokens of `input_ids`; masked tokens get 0. The LM head runs on real response tokens only,
    in chunks whose logits are recomputed in the backward pass, so the whole batch's logits never exist. Inside
    ``forward`` so that DDP, FSDP and autocast see one ordinary call. Any other call is untouched.

    Raises:
        ValueError: A model that transforms its logits after the head, which this forward does not know.
    """
    text_config = causal_lm.config.get_text_config()
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if getattr(text_config, key, None) not in (None, 1, 1.0):
            raise ValueError(f"PPOTrainer does not support {key} in the base's config ({type(causal_lm).__name__})")
    original = causal_lm.forward
    takes_positions = "position_ids" in inspect.signature(causal_lm.base_model.forward).parameters

    def forward(*args: Any, response_length: int | None = None, **kwargs: Any) -> Any:
        if response_length is None:
            return original(*args, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        # As generate() counts them: from each row's first real token, so that a left padding changes nothing.
        positions = {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)} if takes_positions else {}
        hidden = causal_lm.base_model(
            input_ids=ids, attention_mask=mask, use_cache=False, **positions
        ).last_hidden_state
        states = hidden[:, -response_length - 1 : -1]  # the state before each response token
        real = mask[:, -response_length:].bool()
        with torch.autocast(states.device.type, enabled=False):  # values are float32, whatever the policy computes in
            values = causal_lm.value_head(states.float()).squeeze(-1) * real
        head = causal_lm.get_output_embeddings()
        picked = _token_logps(head, states[real], ids[:, -response_length:][real], temperature)
        return torch.zeros_like(values).masked_scatter(real, picked), values

    # generate() validates its arguments against this signature
    forward.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
    causal_lm.forward = forward


def _token_logps(head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log p(token | state) of each of n tokens, float32 (n,), from states (n, hidden)."""

    def chunk(part: Tensor, targets: Tensor) -> Tensor:
        logits = head(part).float() / temperature
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    pieces = list(zip(states.split(_CHUNK), tokens.split(_CHUNK), strict=True))
    if len(pieces) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces])
    return torch.cat([chunk(*piece) for piece in pieces])
