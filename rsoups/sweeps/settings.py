"""Settings of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rsoups.common.errors import SettingsError

_LEAST = {"samples": 1, "refine": 0, "max_new_tokens": 1, "batch_tokens": 1}


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep generates, and what it evaluates beside the soups that it is given.

    Attributes:
        method: Interpolation method of the soups, ``exact`` or ``factors`` (``svd`` too through a server), as in `interpolate`.
        samples: Number of responses of each model to each prompt.
        ensemble: Evaluate the prediction ensemble too: the mean of the ingredients' next-token distributions.
        refine: Number of further λ, chosen one after the other where the front has its largest gap (`grids.largest_gap`).
        temperature: Sampling temperature, without top-k or top-p; 0 decodes greedily.
        max_new_tokens: Length of the longest response, in tokens.
        seed: Seed of the sampling.
        cut: Function from a response to the part of it that rewards see (a task's ``cut``).
        long_prompts: Treatment of prompts that leave no room for a response in the context: ``refuse`` or ``drop``.
        chat_template_kwargs: Variables of the chat template (``enable_thinking``, say) for prompts that are messages; by
            default the variables that the adapters were trained with, according to their manifests.
        allow_trained_prompts: Accept prompts that an adapter was trained on; the report names the adapter.
        allow_base_mismatch: Accept adapters that name another base; recorded in the settings file.
        batch_tokens: Size of a batch in tokens, padding included, or ``auto``; halved if memory runs out.
        server: URL of a running vLLM server of this base, which generates instead. It does not tell the log-probabilities
            at other temperatures than 0 and 1; records of soups then have no `kl`.

    Raises:
        SettingsError: A value is out of its range, or two settings contradict each other.
    """

    method: str = "exact"
    samples: int = 1
    ensemble: bool = False
    refine: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 32
    seed: int = 0
    cut: Callable[[str], str] = str.strip
    long_prompts: str = "refuse"
    chat_template_kwargs: Mapping[str, Any] | None = None
    allow_trained_prompts: bool = False
    allow_base_mismatch: bool = False
    batch_tokens: int | str = "auto"
    server: str | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if (name, value) != ("batch_tokens", "auto") and not (isinstance(value, int) and value >= least):
                raise SettingsError(f"{name} is {value!r}; pass a whole number of at least {least}")
        if not (isinstance(self.temperature, (int, float)) and 0 <= self.temperature < math.inf):
            raise SettingsError(
                f"temperature is {self.temperature!r}; pass a number of at least 0 (0 decodes greedily)"
            )
        methods = ["exact", "factors", "svd"] if self.server else ["exact", "factors"]
        if self.method not in methods:
            raise SettingsError(f"method is {self.method!r}; pass one of {methods}")
        if self.long_prompts not in ("refuse", "drop"):
            raise SettingsError(f"long_prompts is {self.long_prompts!r}; pass 'refuse' or 'drop'")
        if self.ensemble and self.server:
            raise SettingsError("a server has no prediction ensembles: leave out ensemble or server")

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of the sampling alone."""
        return {"temperature": self.temperature, "max_new_tokens": self.max_new_tokens, "seed": self.seed}
