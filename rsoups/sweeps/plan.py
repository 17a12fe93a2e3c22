"""Check everything that a sweep is given, before any weights are loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rsoups.adapters.adapter import Adapter
from rsoups.adapters.lineage import Manifest
from rsoups.bases.compatibility import check_one_base
from rsoups.bases.names import check_base
from rsoups.common.assets import need
from rsoups.common.errors import AdapterError, DatasetError, LambdasError, RewardError
from rsoups.data.prompts import fit_prompts, question_of
from rsoups.data.training_data import chat_template_of, check_trained, manifests_of
from rsoups.fronts.grids import simplex
from rsoups.fronts.points import BASE, SOUP, is_number
from rsoups.generation.decoding import Prompt, encode
from rsoups.rewards.functions import as_reward
from rsoups.rewards.interface import LoadedReward
from rsoups.soups.interpolation import opened
from rsoups.soups.lambdas import weights_of
from rsoups.soups.live import LiveSoup
from rsoups.sweeps.base import Base
from rsoups.sweeps.items import ENSEMBLE, Model
from rsoups.sweeps.settings import SweepSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptTable:
    """The prompts that leave room for a response.

    Attributes:
        prompts: Texts or messages.
        ids: Tokens of each prompt.
        columns: Further values of each prompt, by name, for rewards.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]],
        base: Base,
        template: Mapping[str, Any],
        settings: SweepSettings,
    ) -> PromptTable:
        """Check prompts, and tokenize them with the chat template's variables in `template`.

        Raises:
            DatasetError: No prompts, equal prompts, a prompt without a question or without tokens, a column of another
                length, or prompts that are too long.
        """
        for prompt in prompts:
            question_of(prompt)  # refuses a prompt without a question
        different = {json.dumps(prompt) for prompt in prompts}
        if not prompts or len(different) != len(prompts):
            raise DatasetError(
                f"got {len(prompts)} prompts, {len(different)} of them different; pass at least one, and each once"
            )
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise DatasetError(
                    f"column {name!r} has {len(column)} values for {len(prompts)} prompts; pass one each"
                )
        ids = [encode(base.tokenizer, prompt, template) for prompt in prompts]
        if not all(ids):
            raise DatasetError(f"prompt {prompts[ids.index([])]!r} has no tokens; leave it out")

        places = list(range(len(prompts)))
        if base.context is not None:
            # A server reads a finished response as a prompt, to which it adds a token.
            longest = base.context - settings.max_new_tokens - int(settings.server is not None)
            places = fit_prompts(places, [len(tokens) for tokens in ids], longest, settings.long_prompts)
        if len(places) < len(prompts):
            logger.warning(
                "%d of %d prompts are dropped because they are too long", len(prompts) - len(places), len(prompts)
            )
        fitting = {name: [column[place] for place in places] for name, column in columns.items()}
        return cls([prompts[place] for place in places], [ids[place] for place in places], fitting)


@dataclass(frozen=True)
class Plan:
    """What a sweep evaluates, and how.

    Attributes:
        base: Base of all models.
        adapters: Ingredients by name.
        others: Further adapters by name.
        lambdas: λ of the soups, in the order of the ingredients.
        rewards: Rewards by name.
        table: Prompts with their columns.
        settings: Settings of the sweep.
        notes: Further entries of the settings file.
    """

    base: Base
    adapters: dict[str, Adapter]
    others: dict[str, Adapter]
    lambdas: list[list[float]]
    rewards: dict[str, LoadedReward]
    table: PromptTable
    settings: SweepSettings
    notes: dict[str, Any]

    def soup(self, row: Sequence[float]) -> Model:
        """The soup of one λ."""
        return Model(SOUP, dict(zip(self.adapters, row, strict=True)), self.settings.method)

    def models(self) -> list[Model]:
        """All models, in the order of the records."""
        ensemble = [Model(ENSEMBLE)] if self.settings.ensemble else []
        return [Model(BASE), *map(self.soup, self.lambdas), *map(Model, self.others), *ensemble]

    def file_settings(self, folder: Path) -> dict[str, Any]:
        """The content of the settings file beside records in `folder`."""
        cut = self.settings.cut
        return self.settings.sampling | {
            "ingredients": {name: adapter.sha256 for name, adapter in self.adapters.items()},
            "other_hashes": {name: adapter.sha256 for name, adapter in self.others.items()},
            "rewards": list(self.rewards),
            "prompts": _digest(self.table.prompts),
            "columns": _digest(self.table.columns),
            "server": self.settings.server is not None,
            "cut": getattr(cut, "__qualname__", type(cut).__name__),
            "samples": self.settings.samples,
            "method": self.settings.method,
            "base_mismatch_allowed": self.settings.allow_base_mismatch,
            "base": self.base.name,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in ("rsoups", "transformers", "peft", "torch")},
            **self.notes,
            "adapters": {name: _source_of(adapter, folder) for name, adapter in self.adapters.items()},
            "others": {name: _source_of(adapter, folder) for name, adapter in self.others.items()},
        }


