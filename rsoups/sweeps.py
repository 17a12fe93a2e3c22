"""Sweep λ: generate at every λ, score with every reward, write one record for each response.

A record is one line of JSON:

- ``name, lambdas, method``: the model: ``soup`` with its λ by ingredient, ``base``, ``ensemble``, or another adapter's name;
- ``prompt, sample, seed``: what was asked, which response to it (0, 1, ...), the sweep's seed;
- ``response, rewards``: what rewards saw of the response, and what each said (null where one has no opinion, which is then
  named under ``abstained``);
- ``tokens, kl, base_nll``: of the whole response: its tokens (the one that ended it included), Σ log p - log p_base of them
  at the sampling temperature (k1; at temperature 1 where greedy), and Σ -log p_base at temperature 1, both in nats: the
  base's perplexity is exp(base_nll / tokens).

Everything after it (fronts, plots, reports, the choice of λ) is a function of the records.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rsoups._errors import (
    AdapterError,
    DatasetError,
    LambdasError,
    RewardError,
    RsoupsError,
)
from rsoups.adapters import Adapter, read_adapter
from rsoups.bases import check_base
from rsoups.checkpoints import only_run_in
from rsoups.compatibility import check_one_base
from rsoups.decoding import Prompt, encode
from rsoups.front import Front
from rsoups.generation import Answer, Base, Generator, Item, Model, Nats
from rsoups.grids import largest_gap, simplex
from rsoups.lineage import Manifest
from rsoups.live import LiveSoup
from rsoups.notes import trained_on_of
from rsoups.points import BASE, SOUP, mean_score
from rsoups.records import Key, Records, gather, model_key, pin, prepare
from rsoups.scoring import AveragedScores, FunctionReward, Reward, check_scores
from rsoups.soup import weights_of
from rsoups.tasks import fit_prompts, question_of, read_jsonl
from rsoups.training_data import chat_template_of, check_trained, manifests_of
from rsoups.vllm_server import Server

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENSEMBLE = "ensemble"
_WAITING = 2  # batches that wait to be scored

logger = logging.getLogger(__name__)


def sweep(
    base: str | PreTrainedModel | LiveSoup | None,
    adapters: Mapping[str, Any] | None,
    rewards: Mapping[str, Callable[..., Any]],
    prompts: Sequence[Prompt],
    lambdas: Sequence[Sequence[float]] | None = None,
    *,
    method: str = "exact",
    samples: int = 1,
    others: Mapping[str, Any] | None = None,
    ensemble: bool = False,
    refine: int = 0,
    columns: Mapping[str, Sequence[Any]] | None = None,
    held_out: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    cut: Callable[[str], str] = str.strip,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    long_prompts: str = "refuse",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_trained_prompts: bool = False,
    batch_tokens: int | str = "auto",
    server: str | None = None,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    notes: Mapping[str, Any] | None = None,
    out: str | Path = "records.jsonl",
    progress: bool = True,
) -> Front:
    """Evaluate every soup on every prompt with every reward.

    One copy of the base is loaded; soups, base and other adapters share its batches, each row with its own λ. A response's
    random numbers depend on `seed`, its prompt and its sample alone: every model answers under the same ones. With other
    batches, processes or interruptions the texts are the same, and KL and scores up to rounding. Under `accelerate launch`,
    processes share the work. A sweep that finds records of its own in `out` goes on after them, on the same base: its weights
    are compared.

    Args:
        base: Model, folder, Hub id or ``rsoups/...``; or a LiveSoup, whose adapters are the ingredients. With None it is the
            base that the adapters name.
        adapters: Ingredients by name (folders, Hub ids, read Adapters); None with a LiveSoup.
        rewards: Rewards by name, each ``(prompts, responses, **columns) -> floats``, or without columns. What several models
            answer to a prompt alike is scored once.
        prompts: Policy prompts, all different: texts, or messages for the tokenizer's chat template.
        lambdas: K × N interpolation weights in the order of `adapters`; ``simplex(N)`` by default.
        method: As in `interpolate`.
        samples: Responses of each model to each prompt.
        others: Further adapters by name, evaluated beside the soups and the base (MORL runs, say).
        ensemble: Evaluate the prediction ensemble too: the mean of the ingredients' next-token distributions.
        refine: So many λ more, one after the other, each where the front has its largest gap (`grids.largest_gap`).
        columns: By name, one value for each prompt, which rewards are handed (``references``, say).
        held_out: Names of the rewards that no ingredient was trained on, for the report.
        tokenizer: The base's own by default.
        cut: What rewards see of a response (a task's ``cut``).
        temperature: Of sampling, without top-k or top-p; 0 decodes greedily.
        max_new_tokens: Longest response, in tokens.
        long_prompts: Where prompts leave no room for a response in the context: ``refuse``, or ``drop`` them.
        chat_template_kwargs: Variables of the chat template (``enable_thinking``, say) for prompts that are messages; by
            default those that the adapters were trained with, as their manifests tell.
        allow_trained_prompts: Go on where an adapter was trained on some of the prompts; the report names it.
        batch_tokens: Of a batch, padding included; halved where memory does not hold it.
        server: URL of a running vLLM server of this base, which answers instead (`rsoups.vllm_server`); records then have
            neither `kl` nor `base_nll`.
        seed: Of sampling.
        allow_base_mismatch: Accept adapters that name other bases than this one; recorded in the settings file.
        notes: More to be found in the settings file beside the records.
        out: Records file.
        progress: Show a progress bar.

    Returns:
        The front of all records.

    Raises:
        DatasetError: No prompts, the same one twice, one that asks nothing, too long ones; prompts that an adapter was trained
            on; adapters that were trained with different chat_template_kwargs; or responses that are all empty.
        AdapterError, LambdasError: As `interpolate`; no λ at all; a name among `others` that is taken; no base, or adapters
            that name several.
        RewardError: No rewards, one that raised, or a score that is not finite.
        ServerError: The server refuses or cannot be reached.
        OutputError: `out` holds records of another sweep or base, another process is at it, or it cannot be written.
    """
    live = base if isinstance(base, LiveSoup) else None
    ingredients = _ingredients(live, adapters)
    grid = _grid(lambdas, len(ingredients))
    method = live.method if live else method
    beside = {name: _read(source) for name, source in (others or {}).items()}
    _check_names(rewards, ingredients, beside, held_out)
    allowed = allow_base_mismatch or (live is not None and live.base_mismatch)
    if not allowed:
        check_one_base(ingredients.values())
    base = own_base(ingredients) if base is None else base
    adapted = [(adapter.source, adapter.config) for adapter in [*ingredients.values(), *beside.values()]]
    check_base(adapted, live.model if live else base, allowed)
    opened = Base(base, tokenizer)
    manifests = {name: manifests_of(adapter) for name, adapter in {**beside, **ingredients}.items()}
    template = _template(chat_template_kwargs, manifests, prompts)
    asked = _Asked.of(prompts, columns, opened, max_new_tokens, long_prompts, template)
    trained = check_trained(manifests, asked.prompts, allow_trained_prompts)
    models = [Model(BASE)]
    models += [Model(SOUP, dict(zip(ingredients, row, strict=True)), method) for row in grid]
    models += [Model(name, other=name) for name in beside]
    models += [Model(ENSEMBLE, ensemble=True)] if ensemble else []
    decoding: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    settings = decoding | {
        "ingredients": {name: adapter.sha256 for name, adapter in ingredients.items()},
        "other_hashes": {name: adapter.sha256 for name, adapter in beside.items()},
        "rewards": list(rewards),
        "prompts": _digest(asked.prompts),
        "columns": _digest(asked.columns),
        "server": server is not None,
        "cut": getattr(cut, "__qualname__", type(cut).__name__),
    }
    about: dict[str, Any] = {
        "held_out": list(held_out),
        "samples": samples,
        "method": method,
        "base_mismatch_allowed": allowed,
    }
    about |= {**_provenance(base), **(notes or {})}
    if template:
        settings["chat_template_kwargs"] = template
    for name, sources in (("adapters", ingredients), ("others", beside)):
        about[name] = {key: _told(source, Path(out).parent) for key, source in sources.items()}
    trained_on = {name: _trained_on(found) for name, found in manifests.items()}
    about["trained_on"] = {name: weights for name, weights in trained_on.items() if weights}
    about["trained_prompts"] = trained
    processes = _Processes()
    run = _Run(models, asked, rewards, cut, samples, seed, Path(out), processes, progress)

    def start() -> Generator | Server:
        if server is not None:
            return Server(server, ingredients, beside, Path(out).parent, **decoding)
        name, weights = about["base"], opened.fingerprint()
        with processes.main_first():
            pin(Path(out), name, weights, processes.is_main)
        return opened.generator(ingredients, beside, method, ensemble, batch_tokens=batch_tokens, **decoding)

    run.start = start
    with only_run_in(Path(out).parent) if processes.is_main else nullcontext(), run:
        if processes.is_main:
            prepare(Path(out), settings | about)
        run.until_done(models)
        for _ in range(refine):
            if (row := run.wanted()) is None:
                break
            models.append(Model(SOUP, dict(zip(ingredients, row, strict=True)), method))
            run.until_done(models[-1:])
    _check_texts(Path(out))
    return Front.from_jsonl(out)


class _Run:
    """The work of one process: items that no record holds yet, in batches, which are scored beside the generation."""

    start: Callable[[], Generator | Server]  # what answers, when there is something to be answered

    def __init__(
        self,
        models: list[Model],
        asked: _Asked,
        rewards: Mapping[str, Callable[..., Any]],
        cut: Callable[[str], str],
        samples: int,
        seed: int,
        path: Path,
        processes: _Processes,
        progress: bool,
    ):
        self._models, self._asked, self._cut, self._samples, self._seed = models, asked, cut, samples, seed
        self._path, self._processes, self._progress = path, processes, progress
        self._rewards = {
            name: reward if isinstance(reward, (Reward, FunctionReward)) else FunctionReward(reward, name)
            for name, reward in rewards.items()
        }
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="rsoups-scoring")
        self._classifiers = [name for name, reward in rewards.items() if isinstance(reward, (Reward, AveragedScores))]
        self._scores: dict[tuple[int, str], dict[str, float]] = {}  # of what was said, by reward
        self._made: Generator | Server | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self._scoring.shutdown(cancel_futures=True)
        if self._made is not None:
            self._made.close()

    def until_done(self, models: Sequence[Model]) -> None:
        """Answer what these models have not answered yet, and gather the records of all processes."""
        self._processes.wait()  # for `prepare`, or for the records that were gathered before
        records = Records(self._path, self._processes.rank, self._processes.count)
        todo = [item for item in self._items(models) if _key(item) not in records.done]
        if todo:
            share = sorted(todo, key=lambda item: len(item.ids), reverse=True)[
                self._processes.rank :: self._processes.count
            ]
            self._answer(share, records)
        self._processes.wait()
        if self._processes.is_main:
            gather(self._path, map(_key, self._items(self._models)))
        self._processes.wait()

    def _items(self, models: Sequence[Model]) -> Iterator[Item]:
        """In the order of the records file."""
        for model in models:
            for place, (prompt, ids) in enumerate(zip(self._asked.prompts, self._asked.ids, strict=True)):
                for sample in range(self._samples):
                    yield Item(model, place, prompt, ids, sample)

    def _answer(self, items: list[Item], records: Records) -> None:
        from tqdm.auto import tqdm

        self._made = generate = self._made or self.start()
        waiting: deque[tuple[list[Item], list[Answer], list[Nats], Future[None]]] = deque()
        shown = self._progress and self._processes.is_main
        with tqdm(total=len(items), unit="response", disable=not shown, desc="sweep") as bar:

            def record(most: int) -> None:
                while waiting and (len(waiting) > most or waiting[0][-1].done()):
                    batch, answers, nats, scored = waiting.popleft()
                    scored.result()
                    records.append(list(map(self._record, batch, answers, nats)))
                    bar.update(len(batch))

            # Models on the same cores are not run beside each other: their threads wait for one another, and a sweep takes a
            # third longer. Functions, which may be waiting for a judge, are.
            here = self._classifiers if generate.on_cpu else []
            beside = [name for name in self._rewards if name not in here]
            for batch in generate.batches(items):
                answers = generate(batch)
                new = [key for key in dict.fromkeys(map(self._said, batch, answers)) if key not in self._scores]
                self._scores |= {key: {} for key in new}  # what several models say to a prompt is scored once
                scored = self._scoring.submit(self._score, new, beside)
                nats = generate.nats(batch, answers)
                self._score(new, here)
                waiting.append((batch, answers, nats, scored))
                record(_WAITING)
            record(0)

    def _said(self, item: Item, answer: Answer) -> tuple[int, str]:
        """What is scored: the prompt's place, and what rewards see of the response."""
        return item.place, self._cut(answer.text)

    def _score(self, said: list[tuple[int, str]], names: Sequence[str]) -> None:
        if not said:
            return
        places, responses = zip(*said, strict=True)
        prompts = [self._asked.prompts[place] for place in places]
        columns = {name: [column[place] for place in places] for name, column in self._asked.columns.items()}
        for name in names:
            scores = _scored(self._rewards[name], prompts, list(responses), columns)
            for key, score in zip(said, scores, strict=True):
                self._scores[key][name] = score

    def _record(self, item: Item, answer: Answer, nats: Nats) -> dict[str, Any]:
        head, said = item.model.head, self._said(item, answer)
        scores = {name: self._scores[said][name] for name in self._rewards}
        record = head | {"prompt": item.prompt, "response": said[1], "rewards": scores}
        record |= {"seed": self._seed, "sample": item.sample, "tokens": answer.tokens, **nats._asdict()}
        if abstained := [name for name, score in scores.items() if score is None]:
            record["abstained"] = abstained
        return {key: value for key, value in record.items() if value is not None or key in head}

    def wanted(self) -> list[float] | None:
        """λ of one more soup, of the records of those there are."""
        soups = [model for model in self._models if model.soup]
        found: dict[str, list[dict[str, Any]]] = {}
        for record in read_jsonl(self._path):
            found.setdefault(model_key(record), []).append(record)
        means = np.array([[mean_score(found[model.key], name) for name in self._rewards] for model in soups])
        return largest_gap([list((model.soup or {}).values()) for model in soups], means)


@dataclass(frozen=True)
class _Asked:
    """The prompts that leave room for a response: as given, in tokens, with their columns."""

    prompts: list[Prompt]
    ids: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]] | None,
        opened: Base,
        new: int,
        policy: str,
        template: Mapping[str, Any],
    ) -> _Asked:
        for prompt in prompts:
            question_of(prompt)  # refuses what asks nothing
        different = {json.dumps(prompt) for prompt in prompts}
        if not prompts or len(different) != len(prompts):
            raise DatasetError(
                f"a sweep needs prompts, each once; got {len(prompts)}, {len(different)} of them different"
            )
        columns = columns or {}
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise DatasetError(f"column {name!r} has {len(column)} values for {len(prompts)} prompts")
        ids = [encode(opened.tokenizer, prompt, template) for prompt in prompts]
        if not all(ids):
            raise DatasetError(f"prompt {prompts[ids.index([])]!r} has no tokens")
        places = list(range(len(prompts)))
        if opened.context is not None:
            places = fit_prompts(places, [len(one) for one in ids], opened.context - new, policy)
        if len(places) < len(prompts):
            logger.warning("%d of %d prompts dropped: too long", len(prompts) - len(places), len(prompts))
        kept = {name: [column[place] for place in places] for name, column in columns.items()}
        return cls([prompts[place] for place in places], [ids[place] for place in places], kept)


