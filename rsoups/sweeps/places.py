"""Put a model's λ on one shared base."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsoups.adapters.adapter import Adapter
from rsoups.bases.load import load_base
from rsoups.common.errors import AdapterError
from rsoups.soups.interpolation import interpolate
from rsoups.soups.live import LiveSoup
from rsoups.soups.soup import Soup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from rsoups.sweeps.items import Model, is_base

# Of one λ in a batch, from which merging it pays. (The embedded policy's few weights are merged in the time of two steps, and
# it pays from one row on; more weights need more tokens.)
MERGED_TOKENS = 1_024
Keep = Callable[[Tensor], None] | None

logger = logging.getLogger(__name__)


class LivePlaces:
    """Rows of any models in one batch, on live soups: one of the ingredients, one of the other adapters."""

    mixes = True

    def __init__(self, live: LiveSoup, others: LiveSoup | None, keep_live: bool):
        self._live, self._others, self._keep_live = live, others, keep_live
        self.ingredients, self.can_merge = live.names, live.can_merge

    @contextmanager
    def at(self, models: Sequence[Model], tokens: int) -> Iterator[Keep]:
        """A context in which the base is these models, row by row; yields what is told of the rows that remain,
        None where they are all of one."""
        lives = [live for live in (self._live, self._others) if live is not None]
        first = models[0]
        with ExitStack() as stack:
            kept: list[LiveSoup] = []
            if all(model.key == first.key for model in models) and not first.ensemble:
                for live in lives:
                    (row,) = self._rows(live, [first])
                    if any(row) and self.can_merge and tokens >= MERGED_TOKENS:
                        stack.enter_context(live.merged(row, extrapolate=True))
                    elif any(row):
                        stack.enter_context(live._at(torch.tensor([row])))
            else:
                for live in lives:
                    rows = torch.tensor(self._rows(live, models))
                    if rows.any():
                        stack.enter_context(live._at(rows))
                        kept.append(live)

            def keep(rows: Tensor) -> None:
                for live in kept:
                    live.keep(rows)

            yield keep if kept else None

    def _rows(self, live: LiveSoup, models: Sequence[Model]) -> list[list[float]]:
        """λ of each row of a batch; of zeros where it is the base, or of the other soup's adapters."""
        rows: list[list[float]] = []
        for model in models:
            if live is self._others:
                rows.append([float(name == model.other) for name in live.names])
            elif model.ensemble:
                rows += torch.eye(len(live.names)).tolist()
            else:
                rows.append([(model.soup or {}).get(name, 0.0) for name in live.names])
        return rows

    def close(self) -> None:
        for live in (self._others, None if self._keep_live else self._live):
            if live is not None:
                live.remove()


class AttachedPlaces:
    """One model at a time, as an ordinary adapter on the base: for what no live soup can hold (whole trained parameters)."""

    mixes = can_merge = False

    def __init__(self, model: PreTrainedModel, adapters: Mapping[str, Adapter], others: Mapping[str, Adapter]):
        self._model, self._adapters, self._others = model, adapters, others
        self.ingredients = list(adapters)
        self._made: tuple[str, Soup] | None = None

    @contextmanager
    def at(self, models: Sequence[Model], tokens: int) -> Iterator[Keep]:
        """As `LivePlaces.at`; the models are one."""
        with ExitStack() as stack:
            if not is_base(models[0]):
                stack.enter_context(self._soup(models[0]).attached(self._model, allow_base_mismatch=True))
                self._model.eval()
            yield None

    def _soup(self, model: Model) -> Soup:
        if self._made is None or self._made[0] != model.key:
            if model.other:
                soup = interpolate([self._others[model.other]], [1.0])
            else:
                row = list((model.soup or {}).values())
                method = model.method or "exact"
                soup = interpolate(self._adapters, row, method=method, extrapolate=True, allow_base_mismatch=True)
            assert isinstance(soup, Soup)
            self._made = model.key, soup
        return self._made[1]

    def close(self) -> None:
        pass


def places_of(
    base: PreTrainedModel | LiveSoup,
    adapters: Mapping[str, Adapter],
    others: Mapping[str, Adapter],
    method: str,
    ensemble: bool,
) -> LivePlaces | AttachedPlaces:
    """Live places where the adapters can be live. (The names of their bases were compared by `sweep`.)

    Raises:
        AdapterError: Adapters that fit neither way; an ensemble of some that cannot be live.
    """
    model = base.model if isinstance(base, LiveSoup) else base
    live: LiveSoup | None = None
    try:
        live = base if isinstance(base, LiveSoup) else LiveSoup(model, adapters, method, allow_base_mismatch=True)
        beside = LiveSoup(model, others, allow_base_mismatch=True) if others else None
        return LivePlaces(live, beside, live is base)
    except AdapterError as error:
        if live is not None and live is not base:
            live.remove()
        if ensemble or live is base:
            raise
        logger.info("soups are attached one after the other: %s", error)
    first = [1.0] + [0.0] * (len(adapters) - 1)
    interpolate(adapters, first, method=method, allow_base_mismatch=True)  # refused here, before the work
    return AttachedPlaces(model, adapters, others)


def load_quietly(name: str) -> PreTrainedModel:
    """A base by folder, Hub id or ``rsoups/...``, on this process's GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.nn.Module.to(load_base(name, device=device), device)
