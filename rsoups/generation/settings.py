"""Generation settings that pure sampling does not inherit."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version")
# Settings of generate that change no distribution.
_HARMLESS = ("use_cache", "cache_", "output_", "return_dict", "do_sample", "disable_compile", "compile_config")


def sample_purely(model: Any) -> list[str]:
    """Keep only the special tokens of a model's generation_config, from which `generate` takes settings that are not passed.

    Returns:
        The other settings that it held, as ``name=value``.
    """
    held = getattr(model, "generation_config", None)
    if held is None:
        return []
    default = GenerationConfig()
    removed = [
        f"{name}={value!r}"
        for name, value in held.to_dict().items()
        if name not in _KEPT and not name.startswith(("_", *_HARMLESS)) and value != getattr(default, name, None)
    ]
    settings = {name: getattr(held, name, None) for name in _KEPT if name != "transformers_version"}
    model.generation_config = GenerationConfig(**settings)
    return removed
