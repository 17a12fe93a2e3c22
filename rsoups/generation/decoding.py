"""Decode batches whose rows may belong to different models, each row with its own random numbers.

transformers' `generate` draws for a batch as a whole, and computes finished rows until the last row ends. Here a response
depends on its own row alone, and finished rows leave the batch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from rsoups.common.errors import DatasetError
from rsoups.data.prompts import messages_of, shown
from rsoups.generation.sampling import draw

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Prompt = str | list[dict[str, Any]]  # a text, or messages for the tokenizer's chat template
_DROPPED = 1 / 8  # part of a batch that must have ended before its rows are dropped, since that copies the cache
_READ_TOKENS = 1_024  # tokens of a batch that rescores finished responses: few, for little padding and few logits
_REMEMBERED = 2**30  # bytes of the prompts' keys and values that are kept
_TRIMMED: set[int] = set()  # ids of tokenizers that a warning has named

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Response:
    """A response.

    Attributes:
        ids: Tokens, the end token included.
        logp: Σ log p of the tokens in nats, under the model and at the temperature that chose them (1 for greedy).
    """

    ids: list[int]
    logp: float


class Decoder:
    """Decode with a model in its present state; the caller sets λ.

    Samples purely (temperature, no top-k or top-p), or greedily. A response ends with one of `ends` (tokens), those of
    `ends_of` if None. docs/EXPERIMENTS.md compares it with transformers' `generate`
    and a logits processor, which take 1.4 to 2 times as long.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float,
        max_new_tokens: int,
        ends: Sequence[int] | None = None,
    ):
        self.model, self.temperature, self.max_new_tokens = model, temperature, max_new_tokens
        self._tokenizer = tokenizer
        self._ends = torch.tensor(
            ends_of(model, tokenizer) if ends is None else ends, dtype=torch.long, device=model.device
        )
        self._pad: int = next((i for i in (tokenizer.pad_token_id, *self._ends.tolist()) if i is not None), 0)
        self._prompts: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # keys and values of each layer
        self._prompt_bytes = 0
        parameters = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in parameters}

    def text(self, response: Response) -> str:
        """Return a response's text, without special tokens."""
        return str(self._tokenizer.decode(response.ids, skip_special_tokens=True))

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor | None = None,
        members: int = 1,
        keep: Callable[[Tensor], None] | None = None,
        models: Sequence[int] | None = None,
    ) -> list[Response]:
        """Return a response to each prompt; arguments as for `steps`."""
        *_, (chosen, logps) = self.steps(prompts, uniforms, members, keep, models)
        return [
            Response([token for token in row if token >= 0], logp)
            for row, logp in zip(chosen.tolist(), logps.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def steps(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor | None = None,
        members: int = 1,
        keep: Callable[[Tensor], None] | None = None,
        models: Sequence[int] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Respond token by token.

        Args:
            prompts: Tokens of each of B prompts.
            uniforms: (B, max_new_tokens), each row's random numbers within [0, 1); None decodes greedily.
            members: Number M of models of a prediction ensemble: each prompt is M consecutive rows of the model's batch, whose
                next-token distributions are averaged.
            keep: Function that gets the places of the rows that stay whenever others leave the batch, so that it can set each
                row's λ; needed where rows belong to different models.
            models: Number of the model of each prompt, where they differ.

        Yields:
            Tokens (B, max_new_tokens) so far, -1 where there is none, and their Σ log p (B,): the same two tensors each time.
        """
        cache, shared = self._beginning(prompts, members, keep, models)
        ids, mask = self._padded([prompt[shared:] for prompt in prompts])
        mask = torch.cat([torch.ones_like(ids[:, :1]).expand(-1, shared), mask], dim=1)
        ids, mask = (t.repeat_interleave(members, dim=0) for t in (ids, mask))
        chosen = torch.full((len(prompts), self.max_new_tokens), -1, device=ids.device)
        logps = torch.zeros(len(prompts), dtype=torch.float64, device=ids.device)
        uniforms = None if uniforms is None else uniforms.to(ids.device)
        at = torch.arange(len(prompts), device=ids.device)  # prompts whose rows are still in the batch
        going = torch.ones_like(at, dtype=torch.bool)  # those of them that have not ended

        for step in range(self.max_new_tokens):
            out = self._forward(ids, mask, 1, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            own = None if uniforms is None else uniforms[at, step, None]

            tokens, logp = self._choose(out.logits[:, -1].float(), own, members)
            chosen[at[going], step] = tokens[going]
            logps[at[going]] += logp[going]
            yield chosen, logps
            going &= ~torch.isin(tokens, self._ends)
            left = int(going.sum())
            if not left:
                break

            ids = tokens.repeat_interleave(members)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            if left <= (1 - _DROPPED) * len(at) and hasattr(cache, "batch_select_indices"):
                rows = going.repeat_interleave(members).nonzero()[:, 0]
                cache.batch_select_indices(rows)
                if keep is not None:
                    keep(rows)
                at, ids, mask, going = at[going], ids[rows], mask[rows], going[going]

    def _beginning(
        self,
        prompts: Sequence[Sequence[int]],
        members: int,
        keep: Callable[[Tensor], None] | None,
        models: Sequence[int] | None,
    ) -> tuple[DynamicCache | None, int]:
        """Read the tokens that all prompts begin with (an instruction, say) once for each model.

        Returns:
            Keys and values of these tokens in each row, and the number of tokens. None and 0 if the prompts share no tokens, if
            each row has a model of its own, or if the cache cannot be padded in the middle of a row (a sliding window, a
            recurrent state).
        """
        of_rows = [model * members + i for model in models or [0] * len(prompts) for i in range(members)]
        first = {model: row for row, model in reversed([*enumerate(of_rows)])}
        shared = _shared(prompts)
        if len(first) == len(of_rows) or not shared:
            return None, 0

        # The first row of each model reads the shared tokens, then every row gets its model's keys and values. `keep` sets λ
        # of the rows that read, and after that of all rows.
        places = {model: place for place, model in enumerate(first)}
        to_rows = torch.tensor([places[model] for model in of_rows], device=self.model.device)
        ids = torch.tensor([prompts[0][:shared]], device=self.model.device).expand(len(first), -1)
        if keep is not None:
            keep(torch.tensor(list(first.values()), device=ids.device))
        cache = self._forward(ids, torch.ones_like(ids), 1, use_cache=True).past_key_values
        if keep is not None:
            keep(to_rows)
        if not is_plain(cache):
            return None, 0
        cache.batch_select_indices(to_rows)
        return cache, shared

    @torch.inference_mode()
    def logps(self, prompts: Sequence[Sequence[int]], responses: Sequence[Response]) -> list[tuple[float, float]]:
        """Return Σ log p of finished responses under the model, in nats: at temperature 1, and at the decoder's.

        The keys and values of prompts are kept between calls, so the model must be the same in all of them.
        """
        order = sorted(range(len(responses)), key=lambda i: len(responses[i].ids), reverse=True)
        sums_of: dict[int, tuple[float, float]] = {}
        while order:
            size = max(1, _READ_TOKENS // len(responses[order[0]].ids))
            part, order = order[:size], order[size:]
            tokens = [responses[i].ids for i in part]
            logits = self._logits_of([prompts[i] for i in part], tokens)
            flat, lengths = torch.tensor(sum(tokens, []), device=logits.device), [len(ids) for ids in tokens]

            tempered = None if self.temperature in (0, 1) else _logp(logits.clone(), flat, self.temperature)
            plain = _logp(logits, flat, 1.0)  # destroys the logits
            by_temperature = (plain, plain if tempered is None else tempered)
            sums = ([float(row.sum()) for row in logp.split(lengths)] for logp in by_temperature)
            sums_of |= dict(zip(part, zip(*sums, strict=True), strict=True))
        return [sums_of[i] for i in range(len(responses))]

    def _logits_of(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits (n, V), float32, that predict each of the n tokens of responses."""
        cache, mask = self._prefixes(prompts)
        rows = [
            [*prompt[-1:], *ids[:-1]] if cache else [*prompt, *ids[:-1]]
            for prompt, ids in zip(prompts, responses, strict=True)
        ]

        longest = max(map(len, rows))
        ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows], device=mask.device)
        places = torch.arange(longest, device=ids.device)
        ends = torch.tensor([len(row) for row in rows], device=ids.device)[:, None]
        starts = ends - torch.tensor([len(row) for row in responses], device=ids.device)[:, None]
        at = (places >= starts) & (places < ends)
        mask = torch.cat([mask, (places < ends).long()], dim=1)

        head = self.model.get_output_embeddings()
        if head is None:
            return self._forward(ids, mask, 0, past_key_values=cache).logits[at].float()
        # Only the hidden states of responses reach the head: a small model spends most of its time on logits.
        hook = head.register_forward_pre_hook(lambda module, args: (args[0][at], *args[1:]))
        try:
            logits: Tensor = self._forward(ids, mask, 0, past_key_values=cache).logits
        finally:
            hook.remove()
        return logits.float()

    def _prefixes(self, prompts: Sequence[Sequence[int]]) -> tuple[DynamicCache | None, Tensor]:
        """Return keys and values of all but the prompts' last tokens, read once for all responses, and their mask.

        None and an empty mask where the cache cannot be padded, or a prompt has only one token.
        """
        short = [tuple(prompt[:-1]) for prompt in prompts]
        nothing = torch.zeros((len(prompts), 0), dtype=torch.long, device=self.model.device)
        if not all(short):
            return None, nothing

        known = {prompt: self._prompts[prompt] for prompt in short if prompt in self._prompts}
        missing = list(dict.fromkeys(prompt for prompt in short if prompt not in known))
        if missing:
            ids, mask = self._padded(missing)
            cache = self._forward(ids, mask, 1, use_cache=True).past_key_values
            if not is_plain(cache):
                return None, nothing
            for row, prompt in enumerate(missing):
                size = len(prompt)
                known[prompt] = [
                    (layer.keys[row, :, -size:].clone(), layer.values[row, :, -size:].clone()) for layer in cache.layers
                ]
                count = sum(keys.nbytes + values.nbytes for keys, values in known[prompt])
                if self._prompt_bytes + count <= _REMEMBERED:
                    self._prompts[prompt] = known[prompt]
                    self._prompt_bytes += count

        longest = max(map(len, short))
        cache = DynamicCache()
        for layer in range(len(known[short[0]])):
            pairs = zip(*(known[prompt][layer] for prompt in short), strict=True)
            keys, values = (torch.stack([pad(t, (0, 0, longest - t.shape[1], 0)) for t in each]) for each in pairs)
            cache.update(keys, values, layer)
        rows = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in short]
        return cache, torch.tensor(rows, device=nothing.device)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, (B, longest), padded on the left."""
        longest = max(map(len, prompts))
        ids = [[self._pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _forward(self, ids: Tensor, mask: Tensor, logits: int, **settings: Any) -> Any:
        if "position_ids" in self._takes:
            settings["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            # Places, not a number: a slice is not contiguous, and torch's product with it copies the head for each row.
            settings["logits_to_keep"] = (
                torch.arange(ids.shape[1] - logits, ids.shape[1], device=ids.device) if logits else 0
            )
        return self.model(input_ids=ids, attention_mask=mask, **settings)

    def _choose(self, logits: Tensor, uniform: Tensor | None, members: int) -> tuple[Tensor, Tensor]:
        """Return the next tokens and their log p, (B,) each, for logits (B·M, V)."""
        temperature = self.temperature or 1.0
        if members == 1 and uniform is None:
            tokens = logits.argmax(-1)
            return tokens, _logp(logits, tokens, temperature)

        weights = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature).exp_()
        if members > 1:
            weights = (weights / weights.sum(-1, keepdim=True)).unflatten(0, (-1, members)).mean(dim=1)
        tokens = weights.argmax(-1, keepdim=True) if uniform is None else draw(weights, uniform)
        logp = weights.gather(-1, tokens).double().log() - weights.sum(-1, keepdim=True).double().log()
        return tokens[:, 0], logp[:, 0]


def is_plain(cache: Any) -> bool:
    """Whether a cache holds keys and values of every token: no sliding window, no recurrent state."""
    return isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of tokens that all prompts begin with; the last token of a prompt does not count."""
    lowest, highest = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if lowest[i] != highest[i]), most)


