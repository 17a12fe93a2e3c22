"""rsoups.interpolate beside the disk and PEFT's add_weighted_adapter: LLaMA-7b-shaped adapters, in turn in one run.

    python benchmarks/interpolate.py                     # about ten minutes on two cores
    python benchmarks/interpolate.py --rounds 1 --layers 2

N adapters of rank 16 on q/k/v/o_proj of 32 layers 4,096 wide (67 MB each, float32, random values), from folder to folder:
`rsoups` interpolates and saves; `disk` reads the same bytes and writes as many as the soup has with safetensors, nothing
else; `floor` does what ours promises and nothing else: reads and hashes every file (SHA-256, on all cores), writes as many
bytes as the soup has meanwhile, and waits until they are on the disk; `peft` loads the adapters on a skeleton base (of the
right shapes, without memory), adds the weighted one and saves it. PEFT's svd forms dense matrices and takes minutes: it and
ours are measured on one layer.

`command` is the whole of `rsoups interpolate` of two adapters from a shell, from the start of Python to its end; `--help`, and
two adapters of one layer, tell how much of it does not depend on the adapters' size.

Each measurement is a process of its own, timed inside after the imports, the files in the page cache. Written to
benchmarks/results/interpolate.json: seconds, and memory at the work's peak beyond that before it, in MB; medians and ratios.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH, RANK, TARGETS = 4096, 16, ("q_proj", "k_proj", "v_proj", "o_proj")


def make(folder, layers, seed):
    """One adapter of random values."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    start, generator = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=start) + 0.1 * torch.randn(
                RANK, WIDTH, generator=generator
            )  # trained from one start
            tensors[f"{name}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM").save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def skeleton(layers):
    """A LLaMA of the right shapes whose weights take no memory: each is one number, seen many times."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            one = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(one, requires_grad=False))
    return model


def run_rsoups(folders, method, out, rows):
    import rsoups

    lambdas = (
        [[1 / len(folders)] * len(folders)]
        if rows == 1
        else [[i / (rows - 1), 1 - i / (rows - 1)] for i in range(rows)]
    )
    extra = {"rank": RANK} if method == "svd" else {}

    def work():
        for i, soup in enumerate(rsoups.interpolate(folders, lambdas, method=method, **extra)):
            soup.save_pretrained(Path(out) / str(i))

    return work


def run_disk(folders, method, out, rows):
    from safetensors.torch import load_file, save_file

    Path(out).mkdir()

    def work():
        tensors = {
            f"{i}.{k}": v for i, f in enumerate(folders) for k, v in load_file(f"{f}/adapter_model.safetensors").items()
        }
        if method != "exact":  # a soup as large as one ingredient; all of them are read
            for tensor in tensors.values():
                tensor.view(-1)[::1024].sum()  # a page of each: mapped files are read when touched
            tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("0.")}
        for row in range(rows):
            save_file(tensors, Path(out) / f"{row}.safetensors", metadata={"format": "pt"})

    return work


def run_floor(folders, method, out, rows):
    Path(out).mkdir()
    files = [Path(folder) / "adapter_model.safetensors" for folder in folders]
    sizes = [file.stat().st_size for file in files]
    size = sum(sizes) if method == "exact" else sizes[0]
    block = os.urandom(2**17)

    def sha256(path):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def work():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            hashes = pool.map(sha256, files)
            for row in range(rows):
                with open(Path(out) / str(row), "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
                    for start in range(0, size, len(block)):
                        file.write(block[: size - start])
                    file.flush()
                    os.fsync(file.fileno())
            list(hashes)

    return work


def run_peft(folders, method, out, rows):
    from peft import PeftModel

    layers = len({k.split(".")[4] for k in _names(folders[0])})
    base = skeleton(layers)
    kind = {"exact": "cat", "factors": "linear", "svd": "svd"}[method]

    def work():
        model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
        for i, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, adapter_name=str(i))
        names = [str(i) for i in range(len(folders))]
        extra = {"svd_rank": RANK} if method == "svd" else {}
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), "soup", combination_type=kind, **extra)
        model.save_pretrained(out, selected_adapters=["soup"])

    return work


def _names(folder):
    from safetensors import safe_open

    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def worker(args):
    work = {"rsoups": run_rsoups, "disk": run_disk, "floor": run_floor, "peft": run_peft}[args.worker](
        args.folders, args.method, args.out, args.rows
    )
    if args.worker == "rsoups":
        import rsoups.soups.interpolation  # noqa: F401  (imported lazily otherwise, within the measured time)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "memory_mb": resident("VmHWM") - before}))


def resident(kind):
    """Megabytes of this process now (VmRSS), or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024


