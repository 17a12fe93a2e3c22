"""Sweep λ: generate at every λ, score with every reward, write one record per (model, prompt).

A record is one line of JSON: ``name, lambdas, method, prompt, response, rewards, seed``. Everything after it (fronts,
plots, reports, the choice of λ) is a function of the records.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups._errors import DatasetError, OutputError, RewardError
from rsoups._resources import resolve
from rsoups.adapters import Adapter, read_adapter
from rsoups.front import Front
from rsoups.sampling import fast_sampling
from rsoups.scoring import check_scores
from rsoups.soup import Soup, interpolate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def simplex(ingredients: int, points: int = 11) -> list[list[float]]:
    """λ on a regular grid of the simplex, `points` to each edge.

    For two ingredients, from the first alone, (1, 0), to the second alone, (0, 1).

    Raises:
        ValueError: Fewer than one ingredient or two points.
    """
    if ingredients < 1 or points < 2:
        raise ValueError(f"simplex needs at least 1 ingredient and 2 points, got {ingredients} and {points}")
    steps = points - 1
    grid = [c for c in product(range(steps + 1), repeat=ingredients) if sum(c) == steps]
    return [[count / steps for count in counts] for counts in sorted(grid, reverse=True)]


@dataclass(frozen=True, eq=False)
class _Model:
    """One column of the sweep: a soup, or the base (no soup) or another adapter under its own name."""

    name: str
    lambdas: dict[str, float] | None
    method: str | None
    soup: Soup | None

    @property
    def key(self) -> str:
        return json.dumps([self.name, self.lambdas, self.method])

    @property
    def label(self) -> str:
        return self.name if self.lambdas is None else "λ " + "/".join(f"{x:g}" for x in self.lambdas.values())

    def records(
        self, prompts: list[str], responses: list[str], scores: dict[str, list[float]], seed: int
    ) -> list[dict[str, Any]]:
        return [
            {
                "name": self.name,
                "lambdas": self.lambdas,
                "method": self.method,
                "prompt": prompt,
                "response": response,
                "rewards": {name: scores[name][i] for name in scores},
                "seed": seed,
            }
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]


def sweep(
    base: str | PreTrainedModel,
    adapters: Mapping[str, Any],
    rewards: Mapping[str, Callable[[list[str], list[str]], list[float]]],
    prompts: Sequence[str],
    lambdas: Sequence[Sequence[float]] | None = None,
    *,
    method: str = "exact",
    others: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cut: Callable[[str], str] = str.strip,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    seed: int = 0,
    out: str | Path = "records.jsonl",
    progress: bool = True,
) -> Front:
    """Evaluate every soup on every prompt with every reward.

    The base is loaded once; each soup is attached to it and taken off again. All models answer the same prompts in the
    same batches, and start them from the same random state, so that comparisons are paired.

    Args:
        base: Model, folder, Hub id or ``rsoups/...``.
        adapters: Ingredients by name (folders, Hub ids, read Adapters).
        rewards: Rewards by name, each ``(prompts, responses) -> floats``.
        prompts: Policy prompts, all different.
        lambdas: K × N interpolation weights in the order of `adapters`; ``simplex(N)`` by default.
        method: As in `interpolate`.
        others: Further adapters by name, evaluated beside the soups and the base (MORL runs, say).
        tokenizer: The base's own by default.
        cut: What rewards see of a response (a task's ``cut``).
        temperature: Of sampling; 0 decodes greedily.
        max_new_tokens: Longest response, in tokens.
        batch_size: Prompts generated at a time.
        seed: Of sampling.
        out: Records file. A sweep that finds records of its own there goes on after them.
        progress: Show a progress bar.

    Returns:
        The front of all records.

    Raises:
        DatasetError: No prompts, or the same one twice.
        AdapterError, LambdasError: As `interpolate`.
        RewardError: No rewards, or a score that is not finite.
        OutputError: `out` holds records of another sweep.
    """
    if not prompts or len(set(prompts)) != len(prompts):
        raise DatasetError(
            f"a sweep needs prompts, each once; got {len(prompts)}, {len(set(prompts))} of them different"
        )
    if not rewards:
        raise RewardError("a sweep needs at least one reward")
    read = {name: _read(source) for name, source in adapters.items()}
    grid = [[float(x) for x in row] for row in (simplex(len(read)) if lambdas is None else lambdas)]
    models = _models(read, grid, method, {name: _read(source) for name, source in (others or {}).items()})
    settings = {
        "ingredients": {name: adapter.sha256 for name, adapter in read.items()},
        "rewards": list(rewards),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
    }
    records = _Records(Path(out), settings)
    todo = {
        model: batches
        for model in models
        if (batches := [b for b in _batches(prompts, batch_size) if records.missing(model.key, b)])
    }
    if todo:
        from tqdm.auto import tqdm

        generate = _Generator(base, tokenizer, temperature, max_new_tokens)
        total = sum(len(batch) for batches in todo.values() for batch in batches)
        with tqdm(total=total, unit="response", disable=not progress, desc="sweep") as bar:
            for model, batches in todo.items():
                bar.set_postfix_str(model.label)
                with generate.attached(model.soup):
                    for batch in batches:
                        responses = [cut(text) for text in generate(batch, seed)]
                        records.append(model.records(batch, responses, _score(rewards, batch, responses), seed))
                        bar.update(len(batch))
    return Front.from_jsonl(out)


def _score(rewards: Mapping[str, Callable], prompts: list[str], responses: list[str]) -> dict[str, list[float]]:
    scored = {name: list(reward(prompts, responses)) for name, reward in rewards.items()}
    for name, scores in scored.items():
        check_scores(name, scores, prompts, responses)
    return scored


def _read(source: Any) -> Adapter:
    return source if isinstance(source, Adapter) else read_adapter(source)


def _models(
    adapters: dict[str, Adapter], grid: list[list[float]], method: str, others: dict[str, Adapter]
) -> list[_Model]:
    soups = interpolate(adapters, grid, method=method)
    assert isinstance(soups, list)
    models = [_Model("base", None, None, None)]
    for row, soup in zip(grid, soups, strict=True):
        models.append(_Model("soup", dict(zip(adapters, row, strict=True)), method, soup))
    for name, adapter in others.items():
        alone = interpolate([adapter], [1.0])
        assert isinstance(alone, Soup)
        models.append(_Model(name, None, None, alone))
    return models


def _batches(prompts: Sequence[str], size: int) -> Iterator[list[str]]:
    """Batches of prompts of like length, the same ones for every model."""
    ordered = sorted(prompts, key=len, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


class _Generator:
    """The base with its tokenizer, and one soup at a time on it."""

    def __init__(self, base: Any, tokenizer: Any, temperature: float, max_new_tokens: int):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if isinstance(base, str):
            source = resolve(base)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            embedded = source != base  # stored in half precision to be small, computed with in float32
            dtype = torch.float32 if embedded or device == "cpu" else torch.bfloat16
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
            base = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
            base.to(device)
        tokenizer = deepcopy(tokenizer or AutoTokenizer.from_pretrained(base.config.name_or_path))
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._base, self._tokenizer = base.eval(), tokenizer
        self._model = self._base
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
        if temperature > 0:
            self._settings |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        else:
            self._settings |= {"do_sample": False}

    @contextmanager
    def attached(self, soup: Soup | None) -> Iterator[None]:
        """A context in which the soup is on the base, which is left as it was found."""
        if soup is None:
            yield
            return
        with soup.attached(self._base) as model:
            self._model = model.eval()
            try:
                yield
            finally:
                self._model = self._base

    def __call__(self, prompts: list[str], seed: int) -> list[str]:
        import torch

        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True).to(self._model.device)
        inputs.pop("token_type_ids", None)
        torch.manual_seed(seed)
        with torch.inference_mode(), fast_sampling(self._model.device):
            ids = self._model.generate(**inputs, **self._settings)
        return self._tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class _Records:
    """An append-only file of records, with the settings that made them beside it."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self._path, beside = path, path.with_suffix(".settings.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = json.loads(beside.read_text()) if beside.exists() else None
            if found != settings:
                differing = "all" if found is None else sorted(k for k in settings if settings[k] != found.get(k))
                raise OutputError(
                    f"{path} holds records of another sweep (differing: {differing}); move it or choose --out"
                )
            self._drop_partial()
        else:
            beside.write_text(json.dumps(settings, indent=2) + "\n")
            path.touch()
        lines = path.read_text(encoding="utf-8").splitlines()
        self._done = {self._key(json.loads(line)) for line in lines}

    @staticmethod
    def _key(record: dict[str, Any]) -> tuple[str, str]:
        return json.dumps([record["name"], record["lambdas"], record["method"]]), record["prompt"]

    def missing(self, model: str, prompts: list[str]) -> bool:
        """Whether a record of this model is missing for any of the prompts."""
        return any((model, prompt) not in self._done for prompt in prompts)

    def _drop_partial(self) -> None:
        """Cut off what a killed process left: a last line without its end."""
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with self._path.open("r+b") as file:
                file.truncate(end)

    def append(self, records: list[dict[str, Any]]) -> None:
        """Write the records that are not there yet, and have them on disk before returning."""
        new = [record for record in records if self._key(record) not in self._done]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new))
            file.flush()
            os.fsync(file.fileno())
        self._done |= {self._key(record) for record in new}
