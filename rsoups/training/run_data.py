"""Prompts of an RL run: what the policy reads, what is held out, and the columns that rewards read."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, RLOOConfig

from rsoups.data.datasets import train_and_held_out
from rsoups.data.prompts import fit_prompts, with_prefixes
from rsoups.data.tasks import columns_of
from rsoups.generation.decoding import encode
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


def prompt_datasets(
    train: dict[str, list], held_out: dict[str, list]
) -> tuple[Dataset | None, Dataset | None, dict[str, list]]:
    """Datasets of prompts and places, and the other columns of all rows.

    Arrow would change the values of other columns (one type for all rows, one set of keys for all dicts). So a row of the
    dataset holds a place only, and `reward_function` finds the row's values there.

    Args:
        train, held_out: Columns, as `read_prompts` gives them.

    Returns:
        The train dataset, the held-out one, each None without rows; and the columns, train rows first.
    """
    count = len(train["prompt"])
    held_out_prompts = held_out.get("prompt", [])
    total = count + len(held_out_prompts)
    datasets = (
        Dataset.from_dict({"prompt": train["prompt"], PLACE: [*range(count)]}) if count else None,
        Dataset.from_dict({"prompt": held_out_prompts, PLACE: [*range(count, total)]}) if held_out_prompts else None,
    )
    absent = [None] * len(held_out_prompts)
    columns = {name: [*train[name], *held_out.get(name, absent)] for name in train if name != "prompt"}
    return *datasets, columns
