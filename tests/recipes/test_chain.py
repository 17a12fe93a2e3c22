"""From adapters to the report on the embedded models, short: PPO, soups, a sweep."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from forked import warm_python
from places import RECIPES
from recipe_runs import SHORT, launch

import rsoups
from rsoups.common.files import read_jsonl


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short PPO run for each of two rewards, and the first one again, side by side."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, reward):
        launch(RECIPES / "ppo_reward.py", "--reward", reward, "--output_dir", root / name, *SHORT)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, ("naturalness", "coverage", "again"), ("naturalness", "coverage", "naturalness")))
    return root


def test_the_same_seed_gives_the_same_adapter(runs):
    first, again, other = (
        (runs / name / "adapter_model.safetensors").read_bytes() for name in ("naturalness", "again", "coverage")
    )
    assert first == again and first != other


def test_the_adapter_names_its_base_as_the_user_did(runs):
    config = json.loads((runs / "coverage" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "rsoups/tiny-llama"


def test_from_adapters_to_the_report(runs, tmp_path):
    """With `--method factors` too, both runs start from one initialization; then on a dataset's own prompts and references."""
    adapters = [f"{name}={runs / name}" for name in ("naturalness", "coverage")]
    flags = ["--adapters", *adapters, "--reward", "naturalness", "coverage", "--others", f"MORL={runs / 'again'}"]
    flags += ["--prompts", "6", "--points", "3", "--max_new_tokens", "8"]
    rows = [{"words": f"dog, run {i % 6}", "reference": "a dog runs"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(
        "def said(prompts, responses, references): return [float(len(r)) for r in references]"
    )
    own = {"exact": ["--ensemble", "true", "--held_out_reward", "rating"]}
    own["factors"] = [
        "--task",
        "custom",
        "--dataset",
        "rows.jsonl",
        "--template",
        "Use {words}:",
        "--samples",
        "2",
        "--split",
        "all",
    ]
    own["factors"] += ["--held_out_reward", "mine:said"]
    for method in ("exact", "factors"):
        out = tmp_path / method
        command = [warm_python(), str(RECIPES / "sweep.py"), *flags, *own[method], "--method", method]
        run = subprocess.run(
            [*command, "--output_dir", str(out)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert "| λ 0.5 / 0.5 |" in run.stdout and "| MORL |" in run.stdout
        records = read_jsonl(out / "records.jsonl")
        assert len(records) == 6 * (6 if method == "exact" else 5 * 2)
        assert {"front.png", "report.html", "report.md"} <= {path.name for path in out.iterdir()}
        front = rsoups.Front.from_jsonl(out / "records.jsonl")
        held_out = "rating" if method == "exact" else "said"
        assert front.rewards == sorted(["coverage", "naturalness", held_out]) and len(front.soups) == 3
        settings = json.loads((out / "records.settings.json").read_text())
        assert settings["held_out"] == [held_out] and settings["base"] == "rsoups/tiny-llama"
        assert (out / settings["adapters"]["coverage"]).resolve() == runs / "coverage"
        if method == "factors":
            assert {r["prompt"] for r in records} == {f"Use dog, run {i}:" for i in range(6)}
            assert all(r["rewards"]["said"] == 1 for r in records), "one reference for each prompt"
