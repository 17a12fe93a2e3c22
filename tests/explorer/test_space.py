"""A written Space: what is in it, what is not, and that it runs."""

import json
import shutil
import socket

import httpx
import pytest
import torch
import yaml
from browser import served
from explored import NAMES

import rsoups
from rsoups.cli.main import main
from rsoups.explorer.sweep_folder import SweepFolder


@pytest.fixture(scope="module")
def space(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "space"
    assert main(["explore", str(folder), "--export", str(out)]) == 0
    return out


def test_it_holds_what_it_needs_and_nothing_else(space, folder):
    files = sorted(str(path.relative_to(space)) for path in space.rglob("*") if path.is_file())
    adapter = ["adapter_config.json", "adapter_model.safetensors", "soup.json"]
    copied = [f"adapters/{number}-{name}/{file}" for number, name in enumerate(NAMES, 1) for file in adapter]
    own = ["README.md", "app.py", "records.jsonl", "records.settings.json", "requirements.txt"]
    assert files == sorted([*own, *copied])
    for path in space.rglob("*"):
        assert path.is_dir() or str(folder.parent).encode() not in path.read_bytes()
    assert (space / "records.jsonl").read_bytes() == (folder / "records.jsonl").read_bytes()
    found = SweepFolder.read(space)
    assert found.base == "rsoups/tiny-llama" and found.settings.max_new_tokens == 12
    for name in NAMES:
        ours, theirs = (
            rsoups.interpolate([a], [1.0]).state_dict for a in (found.adapters[name], folder / f"ppo-{name}")
        )
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_its_card_is_one_of_a_gradio_space(space):
    _, head, body = (space / "README.md").read_text("utf-8").split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["sdk"] == "gradio" and metadata["app_file"] == "app.py" and metadata["python_version"] == "3.11"
    assert metadata["sdk_version"].startswith("6.") and len(metadata["short_description"]) <= 60
    assert "models" not in metadata and "rsoups/tiny-llama" in body  # the embedded base is on no Hub
    pinned = (space / "requirements.txt").read_text().splitlines()
    assert pinned[0].startswith(f"rsoups[app]=={rsoups.__version__}") and all("==" in line for line in pinned)


def test_it_runs(space, tmp_path):
    copy = shutil.copytree(space, tmp_path / "elsewhere")
    with served(["app.py"], copy, tmp_path / "log.txt", HF_HUB_OFFLINE="1") as url:
        assert "Rewarded soups: letters, words" in httpx.get(url).text
        config = httpx.get(f"{url}/config").json()
        names = {dependency["api_name"] for dependency in config["dependencies"]}
        assert {"_read", "_ask"} <= names and not {"_save", "_push"} & names
        assert str(copy) not in json.dumps(config)


def test_models_on_the_hub_are_named(folder, tmp_path, monkeypatch):
    read = rsoups.explorer.space.read_adapter
    monkeypatch.setattr(
        rsoups.explorer.sweep_folder,
        "read_adapter",
        lambda source: read(folder / f"ppo-{source.rpartition('-')[2].removesuffix('@main')}"),
    )
    hub = {name: f"user/run-{name}@main" for name in NAMES}
    rsoups.write_space(folder, tmp_path / "space", base="user/base", adapters=hub)
    settings = json.loads((tmp_path / "space" / "records.settings.json").read_text())
    assert settings["adapters"] == hub and settings["base"] == "user/base"
    metadata = yaml.safe_load((tmp_path / "space" / "README.md").read_text("utf-8").split("---\n", 2)[1])
    assert metadata["models"] == ["user/base", "user/run-letters", "user/run-words"]
    assert not (tmp_path / "space" / "adapters").exists()


def test_what_cannot_be_a_space(folder, tmp_path, capsys):
    with pytest.raises(rsoups.AdapterError, match="is a folder here: publish it, and say --base user/name"):
        rsoups.write_space(folder, tmp_path / "space", base=str(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(rsoups.OutputError, match="choose a new folder"):
        rsoups.write_space(folder, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert main(["explore"]) == 2
    assert "rsoups demo" in capsys.readouterr().err
    assert main(["explore", str(folder), "--adapters", "x"]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_the_work(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["explore", str(tmp_path), "--port", str(port)]) == 2
        assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert main(["explore", str(tmp_path), "--port", "99999"]) == 2
    assert "choose another --port" in capsys.readouterr().err
