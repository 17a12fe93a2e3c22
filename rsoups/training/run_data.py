"""Prompts of an RL run: what the policy reads, what is held out, and the columns that rewards read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, RLOOConfig

from rsoups.data.datasets import train_and_held_out
from rsoups.data.prompts import fit_prompts, with_prefixes
from rsoups.data.tasks import columns_of
from rsoups.generation.decoding import encode
from rsoups.rewards.interface import check_columns, columns_read
from rsoups.training.run_arguments import RunArguments
from rsoups.training.trl_rewards import PLACE

ASKED = "prompt without prefix"  # column: a prompt without the words of a reference that --prefix_tokens puts after it


def read_prompts(
    run: RunArguments, training: GRPOConfig | RLOOConfig, tokenizer: Any, room: int, columns: Collection[str] = ()
) -> tuple[dict[str, list], dict[str, list]]:
    """Columns of the train rows and of the held-out rows: `prompt`, `references` if the data has any, and others.

    Args:
        run: Task, dataset, prefixes, number of held-out prompts.
        training: Seed of the prefixes, and variables of the chat template.
        tokenizer: The policy's.
        room: Longest prompt, in tokens.
        columns: Names of the columns that rewards read.

    Raises:
        DatasetError: A prompt is too long and may not be dropped; or as `train_and_held_out`.
    """
    train, held_out = train_and_held_out(run.find_task(), run.dataset, run.eval_prompts, columns)
    options = (run, training, tokenizer, room)
    return _fitting(train, "train", *options), _fitting(held_out, "held-out", *options)


def _fitting(
    rows: list[dict], split: str, run: RunArguments, training: Any, tokenizer: Any, room: int
) -> dict[str, list]:
    """Columns of the rows whose prompts fit, with the first words of a reference where the run asks for them."""
    if run.prefix_tokens:
        token_ids = partial(tokenizer.encode, add_special_tokens=False)
        fewest, most = run.prefix_tokens
        prompts = with_prefixes(rows, token_ids, tokenizer.decode, fewest, most, seed=training.seed)
        rows = [row | {"prompt": prompt, ASKED: row["prompt"]} for row, prompt in zip(rows, prompts, strict=True)]
    lengths = [len(encode(tokenizer, row["prompt"], training.chat_template_kwargs)) for row in rows]
    fitting = fit_prompts(rows, lengths, room, run.long_prompts) if rows else []
    if len(fitting) < len(rows):
        print(f"{len(rows) - len(fitting)} of {len(rows)} {split} prompts dropped: longer than {room} tokens")
    return columns_of(fitting)


@dataclass(frozen=True)
class RunData:
    """The rows of a run.

    Attributes:
        train, held_out: Datasets of prompts and places; None without rows.
        columns: The other columns by name, train rows first; `reward_function` finds a row's values by its place.
        prompts: Train prompts.
        unprefixed: Train prompts without the prefixes of responses.
        held_out_prompts: Held-out prompts.
    """

    train: Dataset | None
    held_out: Dataset | None
    columns: dict[str, list]
    prompts: list
    unprefixed: list
    held_out_prompts: list


def run_data(
    run: RunArguments, training: GRPOConfig | RLOOConfig, tokenizer: Any, room: int, rewards: Sequence[Any]
) -> RunData:
    """Read the rows of a run, as `read_prompts`, with the columns that the rewards read.

    Arrow would change the values of other columns (one type for all rows, one set of keys for all dicts). So a row of a
    dataset holds its prompt and its place only.

    Raises:
        RewardError: A reward reads a column that the dataset lacks.
    """
    train, held_out = read_prompts(run, training, tokenizer, room, columns_read(rewards))
    for columns in filter(None, (train, held_out)):
        check_columns(rewards, columns)
    unprefixed = train.pop(ASKED, train["prompt"])

    prompts, held_out_prompts = train.pop("prompt"), held_out.get("prompt", [])
    absent = [None] * len(held_out_prompts)
    return RunData(
        train=_dataset(prompts, first=0),
        held_out=_dataset(held_out_prompts, first=len(prompts)),
        columns={name: [*values, *held_out.get(name, absent)] for name, values in train.items()},
        prompts=prompts,
        unprefixed=unprefixed,
        held_out_prompts=held_out_prompts,
    )


def _dataset(prompts: list, first: int) -> Dataset | None:
    places = [*range(first, first + len(prompts))]
    return Dataset.from_dict({"prompt": prompts, PLACE: places}) if prompts else None
