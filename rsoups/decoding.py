"""Responses of batches whose rows may be of different models, each row with its own random numbers.

transformers' `generate` draws for a batch as a whole, and computes rows that have ended until the last one does. Here a
response depends on its own row alone, and rows that have ended leave the batch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rsoups.sampling import draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | list[dict[str, Any]]  # a text, or messages for the tokenizer's chat template
_DROPPED = 1 / 8  # rows leave a batch when so large a part of it has ended: the cache is copied then
_LOGITS = 2**25  # logits held at once where finished responses are read again


@dataclass(frozen=True)
class Said:
    """A response.

    Attributes:
        ids: Its tokens, the one that ended it included.
        logp: Σ log p of them, in nats, under the model and at the temperature that they were chosen by (1 for greedy).
    """

    ids: list[int]
    logp: float


class Decoder:
    """Decodes with a model as it stands: whatever puts λ on it does so around the call.

    Samples purely (temperature, no top-k or top-p), or greedily.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float, max_new_tokens: int
    ):
        self.model, self.temperature, self.max_new_tokens = model, temperature, max_new_tokens
        self._tokenizer = deepcopy(tokenizer)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = self._tokenizer.eos_token_id if ends is None else ends
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=model.device).view(-1)
        pad = next((i for i in (tokenizer.pad_token_id, *self._ends.tolist()) if i is not None), 0)
        self._pad: int = pad
        known = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in known}

    def text(self, said: Said) -> str:
        """A response's text, without special tokens."""
        return str(self._tokenizer.decode(said.ids, skip_special_tokens=True))

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor | None = None,
        members: int = 1,
        keep: Callable[[Tensor], None] = lambda rows: None,
    ) -> list[Said]:
        """Respond.

        Args:
            prompts: Tokens of each of B prompts.
            uniforms: (B, max_new_tokens), each row's random numbers within [0, 1); None decodes greedily.
            members: M > 1 answers as a prediction ensemble: each prompt is M rows of the model's batch, one after the
                other, whose next-token distributions are averaged.
            keep: Told which rows of the model's batch remain, as they end.
        """
        ids, mask = (t.repeat_interleave(members, dim=0) for t in self._padded(prompts))
        chosen = torch.full((len(prompts), self.max_new_tokens), -1, device=ids.device)
        logps = torch.zeros(len(prompts), dtype=torch.float64, device=ids.device)
        cache, uniforms = None, None if uniforms is None else uniforms.to(ids.device)
        at = torch.arange(len(prompts), device=ids.device)  # whose rows the batch still holds,
        going = torch.ones_like(at, dtype=torch.bool)  # and which of them have not ended
        for step in range(self.max_new_tokens):
            out = self._forward(ids, mask, 1, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            own = None if uniforms is None else uniforms[at, step, None]
            tokens, logp = self._choose(out.logits[:, -1].float(), own, members)
            chosen[at[going], step] = tokens[going]
            logps[at[going]] += logp[going]
            going &= ~torch.isin(tokens, self._ends)
            left = int(going.sum())
            if not left:
                break
            ids = tokens.repeat_interleave(members)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            if left <= (1 - _DROPPED) * len(at) and hasattr(cache, "batch_select_indices"):
                rows = going.repeat_interleave(members).nonzero()[:, 0]
                cache.batch_select_indices(rows)
                keep(rows)
                at, ids, mask, going = at[going], ids[rows], mask[rows], going[going]
        return [
            Said([token for token in row if token >= 0], logp)
            for row, logp in zip(chosen.tolist(), logps.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def logps(self, prompts: Sequence[Sequence[int]], said: Sequence[Said]) -> tuple[list[float], list[float]]:
        """Σ log p of finished responses under the model as it stands, in nats: at temperature 1, and as they were chosen."""
        longest = max(len(one.ids) for one in said)
        found: tuple[list[float], list[float]] = [], []
        rows = max(1, _LOGITS // ((longest + 1) * int(self.model.config.get_text_config().vocab_size)))
        for start in range(0, len(said), rows):
            part = said[start : start + rows]
            ids, mask = self._padded(prompts[start : start + rows])
            padded = torch.full((len(part), longest), self._pad, device=ids.device)
            real = torch.zeros_like(padded)
            for row, one in enumerate(part):
                padded[row, : len(one.ids)] = torch.tensor(one.ids)
                real[row, : len(one.ids)] = 1
            whole, mask = torch.cat([ids, padded], dim=1), torch.cat([mask, real], dim=1)
            logits = self._forward(whole, mask, longest + 1).logits[:, -longest - 1 : -1].float()
            for sums, temperature in zip(found, (1.0, self.temperature or 1.0), strict=True):
                scaled = logits if temperature == 1 else logits / temperature
                each = scaled.gather(-1, padded[..., None])[..., 0] - scaled.logsumexp(-1)
                sums += (each.double() * real).sum(-1).tolist()
        return found

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, longest), padded on the left."""
        longest = max(map(len, prompts))
        ids = [[self._pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _forward(self, ids: Tensor, mask: Tensor, logits: int, **settings: Any) -> Any:
        if "position_ids" in self._takes:
            settings["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            settings["logits_to_keep"] = logits
        return self.model(input_ids=ids, attention_mask=mask, **settings)

    def _choose(self, logits: Tensor, uniform: Tensor | None, members: int) -> tuple[Tensor, Tensor]:
        """Tokens and their log p, (B,) each, of logits (B·M, V)."""
        logp = (logits / (self.temperature or 1.0)).log_softmax(-1)
        if members > 1:
            logp = logp.unflatten(0, (-1, members)).double().logsumexp(dim=1) - np.log(members)
        tokens = logp.argmax(-1, keepdim=True) if uniform is None else draw(logp.exp(), uniform)
        return tokens[:, 0], logp.gather(-1, tokens)[:, 0].double()


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """A prompt's tokens; of messages, by the tokenizer's chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    found: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return list(found["input_ids"])


def seed_of(seed: int, prompt: Prompt, sample: int) -> int:
    """The seed of one response, the same at every λ, so that models are compared under the same random numbers."""
    text = json.dumps([seed, prompt, sample], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def uniforms(seed: int, count: int) -> list[float]:
    """A response's random numbers within [0, 1), one for each token."""
    return np.random.default_rng(seed).random(count).tolist()
