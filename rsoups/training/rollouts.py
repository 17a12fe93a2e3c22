"""Responses of a rollout by `Decoder`, which is faster than `generate` and draws the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from trl.models.utils import disable_gradient_checkpointing

from rsoups.generation.decoding import Decoder
from rsoups.training.policy import adapter_in_base

# Settings of `generate` that the decoder follows, and values of others that change nothing.
_FOLLOWED = ("max_new_tokens", "do_sample", "temperature", "eos_token_id", "pad_token_id", "bos_token_id")
_NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def decoder_generates(trainer: Any) -> bool:
    """Whether `Decoder` can generate a PPOTrainer's rollouts: no other engine does, and no setting is for `generate` alone."""
    args = trainer.args
    engines = trainer.use_vllm or args.use_transformers_continuous_batching or trainer.sharded
    if engines or args.generation_kwargs or args.cache_implementation or trainer._is_vlm:
        return False
    settings, default = trainer.generation_config.to_dict(), GenerationConfig().to_dict()
    return all(
        name in _FOLLOWED or value is None or value == _NEUTRAL.get(name, default.get(name))
        for name, value in settings.items()
        if not name.startswith("_") and name not in ("transformers_version", "disable_compile")
    )


def decode(trainer: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
    """Return the tokens of a response to each prompt, end token included.

    Args:
        trainer: PPOTrainer. Its `sampler_watch` gets each draw.
        prompt_ids: Tokens of each prompt.
    """
    config = trainer.generation_config
    policy = trainer.accelerator.unwrap_model(trainer.model)
    causal_lm = policy.get_base_model()
    limit, ends = config.max_new_tokens, trainer.eos_token_ids
    decoder = Decoder(causal_lm, trainer._tokenizer, config.temperature, limit, ends)

    # A token's random number comes after those of all rows' tokens before it, as `generate` draws them.
    shape = (limit, len(prompt_ids))
    uniforms = torch.rand(shape, dtype=torch.float64, device=causal_lm.device).T if config.do_sample else None
    # What samples must compute as what is trained does. In float32 an adapter in the base is the same to rounding.
    half = trainer.accelerator.mixed_precision != "no"
    precision = trainer.accelerator.autocast() if half else adapter_in_base(policy)

    chosen, before = torch.empty(0), torch.zeros(())
    with disable_gradient_checkpointing(trainer.model, trainer.args.activation_checkpointing_kwargs), precision:
        for step, (chosen, logps) in enumerate(decoder.steps(prompt_ids, uniforms)):
            if trainer.sampler_watch is not None:
                trainer.sampler_watch.add(chosen[:, step], logps - before)
                before = logps.clone()
    return [[token for token in row if token >= 0] for row in chosen.tolist()]
