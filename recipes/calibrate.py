"""Mean and deviation of rewards on a dataset's reference responses, so that rewards of unlike scales can be mixed and compared.

    python recipes/calibrate.py --reward deberta-v3-base electra-large --task assistant --dataset rows.jsonl --out rewards/mine
    python recipes/calibrate.py --reward rouge-l meteor --task concepts --dataset rows.jsonl --policy my/base --out rewards/mine
    python recipes/calibrate.py --reward cider --arguments corpus=rows.jsonl column=sentences ...
    accelerate launch recipes/ppo_reward.py --reward rewards/mine/deberta-v3-base.yaml rewards/mine/electra-large.yaml \\
        --reward_weights .5 .5 ...

Writes a copy of each card with its mean, its std and what they were measured on. By that card the references score 0 on
average with a deviation of 1. With `--policy`, that model's own samples do: PPO on each reward then starts at 0, and one KL
coefficient means the same for all. How this differs from the paper: that adds raw logits up, so a reward of twice the scale has
twice the weight.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from rsoups import RewardError, load_reward  # isort: skip  (before torch)

import torch
import yaml

from rsoups.common.errors import in_one_line
from rsoups.data.datasets import load_rows
from rsoups.data.prompts import template_kwargs
from rsoups.data.tasks import TASKS, Task, columns_of, find_task
from rsoups.generation.respond import texts_of_policy
from rsoups.rewards.interface import check_columns, columns_read, rewards_by_name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESPONSE = "response that is scored"  # key of a row, beside the dataset's columns


def of_people(rows: list[dict], task: Task, compared: bool) -> list[dict]:
    """The first reference of each row as its response; where it is compared with references, with the row's others."""
    least = 2 if compared else 1
    return [
        row | {RESPONSE: task.cut(row["references"][0]), "references": row["references"][1:]}
        for row in rows
        if len(row["references"]) >= least
    ]


def of_policy(rows: list[dict], task: Task, policy: str, **settings: Any) -> list[dict]:
    """A sample of the policy as the response of each row, as a sweep would draw it."""
    said = texts_of_policy(policy, [row["prompt"] for row in rows], device=DEVICE, **settings)
    return [row | {RESPONSE: task.cut(text)} for row, text in zip(rows, said, strict=True)]


def calibrated(reward: Any, rows: list[dict], measured_on: str) -> dict:
    """The card's fields with a mean and std of the rows' responses' raw scores.

    Raises:
        RewardError: Too few responses, a column is missing, or scores that are all the same.
    """
    if len(rows) < 2:
        raise RewardError(f"reward {reward.name!r}: {len(rows)} {measured_on}, a deviation needs two at least")
    columns = columns_of(rows)
    check_columns([reward], columns)
    card, prompts, responses = reward.card, columns.pop("prompt"), columns.pop(RESPONSE)
    raw = [score * card.std + card.mean for score in reward(prompts, responses, **columns) if score is not None]
    raw = [round(score, 12) for score in raw]  # what scaling leaves of equal scores is no deviation
    mean, std = fmean(raw), pstdev(raw)
    if not std:
        raise RewardError(f"reward {card.name!r} gives all {len(rows)} {measured_on} the same score, {mean}")
    changed = {f.name: value for f in fields(card) if (value := getattr(card, f.name)) not in (f.default, {})}
    return changed | {"mean": mean, "std": std, "calibration": f"{len(rows):,} {measured_on}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--reward", nargs="+", required=True, help="reward cards, by name or path")
    parser.add_argument(
        "--arguments",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of a function, over those of its card",
    )
    parser.add_argument(
        "--task",
        required=True,
        choices=[*sorted(TASKS), "custom"],
        help="task of the dataset; custom takes the prompts from the dataset",
    )
    parser.add_argument("--dataset", help="file, folder or Hub id; the task's own dataset if unset")
    parser.add_argument("--template", help="template of a custom task's prompts")
    parser.add_argument(
        "--split", default="train", choices=("train", "test", "all"), help="split; all is every row of a single file"
    )
    parser.add_argument("--rows", type=int, default=1024, help="number of rows that are scored")
    parser.add_argument("--policy", help="model whose samples are scored; the references if unset")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of the policy's samples")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="longest sample, in tokens")
    parser.add_argument(
        "--chat_template_kwargs", help="variables of the policy's chat template, a JSON object, as in training"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the new cards")
    args = parser.parse_args()
    task = find_task(args.task, args.dataset, args.template)
    arguments = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.arguments)}
    named = rewards_by_name({name: load_reward(name, DEVICE, **arguments) for name in args.reward})
    rewards = list(named.values())  # each becomes a card of its name
    if bare := [reward.name for reward in rewards if getattr(reward, "card", None) is None]:
        raise RewardError(f"{bare} are functions without a card: scale them yourself")
    rows = load_rows(task, args.dataset, args.split, args.rows, columns_read(rewards))
    place = f"{args.task}, {Path(args.dataset or task.dataset).name}, {args.split}"
    if args.policy:
        measured_on = f"samples of {args.policy} at temperature {args.temperature:g} for the prompts of {place}"
        settings = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        rows = of_policy(rows, task, args.policy, template=template_kwargs(args.chat_template_kwargs), **settings)
    args.out.mkdir(parents=True, exist_ok=True)
    for reward in rewards:
        if args.policy:
            card = calibrated(reward, rows, measured_on)
        else:
            compared = "references" in columns_read([reward])
            others = ", each against the row's others" if compared else ""
            card = calibrated(reward, of_people(rows, task, compared), f"reference responses of {place}{others}")
        path = args.out / f"{reward.name}.yaml"
        path.write_text(yaml.safe_dump(card, sort_keys=False, allow_unicode=True), "utf-8")
        print(f"{path}: mean {card['mean']:.4g}, std {card['std']:.4g}")


if __name__ == "__main__":
    with in_one_line():
        main()
