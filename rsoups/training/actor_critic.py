"""One forward for actor and critic: log-probabilities of a response's tokens, and values of the states before them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsoups.training.reading import Reader

_PROBE = 8  # tokens in each of the two rows that show whether the head alone makes the logits
# Config keys of models that change their logits after the head. No probe is needed if one is set.
_CHANGES_LOGITS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier")
_CHUNK = 4_096  # response tokens whose logits exist at one time


class ValueHead(nn.Linear):
    """The critic: V(s) = start + w·s + b, float32, (..., hidden) -> (..., 1); w and b start at 0.

    Attributes:
        start: Mean score before any training. A head without it approaches this score by at most one value clip per rollout.
            Until then its values differ from token to token for no reason, and so do the advantages.
    """

    def __init__(self, hidden_size: int, device: torch.device | str | None = None):
        super().__init__(hidden_size, 1, device=device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.start = 0.0

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states) + self.start


def add_actor_critic_forward(causal_lm: Any, temperature: float, sharded: bool = False) -> None:
    """Let ``causal_lm(..., response_length=T)`` return ``(log-probabilities, values)``, each (B, T) float32.

    Both belong to the last T tokens of `input_ids`; masked tokens get 0. The LM head runs on real response tokens only,
    in chunks whose logits are recomputed in the backward pass, so the whole batch's logits never exist. A model that changes
    its logits after the head (soft caps, scales, multipliers) computes them itself; a probe of a few tokens detects that.
    The code is in ``forward`` so that DDP, FSDP and autocast see one ordinary call. Any other call is untouched.

    Args:
        causal_lm: Model with a `value_head`.
        temperature: Temperature of the log-probabilities.
        sharded: Whether the weights are gathered for each pass through the layers, as FSDP and ZeRO-3 do.
    """
    original = causal_lm.forward
    reader = None if not _head_is_all(causal_lm, original) else Reader(causal_lm, sharded)

    def forward(*args: Any, response_length: int | None = None, **kwargs: Any) -> Any:
        if response_length is None:
            return original(*args, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        tokens = ids[:, -response_length:].flatten()
        if reader is None:
            states, logits, places = _own_logits(causal_lm, original, ids, mask, response_length)
            logps = _token_logps(lambda logits: logits, logits, tokens[places], temperature)
        else:
            states, places = reader(ids, mask, response_length)
            logps = _token_logps(causal_lm.get_output_embeddings(), states, tokens[places], temperature)
        with torch.autocast(states.device.type, enabled=False):  # values are float32, whatever the policy computes in
            values = causal_lm.value_head(states.float()).squeeze(-1)
        pair = (torch.zeros_like(tokens, dtype=torch.float32).scatter(0, places, each) for each in (logps, values))
        return tuple(each.view(-1, response_length) for each in pair)

    # generate() validates its arguments against this signature
    forward.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
    causal_lm.forward = forward


def _own_logits(
    causal_lm: Any, original: Callable[..., Any], ids: Tensor, mask: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """States (n, hidden) and logits (n, V) before the n real response tokens by the model's own forward; their places."""
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(causal_lm.base_model.forward).parameters:
        # as generate() counts them: from each row's first real token, whatever the left padding
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in inspect.signature(original).parameters:
        inputs["logits_to_keep"] = length + 1
    out = original(**inputs, output_hidden_states=True)
    real = mask[:, -length:].bool()
    states, logits = (tensor[:, -length - 1 : -1][real] for tensor in (out.hidden_states[-1], out.logits))
    return states, logits, real.flatten().nonzero()[:, 0]


@torch.no_grad()
def _head_is_all(causal_lm: Any, original: Callable[..., Any]) -> bool:
    """Whether a model's logits are its head on its last states and nothing more, checked on a few tokens."""
    text_config = causal_lm.config.get_text_config()
    if any(getattr(text_config, key, None) not in (None, 1, 1.0) for key in _CHANGES_LOGITS):
        return False
    if any(parameter.is_meta or not parameter.numel() for parameter in causal_lm.parameters()):
        return True  # sharded: the parameters are not here. The first step's check of the sampler finds a difference
    was_training = causal_lm.training
    causal_lm.train()  # in evaluation mode 4-bit layers on a CPU pack their weights, which cannot be undone
    try:
        device = causal_lm.get_input_embeddings().weight.device
        ids = torch.arange(2, 2 + 2 * _PROBE, device=device).view(2, _PROBE) % text_config.vocab_size
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        expected = original(**inputs).logits.float()
        by_head = causal_lm.get_output_embeddings()(causal_lm.base_model(**inputs).last_hidden_state).float()
    finally:
        causal_lm.train(was_training)
    rounding = 1e-5 if causal_lm.dtype == torch.float32 else 1e-2
    largest = max(1e-6, float(expected.abs().max()))
    return by_head.shape == expected.shape and float((by_head - expected).abs().max()) <= rounding * largest


def _token_logps(head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log p(token | state) of each of n tokens, float32 (n,), from states (n, hidden)."""

    def chunk(part: Tensor, targets: Tensor) -> Tensor:
        logits = head(part).float() / temperature
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    pieces = list(zip(states.split(_CHUNK), tokens.split(_CHUNK), strict=True))
    if len(pieces) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces])
    return torch.cat([chunk(*piece) for piece in pieces])


def hide_value_head(generation: Any) -> None:
    """Leave the critic out of the weights that TRL's `VLLMGeneration` hands to vLLM, which knows no such parameter."""
    all_params = generation._iter_named_params
    generation._iter_named_params = lambda: (pair for pair in all_params() if not pair[0].startswith("value_head."))
