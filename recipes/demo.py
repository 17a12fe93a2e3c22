"""The whole recipe, offline, on the embedded models: PPO for each reward, MORL, soups, front, report.

    make demo
    rsoups demo --out demo --seed 0

Each step is the command that it prints. A step that has finished is not run again: run the demo once more after an
interruption and it goes on.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from rsoups.common.errors import in_one_line

RECIPES = Path(__file__).parent
REWARDS = ("naturalness", "coverage")
# The trainer's own bar: step, steps, and the figures behind its rate.
PROGRESS = re.compile(r"[\r\n] *\d+%\|[^|]*\| *(\d+)/(\d+) \[[^\]]*?(?:it/s|s/it)((?:, [a-z/_]+=[^\],]+)*)\]")
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def run(title: str, arguments: list[str]) -> None:
    print(f"\n\033[1m{title}\033[0m\n  python {shlex.join(arguments)}", flush=True)
    started = time.monotonic()
    finished = subprocess.run([sys.executable, *arguments], check=False)
    if finished.returncode:
        sys.exit(f"{title}: failed with exit code {finished.returncode}; run this again to go on from here")
    print(f"  {time.monotonic() - started:.0f} s", flush=True)


def train_all(runs: list[tuple[str, Path, list[str]]], recipe: str = "ppo_reward.py") -> None:
    """Runs of a training recipe, side by side on a CPU's cores, of which a model this small keeps one busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    open_runs = []
    for title, folder, flags in runs:
        if folder.exists():
            print(f"\n{title}: already there, {folder}")
            continue
        arguments = [*LAUNCH, str(RECIPES / recipe), *flags, "--output_dir", f"{folder}.partial"]
        print(f"\n\033[1m{title}\033[0m\n  python {shlex.join(arguments)}", flush=True)
        open_runs.append((title, folder, arguments))
    print(flush=True)
    side_by_side = 1 if torch.cuda.is_available() else min(len(open_runs), cores) or 1
    threads = max(1, cores // side_by_side)
    with ThreadPoolExecutor(side_by_side) as pool:
        results = [pool.submit(train, *job, row, threads) for row, job in enumerate(open_runs)]
        problems = [result.result() for result in results]
    if any(problems):
        sys.exit("\n".join(filter(None, problems)) + "\nrun this again to go on from here")


def train(title: str, folder: Path, arguments: list[str], row: int, threads: int) -> str | None:
    """One run behind one progress bar, under its final name only once it is whole. Returns what went wrong."""
    partial = Path(f"{folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *arguments]
    output = ""
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
        tqdm(desc=title, position=row, dynamic_ncols=True, unit=" steps") as bar,
    ):
        assert process.stdout is not None
        while piece := process.stdout.read(64):
            output = (output + piece)[-8_000:]
            if found := PROGRESS.findall(output):
                step, steps, figures = found[-1]
                bar.total = bar.total or int(steps)
                if int(steps) == bar.total:  # not the bar of the evaluation that follows
                    bar.set_postfix_str(figures.strip(", "), refresh=False)
                    bar.update(int(step) - bar.n)
    if process.returncode:
        return f"{title}: failed with exit code {process.returncode}:\n{output[-2_000:]}"
    (partial / "log.txt").write_text(output, "utf-8")
    partial.rename(folder)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="rsoups demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that the demo makes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the PPO runs and of the evaluation")
    args = parser.parse_args()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    out, seed = args.out, ["--seed", str(args.seed)]
    started = time.monotonic()

    runs = [
        (f"{number}/5  PPO on {reward}", out / f"ppo-{reward}", ["--reward", reward, *seed])
        for number, reward in enumerate(REWARDS, 1)
    ]
    weights = ["--reward_weights", "0.5", "0.5"]
    runs.append(("3/5  MORL: both at once", out / "morl", ["--reward", *REWARDS, *weights, *seed]))
    train_all(runs)
    flags = ["--adapters", *(f"{reward}={out / f'ppo-{reward}'}" for reward in REWARDS), "--reward", *REWARDS]
    flags += ["--others", f"MORL 0.5/0.5={out / 'morl'}", "--output_dir", str(out), *seed]
    flags += ["--temperature", "0.7", "--max_new_tokens", "24"]  # as trained: recipes/configs/embedded.yaml
    flags += ["--samples", "4"]
    run("4/5  Soups at 11 λ: generate, score, front, report", ["-m", "rsoups.cli.main", "sweep", *flags])
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
    """Save the soup that is above the base in every reward, by equal weights on them; say it where there is none."""
    import rsoups

    front = rsoups.Front.from_jsonl(out / "records.jsonl")
    equal = dict.fromkeys(front.rewards, 1.0)
    try:
        best = front.select(equal, above_base=True)
        print(f"\n5/5  The best soup above the base, by equal weights on the rewards: {best}")
    except rsoups.FrontError as error:
        best = front.select(equal)
        print(f"\n5/5  {error}\n  Saved all the same, the best by equal weights on the rewards: {best}")
    lambdas = best.point.lambdas
    soup = rsoups.interpolate({name: out / f"ppo-{name}" for name in lambdas}, list(lambdas.values()))
    shutil.rmtree(out / "soup", ignore_errors=True)
    soup.save_pretrained(out / "soup")
    return out / "soup"


if __name__ == "__main__":
    with in_one_line():
        main()
