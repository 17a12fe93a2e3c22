"""The whole recipe, offline, on the embedded models: PPO for each reward, MORL, soups, front, report.

    make demo
    rsoups demo --out demo --seed 0

Each step is the command that it prints. A step that has finished is not run again: after an interruption, run the demo once
more and it continues. It differs from the paper in its size: a policy of 4 million parameters, reward models of one.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import rsoups
from rsoups.common.errors import in_one_line
from rsoups.training.launch import QUIET, Run, run_step, train_all

REWARDS = ("naturalness", "coverage")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="rsoups demo",
        description=__doc__.splitlines()[0],
        epilog="Example: rsoups demo --out demo --seed 1",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that the demo makes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the PPO runs and of the evaluation")
    args = parser.parse_args()
    os.environ |= QUIET | {"HF_HUB_OFFLINE": "1"}
    out, seed = args.out, ["--seed", str(args.seed)]
    started = time.monotonic()

    # 1 to 3. One PPO run for each reward, and one for their mean.
    runs = [
        Run(f"{number}/5  PPO on {reward}", out / f"ppo-{reward}", ["--reward", reward, *seed])
        for number, reward in enumerate(REWARDS, 1)
    ]
    weights = ["--reward_weights", "0.5", "0.5"]
    runs.append(Run("3/5  MORL: both at once", out / "morl", ["--reward", *REWARDS, *weights, *seed]))
    train_all(runs)

    # 4. Every reward at every λ.
    flags = ["--adapters", *(f"{reward}={out / f'ppo-{reward}'}" for reward in REWARDS), "--reward", *REWARDS]
    flags += ["--others", f"MORL 0.5/0.5={out / 'morl'}", "--output_dir", str(out), *seed, "--samples", "4"]
    flags += ["--temperature", "0.7", "--max_new_tokens", "24"]  # as trained: recipes/configs/embedded.yaml
    run_step("4/5  Soups at 11 λ: generate, score, front, report", ["-m", "rsoups.cli", "sweep", *flags])

    # 5. One soup.
    soup = choose(out)
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Look at:")
    results = {"front": out / "front.png", "report": out / "report.html", "records": out / "records.jsonl"}
    for name, path in (results | {"chosen soup": soup}).items():
        print(f"  {name:12} {path}")


def choose(out: Path) -> Path:
    """Save the best soup above the base in every reward, by equal weights on the rewards; say so if there is none."""
    front = rsoups.Front.from_jsonl(out / "records.jsonl")
    equal = dict.fromkeys(front.rewards, 1.0)
    try:
        best = front.select(equal, above_base=True)
        print(f"\n5/5  The best soup above the base, by equal weights on the rewards: {best}")
    except rsoups.FrontError as error:
        best = front.select(equal)
        print(f"\n5/5  {error}\n  Saved all the same, the best by equal weights on the rewards: {best}")
    lambdas = best.point.lambdas
    assert lambdas is not None  # a front with soups chooses among them
    soup = rsoups.interpolate({name: out / f"ppo-{name}" for name in lambdas}, list(lambdas.values()))
    shutil.rmtree(out / "soup", ignore_errors=True)
    soup.save_pretrained(out / "soup")
    return out / "soup"


if __name__ == "__main__":
    with in_one_line():
        main()
