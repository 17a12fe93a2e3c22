"""Captioning's statistical rewards on the embedded policy: one PPO run for each, soups of two, and the uniform soup of all.

    python recipes/captioning.py --train train.jsonl.gz --test dev.jsonl.gz --out runs/captioning

The data are rows of `concepts` and `sentences` (CommonGen's, say; none ships with rsoups). The experiments are those of
rewarded soups on image captions, BLEU-1 against ROUGE and BLEU-1, ROUGE, METEOR and CIDEr together, on sentences that use given
words. How this differs from the paper: a text of given words instead of an image's caption, and PPO instead of self-critical
training. ROUGE is ROUGE-L's recall, since BLEU-1 is a precision. Cards are calibrated on the base's samples, so that one KL
coefficient means the same for all; figures are in the metrics' own units. Writes to --out:

    cards/          the calibrated rewards; CIDEr's document frequencies are those of the train rows
    ppo-REWARD/     the adapters
    front/, all/    records and report: 11 soups of the BLEU-1 and ROUGE runs; the four runs and their uniform soup

A step that has finished is not run again. About half an hour on two CPU cores.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import rsoups
from rsoups.common.assets import shipped
from rsoups.common.errors import in_one_line
from rsoups.common.files import read_jsonl
from rsoups.data.tasks import TASKS
from rsoups.training.launch import QUIET, Run, run_step, train_all

REWARDS = ("bleu-1", "rouge-l-recall", "meteor", "cider")
POLICY, TASK = "rsoups/tiny-llama", TASKS["concepts"]
SAMPLING: dict[str, Any] = {"temperature": 0.7, "max_new_tokens": 24}  # as trained: recipes/configs/embedded.yaml


def prepare(train: Path, test: Path, out: Path, least: int) -> None:
    """Both splits in one folder; train rows with so many references only: with one, a good response often finds no match."""
    out.mkdir(parents=True, exist_ok=True)
    for name, path, references in (("train", train, least), ("test", test, 1)):
        rows = [row for row in read_jsonl(path) if len(row["sentences"]) >= references]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        print(f"{len(rows):,} {name} rows with {references} references or more")


def calibrate(data: Path, out: Path) -> None:
    flags = ["--task", "concepts", "--dataset", str(data), "--policy", POLICY, "--out", str(out)]
    flags += [text for name, value in SAMPLING.items() for text in (f"--{name}", str(value))]
    cider = ["--arguments", f"corpus={data / 'train.jsonl'}", "column=sentences"]
    for names, more in ((REWARDS[:3], []), (REWARDS[3:], cider)):
        command = [str(shipped("recipes") / "calibrate.py"), "--reward", *names, *more, *flags]
        run_step(f"Calibrate {', '.join(names)}", command)


def evaluate(
    out: Path, runs: list[str], lambdas: list[list[float]] | None, references: dict[str, list[str]], seed: int
) -> None:
    """Soups of some runs, and the base, by the rewards of those runs in their own units; records and report in `out`."""
    corpus: dict[str, Any] = {"corpus": str(out.parent / "data" / "train.jsonl"), "column": "sentences"}
    rewards = {name: rsoups.load_reward(name, **(corpus if name == "cider" else {})) for name in runs}
    front = rsoups.sweep(
        POLICY,
        {name: out.parent / f"ppo-{name}" for name in runs},
        rewards,
        list(references),
        lambdas,
        columns={"references": list(references.values())},
        cut=TASK.cut,
        seed=seed,
        out=out / "records.jsonl",
        **SAMPLING,
    )
    rsoups.write_report(front, read_jsonl(out / "records.jsonl"), out)
    print(front.to_markdown())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help="JSON lines of concepts and sentences")
    parser.add_argument("--test", type=Path, required=True, help="held-out rows of the same form")
    parser.add_argument("--references", type=int, default=3, help="fewest references of a train row")
    parser.add_argument("--kl_coef", type=float, default=0.02, help="KL coefficient of the PPO runs")
    parser.add_argument("--rollouts", type=int, default=60, help="rollouts of 64 responses in each run")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts of the evaluations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs and of the evaluations")
    parser.add_argument("--out", type=Path, default=Path("runs/captioning"), help="output folder")
    args = parser.parse_args()
    os.environ |= QUIET
    data, cards = args.out / "data", args.out / "cards"
    if not (data / "test.jsonl").exists():
        prepare(args.train, args.test, data, args.references)
    if not all((cards / f"{name}.yaml").exists() for name in REWARDS):
        calibrate(data, cards)
    flags = ["--dataset", str(data), "--seed", str(args.seed), "--kl_coef", str(args.kl_coef)]
    flags += ["--max_steps", str(4 * args.rollouts)]
    train_all(
        [
            Run(f"PPO on {name}", args.out / f"ppo-{name}", ["--reward", str(cards / f"{name}.yaml"), *flags])
            for name in REWARDS
        ]
    )

    rows = TASK.rows(read_jsonl(data / "test.jsonl"))
    references = {row["prompt"]: row["references"] for row in rows[: args.prompts]}
    evaluate(args.out / "front", list(REWARDS[:2]), None, references, args.seed)
    alone = [[float(i == j) for j in range(4)] for i in range(4)]
    evaluate(args.out / "all", list(REWARDS), [*alone, [0.25] * 4], references, args.seed)


if __name__ == "__main__":
    with in_one_line():
        main()
