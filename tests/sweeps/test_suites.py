"""Test suites of models, on the embedded ones."""

import json

import numpy as np
import pytest
import yaml
from front_records import record
from tiny import tiny_adapter
from transformers import AutoModelForCausalLM

import rsoups
from rsoups.adapters.lineage import write_manifest
from rsoups.cli.main import main
from rsoups.common.assets import resolve
from rsoups.data.training_data import prompt_marks
from rsoups.sweeps.suites import Suite, _regressions, run_suite

BASE = "rsoups/tiny-llama"


@pytest.fixture(scope="module")
def soup(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soup")
    paths = []
    for seed, name in enumerate("ab"):
        base = AutoModelForCausalLM.from_pretrained(resolve(BASE))
        paths.append(tiny_adapter(folder / name, base, seed=seed, lora_alpha=1))
    rsoups.interpolate(paths).save_pretrained(folder / "soup")
    return folder / "soup"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "suite_rewards.py").write_text("def ones(prompts, responses): return [1.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def suite(folder, *require, **more):
    path = folder / "suite.yaml"
    sets = [{"prompts": 4, "require": list(require)}]
    path.write_text(yaml.safe_dump({"base": BASE, "max_new_tokens": 4, "temperature": 0.7, "sets": sets} | more))
    return path


def test_thresholds(soup, mine, capsys):
    path = suite(mine, "suite_rewards:ones >= 1", "suite_rewards:ones < 1.5")
    assert main(["test", str(soup), "--suite", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and shown[0].startswith(
        "ok      set 1 (concepts, 4 prompts): suite_rewards:ones 1.000 [1.000, 1.000]"
    )
    path = suite(mine, "suite_rewards:ones >= 1", "suite_rewards:ones > 1", "coverage >= 50")
    assert main(["test", str(soup), "--suite", str(path)]) == 2
    out, err = capsys.readouterr()
    assert [line[:6] for line in out.splitlines()] == ["ok    ", "FAILED", "FAILED"]
    assert "rsoups: 2 of 3 checks failed, the first: set 1" in err


def test_no_step_back_from_a_parent(soup, mine):
    checks = run_suite(Suite.read(suite(mine, "suite_rewards:ones >= 0", against=str(soup))), soup)
    assert [check.passed for check in checks] == [True, True] and "0.000 [0.000, 0.000] against" in checks[1].text


def test_prompts_that_the_model_was_trained_on_are_refused_unless_allowed(mine, capsys):
    (mine / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"dog {i}"}) for i in range(20)))
    base = AutoModelForCausalLM.from_pretrained(resolve(BASE))
    model = tiny_adapter(mine / "model", base, lora_alpha=1)
    data = {"dataset": "rows.jsonl", "prompt_marks": prompt_marks([f"dog {i}" for i in range(19)])}
    told = {"base": {"model": BASE, "revision": None}, "recipe": "r.py", "config": {}, "seed": 0, "parent": None}
    write_manifest(model, "ppo", **told, data=data)
    sets = [{"task": "custom", "dataset": "rows.jsonl", "require": ["suite_rewards:ones >= 1"]}]
    command = ["test", str(model), "--suite"]
    assert main([*command, str(suite(mine, sets=sets))]) == 2
    assert "of 2 prompts, model on 1 were trained on" in capsys.readouterr().err

    for more, flag in (({}, ["--allow_trained_prompts"]), ({"allow_trained_prompts": True}, [])):
        assert main([*command, str(suite(mine, sets=sets, **more)), *flag]) == 0
        assert "set 1 (custom, 2 prompts; model was trained on 1): suite_rewards:ones" in capsys.readouterr().out
    with pytest.raises(rsoups.SuiteError, match="allow_trained_prompts is 'yes': input should be a valid boolean"):
        Suite.read(suite(mine, sets=sets, allow_trained_prompts="yes"))


@pytest.mark.parametrize(("fall", "tolerance", "passed"), [(0.5, 0.0, False), (0.5, 0.6, True), (0.0, 0.0, True)])
def test_a_step_back_is_one_by_more_than_its_interval(fall, tolerance, passed):
    noise = np.random.default_rng(0).normal(size=(50, 2)) * 0.2
    rows = []
    for i, (own, others) in enumerate(noise):
        rows.append(record("soup", {"model": 1.0}, f"prompt {i}", r=1 - fall + own))
        rows.append(record("parent", None, f"prompt {i}", r=1 + others))
    (check,) = _regressions(rsoups.Front.from_records(rows), tolerance, "set 1", "parent/")
    difference = noise[:, 0] - noise[:, 1] - fall
    assert check.passed is passed and f"r {difference.mean():.3f} [" in check.text


def test_a_push_that_does_not_pass_is_not_made(soup, mine, capsys):
    path = suite(mine, "suite_rewards:ones >= 2")
    assert main(["push", str(soup), "someone/soup", "--dry-run", "--require", str(path)]) == 2
    assert "1 of 1 checks failed" in capsys.readouterr().err and not (mine / "soup-dry-run").exists()
    path = suite(mine, "suite_rewards:ones >= 1")
    assert main(["push", str(soup), "someone/soup", "--dry-run", "--require", str(path)]) == 0
    assert (mine / "soup-dry-run" / "README.md").is_file()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "should be an object"),
        ({"sets": []}, "field sets is .*at least one"),
        ({"sets": [{"require": ["coverage"]}]}, r"sets.0.require.0 is .*invalid limit"),
        ({"sets": [{"require": ["coverage >= high"]}]}, r"sets.0.require.0 is .*invalid limit"),
        ({"sets": [{"require": []}]}, "field sets.0.require is .*at least one"),
        ({"sets": [{"task": "concepts"}]}, "field sets.0.require is missing"),
        ({"sets": [{"require": ["a > 1"], "task": "x"}]}, "task is 'x'"),
        ({"sets": [{"require": ["a > 1"], "tasks": "x"}]}, "unknown field sets.0.tasks"),
        ({"sets": [{"require": ["a > 1"]}], "tolerance": -1}, "tolerance is -1"),
        ("a: [", "cannot read the suite"),
    ],
)
def test_a_suite_that_is_none_is_refused(tmp_path, data, said):
    path = tmp_path / "suite.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    with pytest.raises(rsoups.SuiteError, match=said):
        Suite.read(path)


def test_a_set_of_one_file_is_its_held_out_part_with_the_columns_of_its_rewards(soup, mine):
    rows = [{"prompt": f"dog {i}", "spec": {f"k{i}": i}} for i in range(20)]
    (mine / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (mine / "suite_columns.py").write_text(
        "def number(prompts, responses, spec):\n"
        "    assert all(p == f'dog {n}' for p, s in zip(prompts, spec) for n in s.values())\n"
        "    return [float(n) for s in spec for n in s.values()]\n"
    )
    sets = {"task": "custom", "dataset": "rows.jsonl", "require": ["suite_columns:number >= 0"]}
    for split, told in (
        (None, "2 prompts): suite_columns:number 18.5"),
        ("all", "20 prompts): suite_columns:number 9.5"),
    ):
        path = suite(mine, sets=[sets | ({"split": split} if split else {})])
        (check,) = run_suite(Suite.read(path), soup)
        assert check.passed and told in check.text
    with pytest.raises(rsoups.SuiteError, match="split is 'train'"):
        Suite.read(suite(mine, sets=[sets | {"split": "train"}]))
