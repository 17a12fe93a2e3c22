"""Average reward models of one start (WARM, Ramé et al. 2024, arXiv 2401.12187), beside their prediction ensemble.

    python recipes/warm.py --start rsoups/coverage --dataset runs/embedded/naturalness_train.jsonl.gz \\
        --eval_dataset runs/embedded/naturalness_test.jsonl.gz --out runs/warm

How this differs from the paper: the models have under a million parameters, and their start learned from pairs of another kind,
not from text.

M runs of recipes/reward_model.py from one start, on the same pairs. A share of the pairs has its labels swapped. Each run has
its own seed (order of the pairs) and learning rate. Then the average of their weights (`rsoups.interpolate_checkpoints`),
models on the line between the first two, and the mean of all scores: the ensemble, which costs M models at every use.
Writes accuracies on held-out pairs, on the same pairs misspelled, and on the swapped train pairs, to results.json, report.md
and warm.png. Accuracy on the swapped pairs is by their true labels: a model is wrong where it memorized the swapped ones. A
second run continues an interrupted one.
"""

import argparse
import json
import os
import random
from pathlib import Path

import numpy as np

import rsoups
from rsoups.common.errors import in_one_line
from rsoups.common.files import read_jsonl
from rsoups.fronts.estimates import Estimate, resampling
from rsoups.fronts.points import estimates_of
from rsoups.reports.plots import add_legend, bars, new_figure, style
from rsoups.training.configs import config_path
from rsoups.training.launch import QUIET, Run, train_all

CONFIG = config_path("embedded-naturalness")
LEARNING_RATES = (0.5, 0.7, 1.0)  # mild factors, drawn for each run
LINE = (0.0, 0.25, 0.5, 0.75, 1.0)  # λ of the second run


def swapped(rows: list[dict], share: float, seed: int) -> list[dict]:
    """The pairs, a `share` of them with chosen and rejected exchanged and `swapped` true."""
    hit = set(random.Random(seed).sample(range(len(rows)), k=round(share * len(rows))))
    exchanged = ({**row, "chosen": row["rejected"], "rejected": row["chosen"], "swapped": True} for row in rows)
    return [other if i in hit else row for i, (row, other) in enumerate(zip(rows, exchanged, strict=True))]


