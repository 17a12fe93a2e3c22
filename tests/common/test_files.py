"""JSON lines, names on the Hub, and one run in a folder."""

import gzip
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from rsoups import DatasetError, OutputError, VotesError
from rsoups.common.files import is_hub_id, is_hub_name, only_run_in, read_jsonl, whole_folder, writing


def test_json_lines_plain_and_compressed(tmp_path):
    lines = '{"a": "\u2028 in a text"}\n\n{"a": 2}\r\n'
    (tmp_path / "rows.jsonl").write_bytes(lines.encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert read_jsonl(tmp_path / name) == [{"a": "\u2028 in a text"}, {"a": 2}]

    places = []
    read_jsonl(tmp_path / "rows.jsonl", check=lambda where, value: places.append((where, value["a"])))
    assert places[1] == (f"{tmp_path / 'rows.jsonl'}, line 3", 2)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"{}\n{", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"\xff", "cannot read .*a.jsonl"),
        ("a.jsonl.gz", b"{}", "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot read .*a.jsonl.gz"),
        ("a.jsonl", None, "cannot read .*a.jsonl: No such file"),
    ],
)
def test_json_lines_that_cannot_be_read(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    for refusal in (DatasetError, VotesError):
        with pytest.raises(refusal, match=message):
            read_jsonl(tmp_path / name, refusal)


@pytest.mark.parametrize(
    ("source", "is_id", "is_name"),
    [
        ("user/name", True, True),
        ("user/name@v1", True, False),
        ("user/name/sub/folder@refs/pr/1", True, False),
        ("../name", False, False),
        ("user/..", False, False),
        ("name", False, False),
        ("/a/b", False, False),
    ],
)
def test_ids_on_the_hub(source, is_id, is_name):
    assert (is_hub_id(source), is_hub_name(source)) == (is_id, is_name)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    """Killed or ended, it leaves no lock; and no file, if it ended."""
    folder = tmp_path / "run"
    code = f"""
import time
from rsoups.common.files import only_run_in
with only_run_in({str(folder)!r}):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another run is writing into"), only_run_in(folder):
            pytest.fail("both run")
        first.kill()

    for _ in range(2):
        with only_run_in(folder):
            assert list(folder.iterdir())
        assert not list(folder.iterdir())


@contextmanager
def room_for(size):
    """A context in which no file can have more bytes: as on a full disk, libraries find out while they write."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


WRITERS = {
    "Python": lambda path, tensors: path.write_bytes(bytes(10_000)),
    "safetensors": lambda path, tensors: save_file(tensors, path),
    "torch": lambda path, tensors: torch.save(tensors, path),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_one_line_whichever_library_writes(tmp_path, library):
    tensors = {"a": torch.zeros(4_000)}
    refused = pytest.raises(OutputError, match=r"^cannot write .*out: .*(too large|disk full)[^\n]*; again$")
    with room_for(4_000), refused, writing(tmp_path / "out", "; again"):
        WRITERS[library](tmp_path / "file", tensors)
    refused = pytest.raises(OutputError, match=r"^cannot write .*folder: [^\n]*$")
    with room_for(4_000), refused, whole_folder(tmp_path / "folder", "marker") as partial:
        WRITERS[library](partial / "file", tensors)
    assert [path.name for path in tmp_path.iterdir() if path.name != "file"] == []


def test_an_error_that_is_not_the_disks_is_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path):
        raise RuntimeError("shapes differ")
