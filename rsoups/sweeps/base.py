"""The base of a sweep: its tokenizer and its config at once, its weights when there is something to generate."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from rsoups.bases.load import base_config, load_base, load_tokenizer
from rsoups.common.assets import resolve
from rsoups.soups.live import LiveSoup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Base:
    """The base of a sweep.

    Attributes:
        name: Folder, Hub id or ``rsoups/...``; None for a model in memory.
        tokenizer: Tokenizer of the base.
        context: Length of the context in tokens; None if the config does not state it.
    """

    def __init__(self, base: str | PreTrainedModel | LiveSoup, tokenizer: PreTrainedTokenizerBase | None):
        self._base: Any = base
        self.name = base if isinstance(base, str) else None
        if isinstance(base, LiveSoup):
            tokenizer = tokenizer or base.tokenizer
        config = base_config(base) if isinstance(base, str) else self.model.config
        source = resolve(base) if isinstance(base, str) else str(config.name_or_path)
        self.tokenizer = tokenizer or load_tokenizer(source)
        self.context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)

    def load(self) -> PreTrainedModel | LiveSoup:
        """Load the weights, once, on this process's GPU if there is one."""
        if isinstance(self._base, str):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._base = torch.nn.Module.to(load_base(self._base, device=device), device)
        return self._base

    @property
    def model(self) -> PreTrainedModel:
        """The loaded model itself, also of a live soup."""
        base = self.load()
        return base.model if isinstance(base, LiveSoup) else base

    def fingerprint(self) -> str:
        """SHA-256 of the base's own weights: of each parameter the name, the shape and 16 values spread over it.

        The hash is the same in float32 and in bfloat16. It leaves out parameters that are kept elsewhere while unused (on
        disk, say), and the values of 4-bit parameters on a CPU, which bitsandbytes packs anew when they are first used.
        """
        digest = hashlib.sha256()
        with self._unmerged() as model:
            for name, parameter in model.named_parameters():
                if parameter.dtype == torch.uint8 and parameter.device.type == "cpu":
                    digest.update(f"{name}\n".encode())
                elif not parameter.is_meta:
                    values = parameter.detach().flatten()
                    sample = values[:: max(1, len(values) // 16)][:16].to(torch.bfloat16)
                    digest.update(f"{name} {tuple(parameter.shape)} {sample.tolist()}\n".encode())
        return digest.hexdigest()

    def _unmerged(self) -> AbstractContextManager[PreTrainedModel]:
        """A context in which no other thread merges a soup into the base."""
        base = self.load()
        if isinstance(base, LiveSoup):
            return base.at_weights(torch.zeros(1, len(base.names)))  # waits for other threads' `merged`
        return nullcontext(base)