def misspelt(text: str, draw: random.Random, share: float = 0.3) -> str:
    """A `share` of the words of four letters and more with two neighboring inner letters exchanged."""
    words = text.split()
    for i, word in enumerate(words):
        if len(word) >= 4 and draw.random() < share:
            at = draw.randrange(1, len(word) - 2)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def test_sets(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Pairs with their true labels."""
    held_out, draw = read_jsonl(args.eval_dataset), random.Random(args.seed)
    noisy = [row | {side: misspelt(row[side], draw) for side in ("chosen", "rejected")} for row in held_out]
    wrong = [row for row in read_jsonl(args.out / "train.jsonl") if row.get("swapped")]
    right = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in wrong]
    return {"held-out": held_out, "held-out, misspelt": noisy} | ({"swapped train pairs": right} if right else {})


def margins(model: Path, sets: dict[str, list[dict]]) -> dict[str, np.ndarray]:
    """Score of the chosen less score of the rejected, for each pair of each set."""
    reward = rsoups.Reward(rsoups.RewardCard(name=model.name, model=str(model), max_length=128))

    def scores(rows: list[dict], side: str) -> np.ndarray:
        return np.array(reward([row["prompt"] for row in rows], [row[side] for row in rows]))

    return {name: scores(rows, "chosen") - scores(rows, "rejected") for name, rows in sets.items()}


def accuracies(found: dict[str, dict[str, np.ndarray]], members: list[str], seed: int) -> dict:
    """Share of pairs in the right order, of each model, their ensemble and their mean, with 95% bootstrap intervals."""
    results = {}
    for name in next(iter(found.values())):
        right = {model: (by_set[name] > 0).astype(float) for model, by_set in found.items()}
        right["ensemble"] = (np.mean([found[m][name] for m in members], axis=0) > 0).astype(float)
        right["mean of the members"] = np.mean([right[m] for m in members], axis=0)
        right["average less the members' mean"] = right["average"] - right["mean of the members"]
        right["average less the ensemble"] = right["average"] - right["ensemble"]
        values = np.stack(list(right.values()), axis=1)
        estimates = estimates_of(values, list(right), resampling(len(values), seed))
        results[name] = {model: [e.value, e.low, e.high] for model, e in estimates.items()}
    return results


def table(results: dict) -> str:
    lines = ["| model | " + " | ".join(results) + " |", "| --- |" + " ---: |" * len(results)]
    for model in next(iter(results.values())):
        cells = [str(Estimate(*results[name][model])) for name in results]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, members: list[str], line: list[str], path: Path) -> None:
    """Left: each model on each set of pairs. Right: held-out accuracy on the line between two runs, and the chord."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for at, by_model in enumerate(results.values()):
        left.plot(
            [at - 0.2] * len(members), [by_model[m][0] for m in members], "o", color="#777777", label="single runs"
        )
        for shift, model, color, marker in ((0, "average", "#0072B2", "D"), (0.2, "ensemble", "#D55E00", "s")):
            label, yerr = f"{model} of {len(members)}", bars([Estimate(*by_model[model])])
            left.errorbar(at + shift, by_model[model][0], yerr=yerr, fmt=marker, color=color, label=label)
    left.set_xticks(range(len(results)), results)
    left.set_ylabel("pairs in the right order")
    left.set_title("bars: 95% bootstrap over pairs", fontsize=9, color="#777777", loc="left")
    held_out = [results["held-out"][model] for model in line]
    right.fill_between(LINE, [v[1] for v in held_out], [v[2] for v in held_out], color="#0072B2", alpha=0.15)
    right.plot(LINE, [v[0] for v in held_out], "o-", color="#0072B2", label="averages")
    right.plot([0, 1], [held_out[0][0], held_out[-1][0]], "--", color="#777777", label="chord")
    right.set_xlabel(f"λ of {line[-1]}, the rest is {line[0]}")
    right.set_ylabel("held-out pairs in the right order")
    for axes in (left, right):
        add_legend(axes)
        style(axes)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--start", default="rsoups/coverage", help="sequence classifier that all runs start from")
    parser.add_argument("--dataset", type=Path, required=True, help="train pairs: prompt, chosen, rejected")
    parser.add_argument("--eval_dataset", type=Path, required=True, help="held-out pairs")
    parser.add_argument("--config", type=Path, default=CONFIG, help="config of reward_model.py")
    parser.add_argument("--runs", type=int, default=4, help="number of reward models")
    parser.add_argument("--swapped", type=float, default=0.25, help="share of train pairs with their labels swapped")
    parser.add_argument(
        "--learning_rate", type=float, default=5e-4, help="highest learning rate; each run draws a factor of 0.5 to 1"
    )
    parser.add_argument("--epochs", type=float, default=4, help="epochs of each run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the swaps, the misspellings and the bootstrap")
    parser.add_argument("--out", type=Path, default=Path("runs/warm"), help="output folder")
    args = parser.parse_args()
    os.environ |= QUIET

    args.out.mkdir(parents=True, exist_ok=True)
    pairs = swapped(read_jsonl(args.dataset), args.swapped, args.seed)
    (args.out / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), "utf-8")
    members = [f"run-{seed}" for seed in range(args.runs)]
    runs = []
    for seed, name in enumerate(members):
        rate = args.learning_rate * random.Random(f"{args.seed} {seed}").choice(LEARNING_RATES)
        flags = ["--config", args.config, "--model_name_or_path", args.start, "--dataset", args.out / "train.jsonl"]
        flags += ["--eval_dataset", args.eval_dataset, "--learning_rate", f"{rate:g}", "--seed", seed]
        flags += ["--num_train_epochs", args.epochs]
        runs.append(Run(f"{name}, learning rate {rate:g}", args.out / name, [str(flag) for flag in flags]))
    train_all(runs, "reward_model.py")

    folders = [args.out / name for name in members]
    rsoups.interpolate_checkpoints(folders, None, args.out / "average")
    line = [members[0], *(f"line-{weight:g}" for weight in LINE[1:-1]), members[1]]
    for weight, name in zip(LINE[1:-1], line[1:-1], strict=True):
        rsoups.interpolate_checkpoints(folders[:2], [1 - weight, weight], args.out / name)
    sets = test_sets(args)
    found = {name: margins(args.out / name, sets) for name in (*members, "average", *line[1:-1])}
    results = accuracies(found, members, args.seed)
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    (args.out / "report.md").write_text(table(results) + "\n", "utf-8")
    draw(results, members, line, args.out / "warm.png")
    print(table(results))


if __name__ == "__main__":
    with in_one_line():
        main()