def _logp(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return log p of tokens (n,), float64, from logits (n, V), which it overwrites. (Faster on a CPU than log_softmax.)"""
    logits -= logits.amax(-1, keepdim=True)
    if temperature != 1:
        logits /= temperature
    of_tokens = logits.gather(-1, tokens[:, None])[:, 0].double()
    return of_tokens - logits.exp_().sum(-1).double().log()


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Mapping[str, Any] | None = None) -> list[int]:
    """Return a prompt's tokens, as all of rsoups reads prompts; messages go through the tokenizer's chat template.

    Args:
        tokenizer: Tokenizer of the policy.
        prompt: Text or messages.
        template: Variables of the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        DatasetError: Messages that `messages_of` refuses, or a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return trimmed(tokenizer, prompt, list(tokenizer(prompt, verbose=False)["input_ids"]))

    messages = messages_of(prompt)
    if not tokenizer.chat_template:
        raise DatasetError(
            f"the prompt {shown(messages)} is a conversation, and the tokenizer of {tokenizer.name_or_path!r} has no chat "
            "template: take a model that has one, or write the prompts as texts"
        )
    variables = {"add_generation_prompt": True, "return_dict": True, **(template or {})}
    encoded: Any = tokenizer.apply_chat_template(messages, **variables)
    return trimmed(tokenizer, prompt, list(encoded["input_ids"]))


def trimmed(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, ids: list[int]) -> list[int]:
    """Return a prompt's tokens without a second BOS token, and without the EOS token that some tokenizers append to each text.

    A response must not begin after the end. The first time for each tokenizer, a warning names what is left out.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    removed = []
    if begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
        removed.append(f"a second {tokenizer.bos_token}")

    # The prompt's own EOS, and the last token of a chat template, stay.
    is_open = isinstance(prompt, str) and not prompt.rstrip().endswith(str(tokenizer.eos_token))
    if is_open and end not in (None, begin) and len(ids) > 1 and ids[-1] == end:
        ids = ids[:-1]
        removed.append(f"the {tokenizer.eos_token} behind each prompt")

    if removed and id(tokenizer) not in _TRIMMED:
        _TRIMMED.add(id(tokenizer))
        logger.warning("the tokenizer of %s adds %s: left out", tokenizer.name_or_path, " and ".join(removed))
    return ids


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a response: those of the base's generation_config, or else the tokenizer's EOS."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def seed_of(seed: int, prompt: Prompt, sample: int) -> int:
    """Return the seed of one response: the same at every λ, so that models are compared under the same random numbers."""
    text = json.dumps([seed, prompt, sample], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def uniforms(seed: int, count: int) -> list[float]:
    """Return a response's random numbers within [0, 1), one for each token."""
    return np.random.default_rng(seed).random(count).tolist()
