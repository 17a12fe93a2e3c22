"""Of two things that have one name none is lost: they are told apart, or refused with what to write."""

import json

import pytest
from front_records import records
from tiny import tiny_adapter

import rsoups
from rsoups.bases.load import load_base
from rsoups.cli.main import main
from rsoups.common.assets import named_sources
from rsoups.common.errors import FrontError
from rsoups.rewards.functions import FunctionReward
from rsoups.rewards.interface import rewards_by_name


def test_sources_are_named_by_as_much_of_their_path_as_tells_them_apart(tmp_path, monkeypatch):
    assert named_sources(["a=x/y", "runs/b", "user/c@main"], "adapters") == {
        "a": "x/y",
        "b": "runs/b",
        "c@main": "user/c@main",
    }
    assert named_sources(["s0/final", "s1/final/"], "adapters") == {"s0/final": "s0/final", "s1/final": "s1/final/"}
    alike = ["1/x/records.jsonl", "2/x/records.jsonl", "2/y/records.jsonl"]
    assert list(named_sources(alike, "fronts")) == ["1/x/records", "2/x/records", "y/records"]
    assert list(named_sources(["/a", "x/a"], "adapters")) == ["/a", "x/a"]
    assert named_sources(["MORL 0.5/0.5=x=y"], "others") == {"MORL 0.5/0.5": "x=y"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-3").mkdir()
    assert named_sources(["lr=1e-3"], "adapters") == {"lr=1e-3": "lr=1e-3"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a=x", "a=y"], "two adapters have the name 'a', x and y: give each its own, NAME=SOURCE"),
        (["x/a", "a=y"], "two adapters have the name 'a', x/a and y"),
        (["x/a", "x/a"], "two adapters have the name 'x/a', x/a and x/a"),
        (["=x"], "adapters '=x' has no name or no source"),
        (["a="], "adapters 'a=' has no name or no source"),
    ],
)
def test_two_of_one_name_are_refused(given, words):
    with pytest.raises(rsoups.AdapterError) as error:
        named_sources(given, "adapters")
    assert words in str(error.value)
    with pytest.raises(FrontError):
        named_sources(given, "adapters", FrontError)


def test_two_rewards_of_one_name_are_refused():
    def score(prompts, responses):
        return [0.0] * len(responses)

    first, second = FunctionReward(score, "score"), FunctionReward(score, "other")
    assert rewards_by_name({"a:score": first, "b:other": second}) == {"score": first, "other": second}
    with pytest.raises(rsoups.RewardError, match="two rewards have the name 'score', a:score and b:score"):
        rewards_by_name({"a:score": first, "b:score": FunctionReward(score, "score")})


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Adapters of the embedded policy in folders that end alike, and rewards of one name in two files."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("s0/final", "s1/final")):
        base = load_base("rsoups/tiny-llama")
        tiny_adapter(tmp_path / name, base, seed=seed)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "rsoups/tiny-llama"}))
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("def score(p, r): return [float(len(x)) for x in r]\n")
    return tmp_path


SHORT = ["--prompts", "3", "--points", "2", "--max_new_tokens", "4"]


def test_adapters_that_end_alike_are_both_swept(runs, capsys):
    """On the base that they name, as no other is said."""
    flags = [*SHORT, "--adapters", "s0/final", "s1/final", "--reward", "a:score", "--output_dir", "out"]
    assert main(["sweep", *flags]) == 0
    front = rsoups.Front.from_jsonl("out/records.jsonl")
    assert front.ingredients == ["s0/final", "s1/final"] and len(front.soups) == 2
    assert json.loads((runs / "out" / "records.settings.json").read_text())["base"] == "rsoups/tiny-llama"
    shown = capsys.readouterr().out
    assert (
        shown.index("There is one reward only")
        < shown.index("| base |")
        < shown.index("Whether s0/final, s1/final learned")
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapters", "p=s0/final", "p=s1/final", "--reward", "a:score"], "two adapters have the name 'p'"),
        (["--adapters", "s0/final", "--others", "q=s0/final", "q=s1/final", "--reward", "a:score"], "two others have"),
        (["--adapters", "s0/final", "s1/final", "--reward", "a:score", "b:score"], "two rewards have the name 'score'"),
        (["--adapters", "p=s0/final", "--others", "p=s1/final", "--reward", "a:score"], "['p'] among others"),
    ],
)
def test_a_sweep_of_two_of_one_name_is_refused(runs, capsys, flags, words):
    assert main(["sweep", *SHORT, *flags, "--output_dir", "out"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert words in error[-1] and error[-1].startswith("rsoups: ") and not (runs / "out").exists()


def test_records_that_end_alike_are_all_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in "mxy":
        (tmp_path / folder).mkdir()
        rows = records(n=4)[0]
        (tmp_path / folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["report", "m/records.jsonl", "--reference", "a=-9", "b=-9", "--other"]
    assert main([*command, "x/records.jsonl", "y/records.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "Against x/records (4 common prompts)" in out and "Against y/records (4 common prompts)" in out
    assert main([*command, "z=x/records.jsonl", "z=y/records.jsonl"]) == 2
    assert "two other fronts have the name 'z'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["explore", ".", "--adapters", "a=x", "a=y"], ["verify", "soup", "--ingredient", "a=x", "--ingredient", "a=y"]],
    ids=lambda command: command[0],
)
def test_other_commands_that_take_names(command, capsys):
    assert main(command) == 2
    assert "have the name 'a', x and y" in capsys.readouterr().err
