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

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.adapters.adapter import Adapter, read_adapter
from rsoups.bases.compatibility import check_one_base
from rsoups.bases.names import check_base
from rsoups.common.errors import AdapterError, LambdasError, RewardError
from rsoups.common.files import only_run_in
from rsoups.data.training_data import check_trained, manifests_of
from rsoups.fronts.front import Front
from rsoups.fronts.grids import simplex
from rsoups.fronts.points import BASE, SOUP
from rsoups.generation.decoding import Prompt
from rsoups.soups.lambdas import weights_of
from rsoups.soups.live import LiveSoup
from rsoups.sweeps.generation import Base, Generator
from rsoups.sweeps.items import Model
from rsoups.sweeps.records import pin, prepare
from rsoups.sweeps.vllm_server import Server

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rsoups.sweeps.run import (
    ENSEMBLE,
    Asked,
    Processes,
    Run,
    check_texts,
    digest,
    provenance,
    source_of,
    template_of,
    trained_on,
)

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
        server: URL of a running vLLM server of this base, which answers instead; records then have
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
    template = template_of(chat_template_kwargs, manifests, prompts)
    asked = Asked.of(prompts, columns, opened, max_new_tokens, long_prompts, template)
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
        "prompts": digest(asked.prompts),
        "columns": digest(asked.columns),
        "server": server is not None,
        "cut": getattr(cut, "__qualname__", type(cut).__name__),
    }
    about: dict[str, Any] = {
        "held_out": list(held_out),
        "samples": samples,
        "method": method,
        "base_mismatch_allowed": allowed,
    }
    about |= {**provenance(base), **(notes or {})}
    if template:
        settings["chat_template_kwargs"] = template
    for name, sources in (("adapters", ingredients), ("others", beside)):
        about[name] = {key: source_of(source, Path(out).parent) for key, source in sources.items()}
    goals = {name: trained_on(found) for name, found in manifests.items()}
    about["trained_on"] = {name: weights for name, weights in goals.items() if weights}
    about["trained_prompts"] = trained
    processes = Processes()
    run = Run(models, asked, rewards, cut, samples, seed, Path(out), processes, progress)

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
    check_texts(Path(out))
    return Front.from_jsonl(out)


def _ingredients(live: LiveSoup | None, adapters: Mapping[str, Any] | None) -> dict[str, Adapter]:
    if live is not None:
        if adapters is not None and list(adapters) != live.names:
            raise LambdasError(f"the LiveSoup is of {live.names}, the adapters are {list(adapters)}: leave them out")
        return dict(live.adapters)
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
