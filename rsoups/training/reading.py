"""Hidden states of responses, computed with little padding, and with one pass over what all prompts begin with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rsoups.generation.decoding import is_plain

# Tokens of one pass, padding included, above which rows of other lengths get a pass of their own. Short passes cost a CPU
# nothing, and their activations stay in its cache; a GPU wants long ones.
_PASS = {"cpu": 512}
_PASS_ELSEWHERE = 16_384
_WORTH = 1 / 8  # part of a batch's tokens that a shared beginning must save, since it is a pass of its own
_PROBE = 4  # tokens of the beginning, and of each of two rows, that show whether a model can go on from a beginning

_Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer


class Reader:
    """Reads prompts and responses with the backbone of a causal language model.

    Instructions and system prompts make rows begin alike: these tokens are read once, and every row goes on from their keys
    and values; gradients flow through them. What is left of the rows is packed to the left, sorted by length and read in
    passes. All of it changes results by rounding only.

    Args:
        causal_lm: The model. Its `base_model` is called, so that DDP's forward around it is one call.
        sharded: Whether its weights are gathered for each pass (FSDP, ZeRO-3). Processes must then make the same passes,
            whatever their rows are: one pass reads all.
    """

    def __init__(self, causal_lm: Any, sharded: bool = False):
        self._causal_lm, self._sharded = causal_lm, sharded
        self._takes_positions = "position_ids" in inspect.signature(causal_lm.base_model.forward).parameters
        self._goes_on: bool | None = None  # whether the model goes on from a beginning; None before the first try

    def __call__(self, ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return the states before the real tokens of responses.

        Args:
            ids: Prompts, padded on the left, and responses of `length` tokens, padded on the right: (B, P + length).
            mask: 1 = real token, (B, P + length).
            length: Columns of the responses.

        Returns:
            States (n, hidden) of the n real tokens of responses, and the place of each token in the flattened (B, length).
        """
        real = mask.bool()
        counts = real.sum(dim=1)
        filled = torch.arange(int(counts.max()), device=ids.device) < counts[:, None]
        places = torch.full_like(ids, -1)
        places[:, -length:] = torch.arange(len(ids) * length, device=ids.device).view(-1, length)

        tokens, places = (torch.full_like(filled, fill, dtype=ids.dtype).masked_scatter(filled, values[real])
                          for values, fill in ((ids, 0), (places, -1)))  # fmt: skip
        shared, beginning = self._beginning(tokens, counts - real[:, -length:].sum(dim=1))

        states, at = [], []
        for rows in self._passes(counts - shared):
            end = max(int(counts[rows].max()) - 1, shared + 1)  # a response's last token predicts nothing
            hidden = self._read(tokens[rows, shared:end], shared, beginning)
            predicted = places[rows, shared + 1 : end + 1]
            hidden = hidden[:, : predicted.shape[1]]
            states.append(hidden[predicted >= 0])
            at.append(predicted[predicted >= 0])
        return torch.cat(states), torch.cat(at)

    def _beginning(self, tokens: Tensor, prompts: Tensor) -> tuple[int, _Layers | None]:
        """Return the number of tokens that all prompts begin with, and their keys and values; 0 and None if few.

        Args:
            tokens: Rows without padding before them, (B, L).
            prompts: Length of each prompt, (B,). The last token of a prompt is not shared: its state is wanted.
        """
        checkpointing = self._causal_lm.training and getattr(self._causal_lm, "is_activation_checkpointing", False)
        if self._sharded or checkpointing:  # recomputed layers take no keys and values
            return 0, None
        alike = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()
        shared = min(int(alike), int(prompts.min()) - 1)
        if shared * (len(tokens) - 1) < _WORTH * tokens.numel():
            return 0, None

        if self._goes_on is None:
            self._goes_on = self._probe(tokens.device)
        return (shared, self._keys_and_values(tokens[:1, :shared])) if self._goes_on else (0, None)

    def _passes(self, lengths: Tensor) -> list[Tensor]:
        """Return the rows of each pass, (n,) each, given the tokens of each row, (B,)."""
        if self._sharded:
            return [torch.arange(len(lengths), device=lengths.device)]
        limit = _PASS.get(lengths.device.type, _PASS_ELSEWHERE)
        passes: list[list[int]] = []
        longest = 0
        for row in lengths.argsort(descending=True, stable=True).tolist():
            if not passes or (len(passes[-1]) + 1) * longest > limit:
                passes.append([])
                longest = int(lengths[row])
            passes[-1].append(row)
        return [torch.tensor(rows, device=lengths.device) for rows in passes]

    def _read(self, tokens: Tensor, shared: int = 0, beginning: _Layers | None = None) -> Tensor:
        """Return the last hidden states (n, L, hidden) of rows that go on from the shared tokens.

        There is no attention mask: no token stands behind padding.
        """
        settings: dict[str, Any] = {"use_cache": False}
        if beginning is not None:
            cache = DynamicCache()
            for layer, pair in enumerate(beginning):
                keys, values = (tensor.expand(len(tokens), -1, -1, -1) for tensor in pair)
                cache.update(keys, values, layer)
            settings = {"use_cache": True, "past_key_values": cache}
        if self._takes_positions:
            places = torch.arange(shared, shared + tokens.shape[1], device=tokens.device)
            settings["position_ids"] = places.expand(len(tokens), -1)
        return self._causal_lm.base_model(input_ids=tokens, **settings).last_hidden_state

    def _keys_and_values(self, tokens: Tensor) -> _Layers | None:
        """Return what each layer keeps of one row of tokens (1, L); None for a model whose cache is of another kind."""
        cache: Any = getattr(self._causal_lm.base_model(input_ids=tokens, use_cache=True), "past_key_values", None)
        return [(layer.keys, layer.values) for layer in cache.layers] if is_plain(cache) else None

    @torch.no_grad()
    def _probe(self, device: torch.device) -> bool:
        """Whether rows that go on from a beginning have the states of whole rows, tried on a few tokens."""
        vocabulary = self._causal_lm.config.get_text_config().vocab_size
        tokens = torch.arange(2, 2 + 3 * _PROBE, device=device) % vocabulary
        first, *others = tokens.view(3, _PROBE)
        rows = torch.stack([torch.cat([first, other]) for other in others])

        with torch.autocast(device.type, enabled=False):
            beginning = self._keys_and_values(rows[:1, :_PROBE])
            if beginning is None:
                return False
            expected = self._read(rows)[:, _PROBE:].float()
            found = self._read(rows[:, _PROBE:], _PROBE, beginning).float()
        rounding = 1e-4 if self._causal_lm.dtype == torch.float32 else 5e-2
        return float((found - expected).abs().max()) <= rounding * max(1e-6, float(expected.abs().max()))
