"""Pickles become safetensors in a child process, tensors only; what holds more is refused and leaves no trace."""

import collections
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile

import huggingface_hub.constants
import pytest
import torch
from edited import ALPACA
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_adapter, tiny_classifier, tiny_llama
from transformers import AutoModelForCausalLM

import rsoups
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.convert import convert
from rsoups.adapters.lineage import manifest_of
from rsoups.adapters.lineage_tree import log
from rsoups.bases.load import load_base
from rsoups.cli.main import main
from rsoups.common.pickles import converted
from rsoups.common.unpickle import RefusedError, tensors_of

OLD = ALPACA | {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def pickled(folder, **options):
    """A folder's safetensors turned into the pickle of its kind."""
    for path in list(folder.glob("*.safetensors")):
        name = {"adapter_model": "adapter_model.bin", "model": "pytorch_model.bin"}[path.stem]
        torch.save(load_file(path), folder / name, **options)
        path.unlink()
    return folder


@pytest.fixture
def old_adapter(tmp_path):
    folder = pickled(tiny_adapter(tmp_path / "alpaca", r=4, target_modules=["q_proj", "v_proj"]))
    (folder / "adapter_config.json").write_text(json.dumps(OLD))
    (folder / "README.md").write_text("a card")
    (folder / "modeling.py").write_text("print('code')")
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    return folder


def test_an_adapter_of_2023(tmp_path, old_adapter, capsys):
    before = torch.load(old_adapter / "adapter_model.bin", weights_only=True)
    out = convert(old_adapter, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lineage.json",
    }
    assert (out / "adapter_config.json").read_bytes() == (old_adapter / "adapter_config.json").read_bytes()
    after = load_file(out / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    told = capsys.readouterr().out
    original = rsoups.common.files.sha256_of(old_adapter / "adapter_model.bin")
    assert told.splitlines()[0] == f"opening {old_adapter}: adapter_model.bin (SHA-256 {original[:12]})"
    manifest = manifest_of(out)
    assert manifest["sha256"] == rsoups.common.files.sha256_of(out / "adapter_model.safetensors")
    assert (manifest["parents"][0]["sha256"], manifest["parents"][0]["name"]) == (original, "original")
    assert log(manifest, "out").splitlines()[1].startswith("└── original (alpaca)")

    ids = torch.arange(4, 12)[None]
    by_peft = PeftModel.from_pretrained(tiny_llama(), out, config=read_adapter(out).config)(ids).logits
    ours = rsoups.interpolate([out], [1.0]).load(tiny_llama())(ids).logits
    assert torch.allclose(by_peft, ours, atol=1e-5) and not torch.allclose(ours, tiny_llama()(ids).logits, atol=1e-3)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_the_same_bytes_come_out_and_shared_storages_are_told_apart(tmp_path, zipped):
    whole = torch.arange(24.0).view(4, 6)
    tensors = collections.OrderedDict(
        embedding=whole,
        head=whole,  # tied
        top=whole[:2],
        bottom=whole[2:],
        transposed=whole.T,
        column=whole[:, 1],
        trained=torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        half=torch.ones(2, dtype=torch.float16),
        ids=torch.arange(5),
        mask=torch.tensor([True, False]),
        number=torch.tensor(3.5, dtype=torch.float64),
        empty=torch.zeros(0, 4),
    )
    tensors._metadata = {"": {"version": 1}}
    torch.save(tensors, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    first, second = (convert(tmp_path / "weights.pt", tmp_path / name) / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    found = load_file(first)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


def test_a_model_in_several_files(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    names, folder = sorted(tensors), tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", folder)
    files = {name: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))

    with pytest.raises(rsoups.CheckpointError, match=f"rsoups convert {folder} --out pickled-safetensors"):
        load_base(str(folder))
    out = convert(folder, tmp_path / "out")
    ids = torch.arange(4, 12)[None]
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again(ids).logits, model(ids).logits)
    soup = rsoups.interpolate_checkpoints([out, tmp_path / "whole"], [0.5, 0.5], tmp_path / "soup", progress=False)
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(soup)(ids).logits, model(ids).logits, atol=1e-6)
    assert set(manifest_of(out)["parents"][0]["sha256"]) == set(files.values())

    del files[names[0]]
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(rsoups.CheckpointError, match=f"its files differ on {names[0]}"):
        convert(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_each_reader_names_the_command_and_then_reads_the_conversion(tmp_path, old_adapter, home):
    tiny_classifier(tmp_path / "reward", "electra")
    (tmp_path / "card.yaml").write_text(f"name: mine\nmodel: {tmp_path / 'reward'}\n")
    expected = rsoups.load_reward(str(tmp_path / "card.yaml"))(["w1 w2"], ["w3"])
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    for name in ("reward", "base"):
        pickled(tmp_path / name)

    readers = {
        "alpaca": lambda: rsoups.interpolate([old_adapter], [1.0]),
        "base": lambda: load_base(str(tmp_path / "base")),
        "reward": lambda: rsoups.load_reward(str(tmp_path / "card.yaml")),
    }
    for name, read in readers.items():
        with pytest.raises(rsoups.RsoupsError, match=f"run: rsoups convert {tmp_path / name} --out {name}-safetensors"):
            read()
        assert converted(str(tmp_path / name)) is None
        folder = convert(tmp_path / name)
        assert folder.is_relative_to(home) and convert(tmp_path / name) == converted(str(tmp_path / name)) == folder
    assert readers["reward"]()(["w1 w2"], ["w3"]) == expected
    ids = torch.arange(4, 12)[None]
    assert torch.equal(readers["base"]()(ids).logits, model(ids).logits)
    soup = readers["alpaca"]()
    assert soup.ingredients[0].sha256 == manifest_of(converted(str(old_adapter)))["sha256"]
    assert list(soup.lineage["history"][soup.ingredients[0].sha256]["parents"][0]) == [
        "name",
        "source",
        "revision",
        "sha256",
    ]
    with pytest.raises(rsoups.CheckpointError, match="rsoups convert"):
        rsoups.interpolate_checkpoints([pickled(tiny_classifier(tmp_path / "r2", "gpt2"))], [1.0], tmp_path / "x")


# --- what is refused ---------------------------------------------------------------------------------------------------


class Call:
    """A pickle that calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def deflated(path):
    """A file whose entries torch would map without unpacking them."""
    torch.save({"w": torch.zeros(2**10)}, path)
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in entries.items():
            new.writestr(name, data)


HOSTILE = {
    "zip": lambda trace: Call(trace.touch),
    "in an entry": lambda trace: {"w": torch.ones(2), "x": Call(os.system, f"touch {trace}")},
    "before torch 1.6": lambda trace: collections.OrderedDict(w=Call(exec, f"import os; os.mkdir({str(trace)!r})")),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_calls_something_is_refused_and_leaves_no_trace(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    weights, trace = source / "pytorch_model.bin", tmp_path / "trace"
    torch.save(HOSTILE[kind](trace), weights, _use_new_zipfile_serialization=kind != "before torch 1.6")
    assert "it asks for " in refused_without_a_trace(source, tmp_path)
    torch.load(weights, weights_only=False)
    assert trace.exists(), "the pickle does no harm: the test tests nothing"


OTHER_THINGS = {
    "it holds a list": [torch.ones(2)],
    "its entry 'step' is a int": {"w": torch.ones(2), "step": 3},
    "its entry 'state_dict' is a dict": {"state_dict": {"w": torch.ones(2)}},
    "its entry 0 is a Tensor": {0: torch.ones(2)},
    "its tensor 'w' is of a kind": {"w": torch.ones(2, dtype=torch.complex64)},
    "its tensor 'v' is of a kind": {"v": torch.ones(2, device="meta")},
    "its tensor 'u' is larger than its values": {"u": torch.ones(1).expand(2**20, 2**20)},
    "larger than 4 times the file": dict.fromkeys((f"w{i}" for i in range(40)), torch.zeros(2**21)),
}


@pytest.mark.parametrize("reason", OTHER_THINGS)
def test_what_is_not_tensors_by_name_is_refused(reason):
    with pytest.raises(RefusedError, match=reason):
        tensors_of(OTHER_THINGS[reason], 2**23)


def refused_without_a_trace(source, folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(rsoups.CheckpointError, match="is not converted, and nothing of it was run") as told:
        convert(source, folder / "out", say=lambda line: None)
    assert "weights_only" not in str(told.value) and "\n" not in str(told.value)
    assert sorted(folder.rglob("*")) == before
    return str(told.value)


@pytest.mark.parametrize("make", [deflated, lambda path: path.write_bytes(b"no pickle")])
def test_files_that_are_no_plain_pickles(tmp_path, make):
    make(tmp_path / "weights.pt")
    refused_without_a_trace(tmp_path / "weights.pt", tmp_path)


def test_a_cut_file(tmp_path):
    torch.save({"w": torch.ones(2**12)}, tmp_path / "whole.pt")
    (tmp_path / "weights.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:9000])
    refused_without_a_trace(tmp_path / "weights.pt", tmp_path)


HARM = [
    "socket.create_connection(('127.0.0.1', PORT), 5)",
    "urllib.request.urlopen(f'http://127.0.0.1:{PORT}')",
    "os.system('touch trace')",
    "subprocess.run(['touch', 'trace'])",
    "os.fork()",
    "open('trace', 'w')",
    "os.open('trace', os.O_CREAT | os.O_WRONLY)",
    "os.remove('kept')",
    "shutil.rmtree('.')",
    "os.rename('kept', 'trace')",
    "ctypes.CDLL('libm.so.6')",
]
CHILD = """
import sys, os, socket, subprocess, shutil, ctypes, urllib.request
import rsoups.common.unpickle as child
PORT = int(sys.argv[1])
sys.addaudithook(child.forbid)
for code in sys.argv[2:]:
    try:
        exec(code)
        print("done:", code)
    except child.RefusedError:
        print("refused:", code)
"""


def test_the_child_could_do_nothing_even_if_code_ran(tmp_path):
    (tmp_path / "kept").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        command = [sys.executable, "-c", CHILD, str(server.getsockname()[1]), *HARM]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        with pytest.raises(TimeoutError):
            server.accept()
    assert run.stdout.splitlines() == [f"refused: {code}" for code in HARM]
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["kept"]


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_the_child_has_no_network_of_the_system(tmp_path):
    script = "import rsoups.common.unpickle as c; c.leave_network(); import os; print(sorted(os.listdir('/proc/self/net')) and "
    script += "[line.split(':')[0].strip() for line in open('/proc/self/net/dev').readlines()[2:]])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['lo']"


def test_memory_is_bounded():
    script = "import rsoups.common.unpickle as c; c.limit_memory(2**26); bytearray(2**27)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode and "MemoryError" in run.stderr


def test_neither_tokens_nor_switches_of_the_environment_reach_the_child(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    seen = []

    def run(*arguments, env, **options):
        seen.append(env)
        return subprocess.run([sys.executable, "-c", "import sys; sys.exit('...')"], **options)

    monkeypatch.setattr("rsoups.adapters.convert.subprocess", type("", (), {"run": run, "DEVNULL": subprocess.DEVNULL}))
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(rsoups.CheckpointError, match="ended with status 1"):
        convert(tmp_path / "weights.pt", tmp_path / "out")
    assert seen and not {"HF_TOKEN", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"} & seen[0].keys()


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["config.json"], "no weights in .bin/.pt/.pth/.ckpt"),
        (["model.safetensors", "pytorch_model.bin"], "holds safetensors already"),
        (["a.pt", "b.pt"], "several (a.pt, b.pt): name one of the files"),
        (["optimizer.pt", "training_args.bin"], "no weights in"),
    ],
)
def test_what_there_is_to_convert_is_told(tmp_path, files, reason, capsys):
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rsoups: ") and reason in line


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "weights.pt")
    convert(tmp_path / "weights.pt", tmp_path / "out")
    with pytest.raises(rsoups.OutputError, match="choose another folder"):
        convert(tmp_path / "weights.pt", tmp_path / "out")
