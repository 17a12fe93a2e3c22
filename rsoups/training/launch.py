"""Run recipes as processes: training runs side by side on a CPU's cores, each with a progress bar.

A run writes its progress to the file that the environment variable `PROGRESS_FILE` names
(`rsoups.training.callbacks.ProgressFile`), and its output to log.txt. Its folder has its final name only once it is whole.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rsoups.common.assets import shipped
from rsoups.common.errors import TrainingError

PROGRESS_FILE = "RSOUPS_PROGRESS_FILE"  # environment variable
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}  # environment of a recipe's steps

_LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
_LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
_POLL = 0.2  # seconds between two looks at a progress file
_TAIL = 2_000  # characters of a failed run's log that are shown


@dataclass(frozen=True)
class Run:
    """One run of a training recipe.

    Attributes:
        title: Name of the run, beside its progress bar.
        folder: Output folder. A run whose folder exists is finished, and not run again.
        flags: Flags of the recipe, without --output_dir.
    """

    title: str
    folder: Path
    flags: Sequence[str]


def train_all(runs: Sequence[Run], recipe: str = "ppo_reward.py") -> None:
    """Train all runs: side by side on a CPU, whose cores they share; one after the other on a GPU.

    Args:
        runs: Runs of the recipe.
        recipe: File name of a training recipe.

    Raises:
        TrainingError: A run failed. The others are finished, or keep what they wrote.
    """
    import torch

    waiting = []
    for run in runs:
        if run.folder.exists():
            print(f"\n{run.title}: already there, {run.folder}")
        else:
            print(f"\n\033[1m{run.title}\033[0m\n  python {shlex.join(_arguments(run, recipe))}", flush=True)
            waiting.append(run)
    print(flush=True)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    side_by_side = 1 if torch.cuda.is_available() else min(len(waiting), cores) or 1
    threads = max(1, cores // side_by_side)
    with ThreadPoolExecutor(side_by_side) as pool:
        results = [pool.submit(_train, run, recipe, row, threads) for row, run in enumerate(waiting)]
        failures = [failure for result in results if (failure := result.result())]
    if failures:
        raise TrainingError(f"{'; '.join(failures)}. Run the same command again to continue from here")


def run_step(title: str, arguments: Sequence[str]) -> None:
    """Run Python with some arguments, with its output on this terminal.

    Raises:
        TrainingError: Its exit code is not 0.
    """
    print(f"\n\033[1m{title}\033[0m\n  python {shlex.join(arguments)}", flush=True)
    started = time.monotonic()
    finished = subprocess.run([sys.executable, *arguments], check=False)
    if finished.returncode:
        raise TrainingError(
            f"{title}: failed with exit code {finished.returncode}. Run the same command again to continue from here"
        )
    print(f"  {time.monotonic() - started:.0f} s", flush=True)


def _arguments(run: Run, recipe: str) -> list[str]:
    return [*_LAUNCH, str(shipped("recipes") / recipe), *run.flags, "--output_dir", f"{run.folder}.partial"]


def _train(run: Run, recipe: str, position: int, threads: int) -> str | None:
    """Train one run; returns one line about its failure, or None."""
    partial = Path(f"{run.folder}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    log, progress = partial / "log.txt", partial / "progress.jsonl"

    # The run's own bars would only fill the log.
    environment = os.environ | {"TQDM_DISABLE": "1", PROGRESS_FILE: str(progress.absolute())}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, *_arguments(run, recipe)]
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
        tqdm(desc=run.title, position=position, dynamic_ncols=True, unit=" steps", disable=False) as bar,
    ):
        while process.poll() is None:
            time.sleep(_POLL)
            _show(last_progress(progress), bar)
        _show(last_progress(progress), bar)

    if process.returncode:
        print(log.read_text("utf-8", errors="replace")[-_TAIL:], file=sys.stderr)
        return f"{run.title}: failed with exit code {process.returncode} (its log: {log})"
    partial.rename(run.folder)
    return None


def last_progress(path: Path) -> dict[str, Any] | None:
    """The last whole line of a progress file; None where there is none yet."""
    try:
        lines = path.read_text("utf-8").split("\n")[:-1]  # what follows the last line break is still being written
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None


def _show(progress: dict[str, Any] | None, bar: tqdm) -> None:
    if progress is None:
        return
    figures = {name: f"{value:.2f}" for name, value in progress.items() if name not in ("step", "steps")}
    bar.total = progress["steps"]
    bar.set_postfix(figures, refresh=False)
    bar.update(progress["step"] - bar.n)
