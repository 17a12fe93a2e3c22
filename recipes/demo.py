"""The whole recipe, offline, on the embedded models: PPO for each reward, MORL, soups, front, report.

    make demo
    rsoups demo --out demo --seed 0

Each step is the command that it prints. A step that has finished is not run again: run the demo once more after an
interruption and it goes on.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

RECIPES = Path(__file__).parent
REWARDS = ("naturalness", "coverage")
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def run(title: str, arguments: list[str]) -> None:
    print(f"\n\033[1m{title}\033[0m\n  python {shlex.join(arguments)}", flush=True)
    started = time.monotonic()
    finished = subprocess.run([sys.executable, *arguments], check=False)
    if finished.returncode:
        sys.exit(f"{title}: failed with exit code {finished.returncode}; run the demo again to go on from here")
    print(f"  {time.monotonic() - started:.0f} s", flush=True)


def train(title: str, folder: Path, flags: list[str]) -> Path:
    """One PPO run, under its final name only once it is whole."""
    if folder.exists():
        print(f"\n{title}: already there, {folder}")
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    run(title, [*LAUNCH, str(RECIPES / "ppo_reward.py"), *flags, "--output_dir", str(partial)])
    partial.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="rsoups demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that the demo makes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the PPO runs and of the evaluation")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    out, seed = args.out, ["--seed", str(args.seed)]
    started = time.monotonic()

    for number, reward in enumerate(REWARDS, 1):
        train(f"{number}/5  PPO on {reward}", out / f"ppo-{reward}", ["--reward", reward, *seed])
    weights = ["--reward_weights", "0.5", "0.5"]
    train("3/5  MORL: PPO on the mean of both", out / "morl", ["--reward", *REWARDS, *weights, *seed])
    flags = ["--adapters", *(f"{reward}={out / f'ppo-{reward}'}" for reward in REWARDS), "--reward", *REWARDS]
    flags += ["--others", f"MORL 0.5/0.5={out / 'morl'}", "--output_dir", str(out), *seed]
    flags += ["--temperature", "0.7", "--max_new_tokens", "24"]  # as trained: recipes/configs/embedded.yaml
    run("4/5  Soups at 11 λ: generate, score, front, report", [str(RECIPES / "sweep.py"), *flags])
    soup = choose(out)
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Look at:")
    for what, path in (
        ("front", out / "front.png"),
        ("report", out / "report.html"),
        ("records", out / "records.jsonl"),
        ("chosen soup", soup),
    ):
        print(f"  {what:12} {path}")


def choose(out: Path) -> Path:
    """Save the soup that is best for someone who cares equally for all rewards."""
    import rsoups

    front = rsoups.Front.from_jsonl(out / "records.jsonl")
    best = max(front.soups, key=lambda point: sum(point.mean.values()))
    print(f"\n5/5  The best soup on the plain mean of the rewards is λ = {dict(best.lambdas)}")
    adapters = {name: out / f"ppo-{name}" for name in best.lambdas}
    soup = rsoups.interpolate(adapters, list(best.lambdas.values()))
    shutil.rmtree(out / "soup", ignore_errors=True)
    soup.save_pretrained(out / "soup")
    return out / "soup"


if __name__ == "__main__":
    main()
