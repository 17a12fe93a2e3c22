"""Sweep λ: generate at every λ, score with every reward, and write one record for each response.

A record is one line of JSON:

- ``name, lambdas, method``: the model: ``soup`` with its λ by ingredient, ``base``, ``ensemble``, or another adapter's name;
- ``prompt, sample, seed``: the prompt, the number of the response to it (0, 1, ...), and the sweep's seed;
- ``response, rewards``: the part of the response that rewards see, and the score of each reward (null if the reward abstains;
  ``abstained`` then names it);
- ``tokens, kl, base_nll``: of the whole response: the number of its tokens (the one that ends it included),
  Σ log p - log p_base at the sampling temperature (k1; at temperature 1 if greedy), and Σ -log p_base at temperature 1, both in
  nats. The base's perplexity is exp(base_nll / tokens).

Everything after it (fronts, plots, reports, the choice of λ) is a function of the records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups.common.errors import DatasetError
from rsoups.common.files import only_run_in, read_jsonl
from rsoups.fronts.front import Front
from rsoups.generation.decoding import Prompt
from rsoups.soups.live import LiveSoup
from rsoups.sweeps.plan import plan_of
from rsoups.sweeps.records import prepare
from rsoups.sweeps.run import Processes, Worker
from rsoups.sweeps.settings import SweepSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sweep(
    base: str | PreTrainedModel | LiveSoup | None,
    adapters: Mapping[str, Any] | None,
    rewards: Mapping[str, Callable[..., Any]],
    prompts: Sequence[Prompt],
    lambdas: Sequence[Sequence[float]] | None = None,
    settings: SweepSettings | None = None,
    *,
    others: Mapping[str, Any] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    held_out: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    notes: Mapping[str, Any] | None = None,
    out: str | Path = "records.jsonl",
    progress: bool = True,
    **changes: Any,
) -> Front:
    """Evaluate every soup on every prompt with every reward.

    One copy of the base is loaded. Soups, base and other adapters share its batches, and each row has its own λ. The random
    numbers of a response depend on the seed, its prompt and its sample alone. With other batches, processes or interruptions
    the texts are the same, and KL and scores are the same up to rounding. Under `accelerate launch`, processes share the work.
    If `out` holds records of the same sweep, only the missing ones are generated, on a base with the same weights.

    Args:
        base: Model, folder, Hub id or ``rsoups/...``; or a LiveSoup, whose adapters are the ingredients. None means the base
            that the adapters name.
        adapters: Ingredients by name (folders, Hub ids, read Adapters); None with a LiveSoup.
        rewards: Rewards by name, each ``(prompts, responses, **columns) -> floats``, with or without columns. Equal responses
            of several models to a prompt are scored once.
        prompts: Prompts for the policy, all different: texts, or messages for the tokenizer's chat template.
        lambdas: K × N interpolation weights, in the order of `adapters`; ``simplex(N)`` by default.
        settings: Settings of the generation; ``SweepSettings()`` by default.
        others: Further adapters by name (MORL runs, say), which are evaluated like the soups.
        columns: One value for each prompt, by name, which rewards receive (``references``, say).
        held_out: Names of the rewards that no ingredient was trained on, for the report.
        tokenizer: Tokenizer of the policy; that of the base by default.
        notes: Further entries for the settings file beside the records.
        out: Records file.
        progress: Show a progress bar.
        changes: Fields of `SweepSettings` by name, which replace those of `settings`: ``temperature=0``, say.

    Returns:
        The front of all records.

    Raises:
        SettingsError: A setting is out of its range, or the client of a server is not installed.
        DatasetError: No prompts, equal prompts, a prompt without a question, prompts that are too long or that an adapter was
            trained on, adapters that were trained with different chat_template_kwargs, or responses that are all empty.
        AdapterError, LambdasError: As in `interpolate`; no λ; a taken name among `others`; no base, or adapters that name
            several.
        RewardError: No rewards, a reward that raises, or a score that is not finite.
        ServerError: The server refuses, or it cannot be reached.
        OutputError: `out` holds records of another sweep or base, another process writes them, or they cannot be written.
    """
    settings = replace(settings or SweepSettings(), **changes)
    plan = plan_of(base, adapters, rewards, prompts, lambdas, settings, others, columns, held_out, tokenizer, notes)
    path, processes = Path(out), Processes()
    with (
        only_run_in(path.parent) if processes.is_main else nullcontext(),
        Worker(plan, path, processes, progress) as worker,
    ):
        if processes.is_main:
            prepare(path, plan.file_settings(path.parent))
        worker.run()

    if not any(record["response"] for record in read_jsonl(path)):
        raise DatasetError(
            f"all responses in {path} are empty: the model ends its responses at once, or `cut` leaves nothing of them"
        )
    return Front.from_jsonl(path)
