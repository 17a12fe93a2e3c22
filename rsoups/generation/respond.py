"""Responses of one model to prompts, outside of sweeps: as tokens or as texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from rsoups.bases.load import load_base, load_tokenizer
from rsoups.generation.decoding import Prompt, encode, ends_of
from rsoups.generation.sampling import fast_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 64  # prompts


@torch.inference_mode()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return the tokens of a response to each prompt, the end token included, by transformers' `generate`.

    Sampling is pure, as in a sweep: of the base's generation_config only the end tokens apply.

    Args:
        model: Causal language model (of a PeftModel its base model, which contains the adapter).
        tokenizer: The model's tokenizer.
        prompts: Texts or messages.
        temperature: Temperature of the sampling; 0 is greedy.
        max_new_tokens: Longest response.
        seed: Seed of torch's random numbers.
        template: Variables of the chat template, as in `encode`.

    Raises:
        DatasetError: A prompt that `encode` refuses.
    """
    ids = [encode(tokenizer, prompt, template) for prompt in prompts]
    ends = ends_of(model, tokenizer)
    pad = next((token for token in (tokenizer.pad_token_id, *ends) if token is not None), 0)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pure = GenerationConfig(
        **(sampling if temperature else {"do_sample": False}),
        max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad,
    )  # fmt: skip

    responses: list[list[int]] = []
    # `generate` takes what a config leaves open from the model's own config, so that one is exchanged.
    own, model.generation_config = model.generation_config, pure
    try:
        torch.manual_seed(seed)
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            longest = max(map(len, batch))
            inputs = torch.tensor([[pad] * (longest - len(row)) + row for row in batch], device=model.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=model.device)
            with fast_sampling(model.device):
                generate: Any = model.generate
                whole = generate(input_ids=inputs, attention_mask=mask)
            responses += [_until_end(row, ends) for row in whole[:, longest:].tolist()]
    finally:
        model.generation_config = own
    return responses


def texts_of_policy(
    policy: str,
    prompts: Sequence[Prompt],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int = 0,
    device: str = "cpu",
    template: Mapping[str, Any] | None = None,
) -> list[str]:
    """Load a policy and return its responses to prompts, as `respond` samples them.

    Args:
        policy: Folder, Hub id or ``rsoups/...`` of a causal language model.
        prompts: Texts or messages.
        temperature, max_new_tokens, seed, template: Settings of `respond`.
        device: Device of the model.

    Raises:
        CheckpointError: The policy cannot be loaded.
        DatasetError: A prompt that `encode` refuses.
    """
    tokenizer, model = load_tokenizer(policy), load_base(policy, device=device)
    settings: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    ids = respond(model.eval().to(device), tokenizer, prompts, template=template, **settings)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return a response without the padding after its end."""
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1]
