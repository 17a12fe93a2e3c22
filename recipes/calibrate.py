"""Mean and deviation of rewards on a dataset's reference responses, so that rewards of unlike scales can be mixed and compared.

    python recipes/calibrate.py --reward deberta-v3-base electra-large --task assistant --dataset rows.jsonl --out rewards/mine
    accelerate launch recipes/ppo_reward.py --reward rewards/mine/deberta-v3-base.yaml rewards/mine/electra-large.yaml \\
        --reward_weights .5 .5 ...

Writes a copy of each card with its mean, its std and what they were measured on: with it, the references score 0 on average
with a deviation of 1. (The paper adds raw logits up: a reward of twice the scale has twice the weight.)
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, pstdev

import torch
import yaml

from rsoups import Reward, RewardError, load_reward
from rsoups._resources import load_rows
from rsoups.tasks import TASKS, Task, custom_task


def calibrated(reward: Reward, rows: list[dict], task: Task, measured_on: str) -> dict:
    """The card's fields with a mean and std of the responses' raw scores.

    Raises:
        RewardError: No references, or scores that are all the same.
    """
    pairs = [(row["prompt"], task.cut(text)) for row in rows for text in row["references"][:1]]
    if len(pairs) < 2:
        raise RewardError(f"{measured_on}: {len(pairs)} reference responses, a deviation needs two at least")
    card = reward.card
    raw = [score * card.std + card.mean for score in reward(*map(list, zip(*pairs, strict=True)))]
    mean, std = fmean(raw), pstdev(raw)
    if not std:
        raise RewardError(f"reward {card.name!r} gives all {len(pairs)} references the same score, {mean}")
    fields = {key: value for key, value in asdict(card).items() if value not in (None, "")}
    return fields | {"mean": mean, "std": std, "calibration": f"{len(pairs):,} reference responses of {measured_on}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", nargs="+", required=True, help="cards, by name or path")
    parser.add_argument("--task", required=True, choices=[*sorted(TASKS), "custom"])
    parser.add_argument("--dataset", help="file, folder or Hub id; the task's own if left out")
    parser.add_argument("--template", help="of a custom task's prompts")
    parser.add_argument("--split", default="train", choices=("train", "test"))
    parser.add_argument("--rows", type=int, default=1024, help="how many of them are scored")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new cards")
    args = parser.parse_args()
    task = custom_task(args.dataset, args.template) if args.task == "custom" else TASKS[args.task]
    rows = load_rows(task, args.dataset, args.split, args.rows)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.reward:
        reward = load_reward(name, "cuda" if torch.cuda.is_available() else "cpu")
        if not isinstance(reward, Reward):
            raise RewardError(f"{name} is a function: scale it yourself")
        card = calibrated(reward, rows, task, f"{args.task}, {Path(args.dataset or task.dataset).name}, {args.split}")
        path = args.out / f"{reward.name}.yaml"
        path.write_text(yaml.safe_dump(card, sort_keys=False, allow_unicode=True), "utf-8")
        print(f"{path}: mean {card['mean']:.4g}, std {card['std']:.4g}")


if __name__ == "__main__":
    main()