class _Processes:
    """This process among those of `accelerate launch`."""

    def __init__(self) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            slowest = timedelta(days=7)  # that the others wait for
            self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=slowest)
        self.rank = self._state.process_index if self._state else 0
        self.count = self._state.num_processes if self._state else 1
        self.is_main = self.rank == 0

    def wait(self) -> None:
        if self._state:
            self._state.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """A context that the others enter when the main process has left it."""
        return self._state.main_process_first() if self._state else nullcontext()


def _ingredients(live: LiveSoup | None, adapters: Mapping[str, Any] | None) -> dict[str, Adapter]:
    if live is not None:
        if adapters is not None and list(adapters) != live.names:
            raise LambdasError(f"the LiveSoup is of {live.names}, the adapters are {list(adapters)}: leave them out")
        return dict(live._adapters)
    if not adapters:
        raise LambdasError("no adapters to sweep between")
    return {name: _read(source) for name, source in adapters.items()}


def own_base(adapters: Mapping[str, Adapter]) -> str:
    """The base that adapters name.

    Raises:
        AdapterError: They name none, or several.
    """
    named = {name: adapter.config.base_model_name_or_path for name, adapter in adapters.items()}
    found = {base for base in named.values() if base}
    if len(found) > 1:
        raise AdapterError(f"the adapters name different bases, {named}: say which one to sweep on")
    if not found:
        raise AdapterError(f"the adapters {list(adapters)} do not name their base: say which one to sweep on")
    return str(found.pop())


