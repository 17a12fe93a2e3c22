"""A sweep of several processes, killed and gone on with by other numbers of them, ends with the records of one process."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from forked import warm_python
from places import HELPERS
from ports import free_port
from sweep_runs import run, same
from tiny import tiny_adapter

from rsoups import OutputError
from rsoups.common.files import read_jsonl
from rsoups.sweeps.records import key_of

CPU = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
SCRIPT = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import rsoups
from sweep_runs import PROMPTS, changed_llama, first, length, run

base = changed_llama() if os.environ.get("RANK") == os.environ.get("CHANGED", "none") else None
folder, out, pause = Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])


def slow(prompts, responses):
    (out.parent / "asked").open("a").write("".join(f"{p}\\n" for p in prompts))
    time.sleep(pause)
    return length(prompts, responses)


two = {name: folder / name for name in "ab"}
try:
    front = run(two, out, {"length": slow, "first": first}, refine=1, samples=2, base=base)
except rsoups.RsoupsError as error:
    sys.exit(f"refused: {error}")
assert len(front.soups) == 4
"""


def start(root, processes, out, pause=0.0, python=None, **env):
    (root / "script.py").write_text(SCRIPT)
    command = [python or warm_python()]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port())]
    command += [str(root / "script.py"), str(HELPERS), str(root), str(out), str(pause)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=CPU | env)


def finish(process):
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-3000:]


def kill(process):
    """The launcher and what it launched, by SIGKILL."""
    whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in whole:
        one.kill()
    psutil.wait_procs(whole[1:], timeout=60)
    process.communicate(timeout=60)


def asked(out):
    path = out.parent / "asked"
    return len(path.read_text().splitlines()) if path.exists() else 0


def different(records):
    """How many are to be scored: what several models answer alike is scored once, by each process."""
    return len({(record["prompt"], record["response"]) for record in records})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    for seed, name in enumerate("ab"):
        tiny_adapter(root / name, seed=seed)
    (root / "one").mkdir()
    finish(start(root, 1, root / "one" / "records.jsonl"))
    return root


@pytest.fixture
def whole(root):
    records = read_jsonl(root / "one" / "records.jsonl")
    assert len(records) == (1 + 4) * 4 * 2 and asked(root / "one" / "records.jsonl") == different(records)
    return records


def test_two_processes_share_the_work(root, whole):
    out = root / "two" / "records.jsonl"
    out.parent.mkdir()
    finish(start(root, 2, out))
    assert same(read_jsonl(out), whole) and different(whole) <= asked(out) <= len(whole)
    assert {path.name for path in out.parent.iterdir()} == {"records.jsonl", "records.settings.json", "asked"}


def test_each_process_checks_its_base(root, whole):
    out = root / "changed" / "records.jsonl"
    out.parent.mkdir()
    process = start(root, 2, out, CHANGED="1")
    _, errors = process.communicate(timeout=180)
    assert process.returncode != 0 and "refused" in errors and "differing: the base's weights" in errors
    one, two = (json.loads((root / name / "records.settings.json").read_text()) for name in ("one", "changed"))
    assert one["base_weights"] == two["base_weights"], "the main process tells"


@pytest.mark.parametrize("processes", [1, 2], ids=["one process", "two processes"])
def test_a_sweep_killed_by_sigkill_goes_on_with_another_number_of_processes(root, whole, processes):
    out = root / f"killed-{processes}" / "records.jsonl"
    out.parent.mkdir()
    killed = start(root, processes, out, pause=0.3, python=sys.executable)  # its children are its own, to be killed
    deadline = time.monotonic() + 120
    while asked(out) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(OutputError, match="another run is writing into"):
        run({name: root / name for name in "ab"}, out)
    kill(killed)
    before = asked(out)
    found = [record for path in out.parent.glob("records*.jsonl") for record in complete_lines(path)]
    assert 12 <= before < len(whole) and found
    finish(start(root, 3 - processes, out))
    assert same(read_jsonl(out), whole)
    done = set(map(key_of, found))
    left = [record for record in whole if key_of(record) not in done]
    assert different(left) <= asked(out) - before <= len(left), "finished records are not computed again"


def complete_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
