"""Every entry alone and beside one busy process, as rsoups lets idle threads wait and as the OpenMP runtime does.

    python benchmarks/busy.py                                     # two CPU cores, some minutes
    python benchmarks/busy.py --entries sweep --spin 1000         # one entry, one more way; results of others are kept

A neighbor is a process that this script starts: `python` spins on one core, `torch` multiplies matrices on two threads. The way
`rsoups` is what users get; `runtime` sets libgomp's own default, GOMP_SPINCOUNT=300000, which rsoups leaves as it is. Each
entry has one process for each way, which imports once and then works in turns with the others, alone and beside each neighbor.
`imports` is a whole `rsoups sweep --help`. Ratios are of medians over the rounds; `loss` is the quiet time over the runtime's.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/busy.json"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
PLACES = ("quiet", "python", "torch")
NEIGHBORS = {
    "python": "while True: pass",
    "torch": "import torch; a = torch.randn(700, 700)\nwhile True: a @ a",
}

# An entry defines `work()`; `sys.argv` has a folder for its files.
COMMAND = """
import contextlib, io, itertools
from rsoups.cli.main import main

folder, runs = sys.argv[1], itertools.count()


def command(*words):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main([*words, "--output_dir", f"{folder}/{next(runs)}"]) == 0
"""
ADAPTERS = """
import torch
from peft import LoraConfig, get_peft_model
from rsoups.bases.load import load_base

adapters = {}
for seed, name in enumerate("ab"):
    torch.manual_seed(seed)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base("rsoups/tiny-llama"), lora)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.25)
    model.peft_config["default"].base_model_name_or_path = "rsoups/tiny-llama"
    adapters[name] = f"{sys.argv[1]}/{name}"
    model.save_pretrained(adapters[name])
"""
SWEEP = """
sources = [f"{name}={path}" for name, path in adapters.items()]


def work():
    command("sweep", "--adapters", *sources, "--reward", "naturalness", "coverage", "--points", "3", "--prompts", "50")
"""
PPO = """
def work():
    command("train", "--reward", "coverage", "--max_steps", "8", "--eval_prompts", "0", "--disable_tqdm", "true")
"""
SCORING = """
reward = rsoups.load_reward("naturalness")
words = "a dog runs after the ball while two children watch it from their window on the street".split()
responses = [" ".join(words[i % 7 : i % 7 + 3 + i % 11]) + f" {i}." for i in range(4000)]


def work():
    reward(["dog, run"] * len(responses), responses)
"""
EXPLORER = """
from rsoups.explorer.streaming import stream

live = rsoups.LiveSoup.from_pretrained("rsoups/tiny-llama", list(adapters.values()))


def work():
    for prompt in ("dog, run", "child, ball, street", "woman, sing, stage", "man, ride, horse") * 2:
        for texts in stream(live, prompt, [[0.5, 0.5], [1, 0], [0, 1], None], max_new_tokens=48):
            pass
"""
ENTRIES = {
    "sweep": COMMAND + ADAPTERS + SWEEP,
    "ppo": COMMAND + PPO,
    "scoring": SCORING,
    "explorer": ADAPTERS + EXPLORER,
}
TURNS = """
import sys, time
import rsoups
{entry}
for line in iter(input, "end"):
    started = time.perf_counter()
    work()
    print("seconds", time.perf_counter() - started, flush=True)
"""


@contextmanager
def process_of(entry: str, environment: dict[str, str]) -> Iterator[Callable[[], float]]:
    """A process that has imported an entry; called, it works once and returns the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-c", TURNS.format(entry=ENTRIES[entry]), folder]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, env=environment, cwd=ROOT, **pipes)
        answers = process.stdout
        assert answers

        def turn() -> float:
            print("work", file=process.stdin, flush=True)
            for line in answers:
                if line.startswith("seconds"):
                    return float(line.split()[1])
            sys.exit(f"{entry}: exit code {process.wait()}")

        yield turn
        process.communicate("end\n")


@contextmanager
def importing(environment: dict[str, str]) -> Iterator[Callable[[], float]]:
    """Call it for the seconds of a whole command that imports everything and works on nothing."""

    def turn() -> float:
        command = [sys.executable, "-m", "rsoups.cli", "sweep", "--help"]
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True)
        return time.perf_counter() - started

    yield turn


@contextmanager
def beside(place: str, environment: dict[str, str]) -> Iterator[None]:
    if place == "quiet":
        yield
        return
    with subprocess.Popen([sys.executable, "-c", NEIGHBORS[place]], env=environment) as process:
        time.sleep(4 if place == "torch" else 1)  # it imports
        try:
            yield
        finally:
            process.kill()


def measured(entry: str, ways: dict[str, dict[str, str]], rounds: int) -> dict[str, Any]:
    """Seconds of each way in each place, and their ratios."""
    seconds: dict[str, dict[str, list[float]]] = {way: {place: [] for place in PLACES} for way in ways}
    with ExitStack() as stack:
        turns = {}
        for way, environment in ways.items():
            one = importing(environment) if entry == "imports" else process_of(entry, environment)
            turns[way] = stack.enter_context(one)
        if entry != "imports":
            for turn in turns.values():
                turn()  # it imports, and warms up
        for place in PLACES:
            with beside(place, ways["runtime"]):
                for _ in range(rounds):
                    for way, turn in turns.items():
                        seconds[way][place].append(turn())
    medians = {way: {place: statistics.median(found[place]) for place in PLACES} for way, found in seconds.items()}
    ratios = {
        way: {f"{place} / quiet": found[place] / found["quiet"] for place in PLACES[1:]}
        | {"loss": found["quiet"] / medians["runtime"]["quiet"]}
        for way, found in medians.items()
    }
    return {"seconds": seconds, "medians": medians, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*ENTRIES, "imports"]
    parser.add_argument("--entries", nargs="+", choices=names, default=names)
    parser.add_argument("--spin", nargs="*", default=[], help="further ways: values of GOMP_SPINCOUNT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    plain = {name: value for name, value in os.environ.items() if name not in WAITING}
    plain |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ways = {"rsoups": plain, "runtime": plain | {"GOMP_SPINCOUNT": "300000"}}
    ways |= {f"spin {count}": plain | {"GOMP_SPINCOUNT": count} for count in args.spin}
    results = json.loads(args.out.read_text()) if args.out.exists() else {"entries": {}}
    results["cores"], results["machine"] = len(os.sched_getaffinity(0)), platform.machine()
    results["versions"] = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    for entry in args.entries:
        found = results["entries"][entry] = measured(entry, ways, args.rounds)
        for way in ways:
            figures = {**found["medians"][way], **found["ratios"][way]}
            print(f"{entry:9} {way:10} { ({name: round(value, 2) for name, value in figures.items()}) }", flush=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