def plan_of(
    base: Any,
    adapters: Mapping[str, Any] | None,
    rewards: Mapping[str, Any],
    prompts: Sequence[Prompt],
    lambdas: Sequence[Sequence[float]] | None,
    settings: SweepSettings,
    others: Mapping[str, Any] | None,
    columns: Mapping[str, Sequence[Any]] | None,
    held_out: Sequence[str],
    tokenizer: Any,
    notes: Mapping[str, Any] | None,
) -> Plan:
    """Check the arguments of `sweep`, which documents them and the errors."""
    if settings.server:
        need("openai", "server")
    live = base if isinstance(base, LiveSoup) else None
    if live is not None:
        allowed = settings.allow_base_mismatch or live.base_mismatch
        settings = replace(settings, method=live.method, allow_base_mismatch=allowed)

    ingredients = _ingredients(live, adapters)
    grid = _grid(lambdas, len(ingredients))
    compared = opened(others or {})
    _check_names(rewards, ingredients, compared, held_out)
    if not settings.allow_base_mismatch:
        check_one_base(ingredients.values())
    base = own_base(ingredients) if base is None else base
    sources = [(adapter.source, adapter.settings) for adapter in [*ingredients.values(), *compared.values()]]
    check_base(sources, live.model if live else base, settings.allow_base_mismatch)

    base_model = Base(base, tokenizer)
    manifests = {name: manifests_of(adapter) for name, adapter in {**compared, **ingredients}.items()}
    template: dict[str, Any] = {}
    if not all(isinstance(prompt, str) for prompt in prompts):
        given = settings.chat_template_kwargs
        template = chat_template_of(manifests) if given is None else dict(given)
    table = PromptTable.of(prompts, columns or {}, base_model, template, settings)
    trained_on = {name: _trained_on(chain) for name, chain in manifests.items()}
    entries = {
        **(notes or {}),
        "held_out": list(held_out),
        "trained_on": {name: weights for name, weights in trained_on.items() if weights},
        "trained_prompts": check_trained(manifests, table.prompts, settings.allow_trained_prompts),
    }
    if template:
        entries["chat_template_kwargs"] = template
    named = {name: as_reward(reward, name) for name, reward in rewards.items()}
    return Plan(base_model, ingredients, compared, grid, named, table, settings, entries)


def _ingredients(live: LiveSoup | None, adapters: Mapping[str, Any] | None) -> dict[str, Adapter]:
    if live is not None:
        if adapters is not None and list(adapters) != live.names:
            raise LambdasError(f"adapters are {list(adapters)}, but the LiveSoup holds {live.names}: leave them out")
        return dict(live.adapters)
    if not adapters:
        raise LambdasError("no adapters to sweep between: pass at least one by name")
    return opened(adapters)


def _grid(lambdas: Sequence[Sequence[float]] | None, count: int) -> list[list[float]]:
    """λ of `count` ingredients, checked, each once."""
    rows = simplex(count) if lambdas is None else [list(row) for row in lambdas]
    if not rows:
        raise LambdasError("no λ to sweep: pass at least one, or leave lambdas out for a grid of 11 on each edge")
    checked = weights_of(rows, count, False, False)
    return [list(row) for row in dict.fromkeys(map(tuple, checked))]


def _check_names(
    rewards: Mapping[str, Any], ingredients: Mapping[str, Any], others: Mapping[str, Any], held_out: Sequence[str]
) -> None:
    if not rewards:
        raise RewardError("no rewards: a sweep needs at least one reward")
    if unknown := set(held_out) - set(rewards):
        raise RewardError(f"held_out names {sorted(unknown)}, but the rewards are {list(rewards)}")
    if taken := ({SOUP, BASE, ENSEMBLE} | set(ingredients)) & set(others):
        raise LambdasError(f"{sorted(taken)} among others: these names are taken, choose other names")


def own_base(adapters: Mapping[str, Adapter]) -> str:
    """The base that adapters name.

    Raises:
        AdapterError: The adapters name no base, or several.
    """
    names = {name: adapter.settings.base_model_name_or_path for name, adapter in adapters.items()}
    bases = {base for base in names.values() if base}
    if len(bases) > 1:
        raise AdapterError(f"the adapters name different bases, {names}: say which one to sweep on")
    if not bases:
        raise AdapterError(f"the adapters {list(adapters)} do not name their base: say which one to sweep on")
    return str(bases.pop())


def _trained_on(manifests: Sequence[Manifest]) -> dict[str, float]:
    """The rewards that an adapter's manifest names, with their weights; empty if they are unknown."""
    rewards = (manifests[0].get("rewards") or []) if manifests else []
    weights = {reward.get("name"): reward.get("weight", 1.0) for reward in rewards}
    if not all(isinstance(name, str) and is_number(weight) for name, weight in weights.items()):
        return {}
    return {name: float(weight) for name, weight in weights.items()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _source_of(adapter: Adapter, folder: Path) -> str | None:
    """Hub id of an adapter, or its folder relative to the records' folder; None for an adapter in memory."""
    path = Path(adapter.source).expanduser()
    if path.is_dir():
        return os.path.relpath(path.resolve(), folder.resolve())
    return adapter.source if "of a live model" not in adapter.source else None