def _trained_on(manifests: Sequence[Manifest]) -> dict[str, float]:
    """The rewards that an adapter's manifest names, with their weights; empty where it is not known."""
    rewards = (manifests[0].get("rewards") or []) if manifests else []
    return trained_on_of({"trained_on": {"it": {r.get("name"): r.get("weight", 1.0) for r in rewards}}}).get("it", {})


def _template(
    given: Mapping[str, Any] | None, manifests: Mapping[str, Sequence[Manifest]], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Variables of the chat template: those given, or those that the adapters were trained with; none for texts."""
    if all(isinstance(prompt, str) for prompt in prompts):
        return {}
    return chat_template_of(manifests) if given is None else dict(given)


def _grid(lambdas: Sequence[Sequence[float]] | None, count: int) -> list[list[float]]:
    """Checked λ, each once."""
    rows = simplex(count) if lambdas is None else [list(row) for row in lambdas]
    if not rows:
        raise LambdasError("no λ to sweep: give one at least, or none at all for a grid of 11 on each edge")
    return [list(row) for row in dict.fromkeys(tuple(row) for row in weights_of(rows, count, False, False))]


def _check_names(
    rewards: Mapping[str, Any], ingredients: Mapping[str, Any], others: Mapping[str, Any], held_out: Sequence[str]
) -> None:
    if not rewards:
        raise RewardError("a sweep needs at least one reward")
    if unknown := set(held_out) - set(rewards):
        raise RewardError(f"held_out names {sorted(unknown)}, the rewards are {list(rewards)}")
    if taken := ({SOUP, BASE, ENSEMBLE} | set(ingredients)) & set(others):
        raise LambdasError(f"{sorted(taken)} among others: these names are taken, choose another")


def _read(source: Any) -> Adapter:
    return source if isinstance(source, Adapter) else read_adapter(source)


def _key(item: Item) -> Key:
    return item.model.key, json.dumps(item.prompt), item.sample


def _scored(reward: Any, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]]) -> list[float]:
    try:
        scores = list(reward(prompts, responses, **columns))
    except RsoupsError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward {reward.name!r} raised {type(error).__name__}: {error}; the batch begins with prompt {prompts[0]!r}, "
            f"response {responses[0]!r}"
        ) from error
    check_scores(reward.name, scores, prompts, responses)
    return scores


def _check_texts(path: Path) -> None:
    if not any(record["response"] for record in read_jsonl(path)):
        raise DatasetError(
            f"all responses in {path} are empty: the model ends its responses at once, or `cut` leaves nothing of them"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _told(adapter: Adapter, folder: Path) -> str | None:
    """Where an adapter is: a Hub id, or a folder as seen from the records'; None of one in memory."""
    path = Path(adapter.source).expanduser()
    if path.is_dir():
        return os.path.relpath(path.resolve(), folder.resolve())
    return adapter.source if "of a live model" not in adapter.source else None


def _provenance(base: Any) -> dict[str, Any]:
    return {
        "base": base if isinstance(base, str) else None,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("rsoups", "transformers", "peft", "torch")},
    }