def measure(who, folders, method, rows=1):
    for folder in folders:
        (Path(folder) / "adapter_model.safetensors").read_bytes()  # into the page cache
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--worker", who, "--method", method, "--rows", str(rows)]
        command += ["--out", f"{scratch}/out", "--folders", *map(str, folders)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{who} {method} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def compare(title, jobs, rounds):
    """Medians of several measurements taken in turn."""
    found = {who: [] for who in jobs}
    for number in range(rounds):
        for who in list(jobs) if number % 2 else reversed(list(jobs)):
            found[who].append(measure(who.split()[0], *jobs[who]))
    medians = {
        who: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "memory_mb")}
        for who, runs in found.items()
    }
    print(title, {who: f"{m['seconds']:.3f} s, {m['memory_mb']:.0f} MB" for who, m in medians.items()}, flush=True)
    return {"medians": medians, "runs": found}


def import_seconds():
    """Of `import rsoups`, beyond an empty process."""

    def once(code):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - started

    pairs = [(once("import rsoups"), once("pass")) for _ in range(9)]
    return statistics.median(a - b for a, b in pairs)


def command_seconds(rounds, folders=()):
    """Of `rsoups interpolate`, the whole process; of `rsoups --help` without folders."""

    def once():
        with tempfile.TemporaryDirectory() as scratch:
            words = ["interpolate", *map(str, folders), "--out", f"{scratch}/out"] if folders else ["--help"]
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "rsoups.cli", *words], check=True, capture_output=True)
            return time.perf_counter() - started

    runs = [once() for _ in range(rounds)]
    return {"seconds": statistics.median(runs), "runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    results = {}
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / str(i) for i in range(8)]
        for i, folder in enumerate(folders):
            make(folder, args.layers, i)
        one_layer = [Path(root) / f"layer{i}" for i in range(2)]
        for i, folder in enumerate(one_layer):
            make(folder, 1, i)
        for method in ("exact", "factors"):
            for n in (2, 4, 8):
                jobs = {who: (folders[:n], method) for who in ("rsoups", "disk", "floor", "peft")}
                results[f"{method} {n}"] = compare(f"{method}, {n} adapters:", jobs, args.rounds)
        jobs = {"rsoups": (one_layer, "svd"), "peft": (one_layer, "svd")}
        results["svd 2, one layer"] = compare("svd, 2 adapters, one layer:", jobs, min(args.rounds, 3))
        jobs = {
            "rsoups 1": (folders[:2], "exact", 1),
            "rsoups 11": (folders[:2], "exact", 11),
            "disk": (folders[:2], "exact", 11),
            "floor": (folders[:2], "exact", 11),
        }
        results["11 soups"] = compare("exact, 2 adapters, 11 soups:", jobs, min(args.rounds, 3))
        commands = {"2 adapters": folders[:2], "2 adapters, one layer": one_layer, "--help": []}
        commands = {name: command_seconds(args.rounds, given) for name, given in commands.items()}
        print("command:", {name: f"{measured['seconds']:.2f} s" for name, measured in commands.items()})
    ratios = {}
    for name, result in results.items():
        seconds = {who: m["seconds"] for who, m in result["medians"].items()}
        for other in seconds.keys() - {"rsoups"}:
            ours = seconds.get("rsoups", seconds.get("rsoups 11"))
            ratios[f"{name}: rsoups / {other}"] = ours / seconds[other]
    report = {
        "command": " ".join(sys.argv),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "import_rsoups_seconds": import_seconds(),
        "command_seconds": commands,
        "ratios": ratios,
        "results": results,
    }
    out = ROOT / "benchmarks/results/interpolate.json"
    if args.layers == 32:
        out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: report[k] for k in ("import_rsoups_seconds", "command_seconds", "ratios")}, indent=2))


if __name__ == "__main__":
    main()
