"""Every entry alone and beside one busy process, as rsoups lets idle threads wait and as the OpenMP runtime does.

    python benchmarks/busy.py                                         # two CPU cores, a quarter of an hour
    python benchmarks/busy.py --entries sweep --neighbors python      # one of them; results of the others are kept

An entry is a process, timed from its start to its end: `imports` is `rsoups sweep --help`, the others add their work to it. A
neighbor is a process that this script starts: `python` spins on one core, `torch` multiplies matrices on two threads that
wait actively. `rsoups` is what users get; `runtime` sets libgomp's own default, GOMP_SPINCOUNT=300000, which rsoups leaves as
it is; --spin adds other values. `busy / quiet` is the ratio of medians; `work` is the same without the imports.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/busy.json"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

ADAPTERS = """
import sys
import rsoups, torch
from peft import LoraConfig, get_peft_model
from rsoups.bases.load import load_base

for seed, folder in enumerate(sys.argv[1:]):
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    model = get_peft_model(load_base("rsoups/tiny-llama"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.25)
    model.peft_config["default"].base_model_name_or_path = "rsoups/tiny-llama"
    model.save_pretrained(folder)
"""
SCORING = """
import rsoups

reward = rsoups.load_reward("naturalness")
words = "a dog runs after the ball while two children watch it from their window on the street".split()
responses = [" ".join(words[i % 7 : i % 7 + 3 + i % 11]) + f" {i}." for i in range(8000)]
reward(["dog, run"] * len(responses), responses)
"""
EXPLORER = """
import sys
import rsoups
from rsoups.explorer.streaming import stream

live = rsoups.LiveSoup.from_pretrained("rsoups/tiny-llama", sys.argv[1:])
for prompt in ("dog, run", "child, ball, street", "woman, sing, stage", "man, ride, horse") * 6:
    for texts in stream(live, prompt, [[0.5, 0.5], [1, 0], [0, 1], None], max_new_tokens=48):
        pass
"""
NEIGHBORS = {
    "python": "while True: pass",
    "torch": "import torch; a = torch.randn(700, 700)\nwhile True: a @ a",
}


def entries(folder: Path) -> dict[str, list[str]]:
    """Arguments of Python for each entry."""
    adapters = [str(folder / "first"), str(folder / "second")]
    cli = ["-m", "rsoups.cli"]
    named = [f"{Path(path).name}={path}" for path in adapters]
    rewards = ["naturalness", "coverage"]
    return {
        "imports": [*cli, "sweep", "--help"],
        "sweep": [*cli, "sweep", "--adapters", *named, "--reward", *rewards, "--points", "5", "--output_dir", "OUT"],
        "ppo": ["recipes/ppo_reward.py", "--reward", "coverage", "--max_steps", "48", "--output_dir", "OUT"],
        "scoring": ["-c", SCORING],
        "explorer": ["-c", EXPLORER, *adapters],
    }


def seconds_of(arguments: list[str], environment: dict[str, str]) -> float:
    with tempfile.TemporaryDirectory() as out:
        words = [word.replace("OUT", f"{out}/out") for word in arguments]
        started = time.perf_counter()
        command = [sys.executable, *words]
        finished = subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - started
    if finished.returncode:
        sys.exit(f"{words}: exit code {finished.returncode}\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    return seconds


@contextmanager
def beside(neighbor: str | None, environment: dict[str, str]) -> Iterator[None]:
    if neighbor is None:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", NEIGHBORS[neighbor]], env=environment) as process:
        time.sleep(4 if neighbor == "torch" else 1)  # it imports
        try:
            yield
        finally:
            process.kill()


def ratios(seconds: dict[str, Any], imports: dict[str, Any] | None) -> dict[str, float]:
    """Busy over quiet for each neighbor, with the imports and without."""
    medians = {place: statistics.median(values) for place, values in seconds.items()}
    out = {f"{place} / quiet": medians[place] / medians["quiet"] for place in medians if place != "quiet"}
    if imports:
        work = {place: medians[place] - statistics.median(imports[place]) for place in medians if place in imports}
        out |= {f"work, {place} / quiet": work[place] / work["quiet"] for place in work if place != "quiet"}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(entries(Path()))
    parser.add_argument("--entries", nargs="+", choices=names, default=names)
    parser.add_argument("--neighbors", nargs="*", choices=list(NEIGHBORS), default=list(NEIGHBORS))
    parser.add_argument("--spin", nargs="*", default=[], help="further values of GOMP_SPINCOUNT")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()

    plain = {name: value for name, value in os.environ.items() if name not in WAITING}
    plain |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ways = {"rsoups": plain, "runtime": plain | {"GOMP_SPINCOUNT": "300000"}}
    ways |= {f"spin {count}": plain | {"GOMP_SPINCOUNT": count} for count in args.spin}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"entries": {}}
    results["cores"], results["machine"] = len(os.sched_getaffinity(0)), platform.machine()
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}

    with tempfile.TemporaryDirectory() as temporary:
        commands = entries(Path(temporary))
        subprocess.run([sys.executable, "-c", ADAPTERS, *commands["explorer"][2:]], env=plain, cwd=ROOT, check=True)
        for name in args.entries:
            measured: dict[str, Any] = {way: {} for way in ways}
            for place in ("quiet", *args.neighbors):
                with beside(None if place == "quiet" else place, plain):
                    for number in range(args.rounds):
                        for way in list(ways)[:: -1 if number % 2 else 1]:
                            measured[way].setdefault(place, []).append(seconds_of(commands[name], ways[way]))
            results["entries"][name] = {way: {"seconds": seconds} for way, seconds in measured.items()}
            report(name, results["entries"])
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def report(name: str, found: dict[str, Any]) -> None:
    """Add the ratios of an entry, and print them."""
    for way, figures in found[name].items():
        imports = found.get("imports", {}).get(way) if name != "imports" else None
        figures |= ratios(figures["seconds"], imports and imports["seconds"])
        medians = {place: round(statistics.median(values), 2) for place, values in figures["seconds"].items()}
        rounded = {key: round(value, 2) for key, value in figures.items() if key != "seconds"}
        print(f"{name:9} {way:10} {medians} {rounded}", flush=True)


if __name__ == "__main__":
    main()
