"""Commands: tasks, preview."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsoups.data.tasks import Task


TEMPLATE_HELP = "JSON object: variables of the chat template, as in training"


def task_of_arguments(args: argparse.Namespace) -> Task:
    from rsoups.data.tasks import find_task

    return find_task(args.task, args.dataset, args.template)


def tasks(args: argparse.Namespace) -> None:
    from rsoups.data.tasks import TASKS

    for task in TASKS.values():
        rows = "".join(f", {most:,} rows of {split}" for split, most in task.most.items())
        print(
            f"{task.name:10} {task.dataset:34} {', '.join(task.columns)}; rewards see: {task.cut.__name__.strip('_')}{rows}"
        )
    print(f"{'custom':10} {'any: --dataset':34} prompt, or the columns of a --template")


def preview(args: argparse.Namespace) -> None:
    from itertools import islice

    from transformers import AutoTokenizer

    from rsoups.common.assets import resolve
    from rsoups.data.datasets import is_table, part_of, raw_rows
    from rsoups.data.prompts import template_kwargs
    from rsoups.data.tasks import columns_of
    from rsoups.generation.decoding import encode
    from rsoups.rewards.interface import check_columns, columns_read
    from rsoups.rewards.load import load_reward

    task = task_of_arguments(args)
    one_file = is_table(task, args.dataset)
    raw = list(islice(raw_rows(task, args.dataset, args.split), None if one_file else args.rows))
    reward = load_reward(args.reward) if args.reward else None
    rows = task.rows(raw, kept=columns_read([reward]))
    print(f"{len(rows)} of the first {len(raw)} rows kept, {len(raw) - len(rows)} dropped")
    if one_file:
        rows = part_of(rows, args.split, str(args.dataset or task.dataset))
        print(f"{len(rows)} of them are the split {args.split!r}")
    if reward is not None:
        check_columns([reward], columns_of(rows))

    tokenizer = AutoTokenizer.from_pretrained(resolve(args.tokenizer))
    template = template_kwargs(args.chat_template_kwargs)
    for row in rows[:5]:
        ids = encode(tokenizer, row["prompt"], template)
        text = row["prompt"] if isinstance(row["prompt"], str) else tokenizer.decode(ids)
        print(f"\n[{len(ids)} tokens] {text}")
        if row["references"]:
            _preview_reference(row, task, reward)


def _preview_reference(row: dict[str, Any], task: Task, reward: Any) -> None:
    """The first reference of a row, and what a reward reads of it and makes of it."""
    from rsoups.rewards.classifier import Reward

    said = task.cut(row["references"][0])
    print(f"  reference: {said}")
    if isinstance(reward, Reward):
        found = reward.explain(row["prompt"], said)
        print(f"  {reward.name} reads: {found['text']}\n  and scores it {found['score']:.4g}")
    elif reward is not None:
        columns = {name: [row[name]] for name in reward.columns if name in row}
        (score,) = reward([row["prompt"]], [said], **columns)
        print(f"  {reward.name} scores it {'None' if score is None else format(score, '.4g')}")
