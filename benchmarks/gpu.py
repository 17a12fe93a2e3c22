"""What only a GPU tells, in one command: at most eight minutes on one card of 80 GB, without a network.

    PYTHONPATH=. python benchmarks/gpu.py                        # all parts; figures in benchmarks/results/gpu.json
    PYTHONPATH=. python benchmarks/gpu.py --trl FOLDER           # and TRL 1.12's PPOTrainer beside ours
    PYTHONPATH=. python benchmarks/gpu.py --parts decode sweep   # some parts
    PYTHONPATH=. python benchmarks/gpu.py --tiny                 # a rehearsal on the CPU, tiny shapes, some minutes

FOLDER is what `pip install --no-deps --target FOLDER trl==1.12.0` makes. The parts are in gpu_parts.py and gpu_training.py.
Each is a process of its own with a time limit, so that no part keeps another one's memory. A part that fails or exceeds its
limit is recorded with the figures that it has noted so far, and the next part runs. The results are written after each part,
with the goals of those figures that have one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = 480  # of all parts together
# Seconds of a part at most. What a part leaves of its time, a later one may need; all of them end after SECONDS.
LIMITS = {
    "ppo": 90, "ppo_trl": 110, "sweep": 110, "decode": 60, "memory": 110, "resume": 60, "processes": 70, "qlora": 50,
}  # fmt: skip
_LOG = 2_000  # characters of a failed part's output that are kept
_LEAST = 10  # seconds without which no part is started

# Name of a goal: part and path of its figure, or of two figures whose ratio counts; the goal; whether more is better.
_Path = tuple[str, ...]
GOALS: dict[str, tuple[_Path, _Path | None, float, bool]] = {
    "PPO, episodes/s over TRL 1.12's": (("ppo", "episodes_per_second"), ("ppo_trl", "episodes_per_second"), 2.5, True),
    "critic's memory, MB": (("ppo", "critic_mb"), None, 1.0, False),
    "sweep, 11 λ over one λ": (("sweep", "11 λ / one λ"), None, 2.5, False),
    "decode step, 2 adapters over one of PEFT": (("decode", "64 rows", "live 2 / peft"), None, 1.15, False),
    "decode step, 4 adapters over one of PEFT": (("decode", "64 rows", "live 4 / peft"), None, 1.3, False),
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--trl", type=Path, help="folder that holds TRL 1.12")
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU with tiny shapes")
    parser.add_argument("--out", type=Path, help="results file; of a rehearsal a temporary one by default")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the part that this process runs
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)  # file of the part's figures
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker, Notes(args.notes), args.tiny)
        return {}

    out = args.out or (
        Path(tempfile.gettempdir()) / "gpu-tiny.json" if args.tiny else ROOT / "benchmarks/results/gpu.json"
    )

    def start(part: str, notes: Path) -> subprocess.Popen:
        command = [sys.executable, __file__, "--worker", part, "--notes", str(notes), *["--tiny"] * args.tiny]
        folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        if part == "ppo_trl" and args.trl:
            folders.insert(0, str(args.trl.resolve()))
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(folders),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if args.tiny:
            env |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
        with notes.with_suffix(".log").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)

    results = run({part: LIMITS[part] for part in LIMITS if part in args.parts}, start, out)
    print(json.dumps(results["goals"], indent=2, ensure_ascii=False), f"\n{out}")
    return results


class Notes:
    """The figures of a part, in a file from the moment they are known.

    Attributes:
        figures: All of them so far.
    """

    def __init__(self, path: Path):
        self._path, self.figures = path, dict[str, Any]()

    def __call__(self, **figures: Any) -> None:
        """Add figures."""
        self.add(figures)

    def add(self, figures: dict[str, Any]) -> None:
        """Add figures whose names are no identifiers."""
        self.figures |= figures
        write(self._path, self.figures)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that appears whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(path)


def run(
    limits: dict[str, float], start: Callable[[str, Path], subprocess.Popen], out: Path, seconds: float = SECONDS
) -> dict[str, Any]:
    """Run parts one after the other, and write the results after each.

    Args:
        limits: Seconds that a part may take, by its name.
        start: Function that starts a part, given its name and the file of its figures; beside it, named .log, is its output.
        out: Results file.
        seconds: Seconds that all parts may take together.

    Returns:
        The results: `machine`, `goals` and `parts`. A part has a `status` ("done", "failed", "over its limit" or "skipped"),
        its `seconds`, its `figures`, and the end of its output where it failed.
    """
    begun = time.monotonic()
    results: dict[str, Any] = {"command": " ".join(sys.argv), "machine": {}, "goals": {}, "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part, limit in limits.items():
            left = seconds - (time.monotonic() - begun)
            if left < min(_LEAST, limit):
                results["parts"][part] = {"status": "skipped", "reason": f"{seconds} s are over"}
            else:
                results["parts"][part] = run_part(part, min(limit, left), start, Path(folder) / f"{part}.json")
            figures = results["parts"][part].get("figures", {})
            results["machine"] |= figures.pop("machine", {})
            results["goals"] = goals(results["parts"])
            results["seconds"] = time.monotonic() - begun
            out.parent.mkdir(parents=True, exist_ok=True)
            write(out, results)
            print(part, json.dumps(results["parts"][part], ensure_ascii=False), flush=True)
    return results


def run_part(part: str, limit: float, start: Callable[[str, Path], subprocess.Popen], notes: Path) -> dict[str, Any]:
    """Run one part, and end it with all its processes at its limit. Returns its entry of the results."""
    begun = time.monotonic()
    process = start(part, notes)
    try:
        status = "failed" if process.wait(limit) else "done"
    except subprocess.TimeoutExpired:
        status = "over its limit"
    finally:  # also where this process is interrupted
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    figures = json.loads(notes.read_text("utf-8")) if notes.exists() else {}
    entry: dict[str, Any] = {"status": status, "seconds": time.monotonic() - begun, "limit": limit, "figures": figures}
    if reason := figures.pop("skipped", None):
        entry |= {"status": "skipped", "reason": reason}
    if status != "done":
        log = notes.with_suffix(".log")
        entry["output"] = log.read_text("utf-8", "replace")[-_LOG:] if log.exists() else ""
    return entry


def goals(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The goals whose figures are known: the figure, the goal, and whether it is reached."""

    def figure(path: _Path) -> float | None:
        part, *names = path
        found: Any = parts.get(part, {}).get("figures", {})
        for name in names:
            found = found.get(name, {}) if isinstance(found, dict) else {}
        return found if isinstance(found, (int, float)) else None

    known = {}
    for name, (path, other, goal, more) in GOALS.items():
        value, divisor = figure(path), figure(other) if other else 1.0
        if value is not None and divisor:
            value /= divisor
            known[name] = {"figure": value, "goal": goal, "reached": value >= goal if more else value <= goal}
    return known


def work(part: str, notes: Notes, tiny: bool) -> None:
    """Run a part in this process."""
    import gpu_parts
    import gpu_training

    notes(machine=gpu_parts.machine())
    gpu_parts.PARTS[part](gpu_training.TINY if tiny else gpu_training.FULL, notes)


if __name__ == "__main__":
    main()
