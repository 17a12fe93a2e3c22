"""benchmarks/gpu.py without a GPU: its parts in tiny shapes, and how it records, limits and survives them."""

import json
import subprocess
import sys

import gpu
import gpu_parts
import pytest
import torch


def started(script):
    """A function that starts a small script in a part's place; `notes` is the file of its figures."""

    def start(part, notes):
        code = f"import json, pathlib, sys, time\nnotes = pathlib.Path({str(notes)!r})\n{script[part]}"
        with notes.with_suffix(".log").open("w") as log:
            command = [sys.executable, "-S", "-c", code]
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    return start


def test_a_part_that_fails_or_exceeds_its_limit_is_recorded_and_the_next_ones_run(tmp_path):
    script = {
        "fails": "notes.write_text(json.dumps({'first': 1})); raise SystemExit('out of memory')",
        "hangs": "notes.write_text(json.dumps({'second': 2})); time.sleep(600)",
        "lacks": "notes.write_text(json.dumps({'skipped': 'there is one card'}))",
        "silent": "raise SystemExit('too early')",
        "decode": "notes.write_text(json.dumps({'machine': {'device': 'x'}, '64 rows': {'live 2 / peft': 1.2}}))",
    }
    out = tmp_path / "results" / "gpu.json"
    results = gpu.run(dict.fromkeys(script, 30) | {"hangs": 1.0}, started(script), out)
    assert json.loads(out.read_text("utf-8")) == results

    parts = results["parts"]
    statuses = {name: part["status"] for name, part in parts.items()}
    assert statuses == {
        "fails": "failed", "hangs": "over its limit", "lacks": "skipped", "silent": "failed", "decode": "done",
    }  # fmt: skip
    assert (parts["fails"]["figures"], parts["hangs"]["figures"], parts["silent"]["figures"]) == (
        {"first": 1}, {"second": 2}, {},
    )  # fmt: skip
    assert parts["fails"]["output"].strip() == "out of memory"
    assert parts["lacks"]["reason"] == "there is one card"
    assert 1.0 <= parts["hangs"]["seconds"] < 30
    assert results["machine"] == {"device": "x"}
    goal = "decode step, 2 adapters over one of PEFT"
    assert results["goals"] == {goal: {"figure": 1.2, "goal": 1.15, "reached": False}}


def test_no_part_starts_when_the_time_is_over(tmp_path):
    script = {"first": "time.sleep(600)", "second": "pass"}
    results = gpu.run({"first": 0.5, "second": 30}, started(script), tmp_path / "gpu.json", seconds=1)
    assert results["parts"]["first"]["status"] == "over its limit"
    assert results["parts"]["second"] == {"status": "skipped", "reason": "1 s are over"}


def test_goals_are_ratios_of_parts_that_have_figures():
    parts = {"ppo": {"figures": {"episodes_per_second": 10.0, "critic_mb": 0.1}}}
    assert set(gpu.goals(parts)) == {"critic's memory, MB"}
    parts["ppo_trl"] = {"figures": {"episodes_per_second": 4.0}}
    found = gpu.goals(parts)["PPO, episodes/s over TRL 1.12's"]
    assert found == {"figure": 2.5, "goal": 2.5, "reached": True}


def test_the_limits_are_of_the_parts():
    assert set(gpu.LIMITS) == set(gpu_parts.PARTS) and gpu.SECONDS <= 480


@pytest.fixture
def rehearsed(tmp_path, monkeypatch):
    """A function that runs a part in this process, as its worker does, and returns its figures."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")

    def part(name):
        notes = tmp_path / f"{name}.json"
        gpu.main(["--worker", name, "--notes", str(notes), "--tiny"])
        figures = json.loads(notes.read_text("utf-8"))
        assert figures.pop("machine")["versions"]["torch"] == torch.__version__
        return figures

    return part


def test_ppo(rehearsed):
    figures = rehearsed("ppo")
    assert figures["episodes_per_second"] > 0 and figures["tokens_per_second"] > 0
    assert figures["critic_mb"] == pytest.approx(4 * 33 * 4 / 2**20)  # 32 weights and a bias, four numbers of each
    shares = figures["share_of_time"]
    assert set(shares) == {"generation", "scoring", "rollout", "update"}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert len(figures["rewards"]) == 2
    for name in ("generation", "update"):
        utilization = figures["model_flops_utilization"][name]
        assert 0 < utilization["of a product's"] < 1


def test_trl_is_not_required(rehearsed):
    assert "pass --trl FOLDER" in rehearsed("ppo_trl")["skipped"]


def test_sweep_and_decode(rehearsed):
    figures = rehearsed("sweep")
    assert figures["same texts"] == "22 of 22" and figures["logits, apart from PEFT's"]["rsoups"] < 1e-5
    assert figures["11 λ / one λ"] == figures["rsoups"] / figures["rsoups, one λ"]
    assert figures["peft / rsoups"] > 0 and figures["paper / rsoups"] > 0
    assert gpu.goals({"decode": {"figures": rehearsed("decode")}}).keys() == {
        "decode step, 2 adapters over one of PEFT", "decode step, 4 adapters over one of PEFT",
    }  # fmt: skip


def test_memory_of_the_configs(rehearsed):
    figures = rehearsed("memory")
    names = {f"{name}, bf16" for name in ("assistant", "news", "reddit", "stack", "review")}
    assert names < set(figures)
    for name in names:
        assert figures[name]["measured"] > 0 and figures[name]["calculated"] > 0
        assert {"base", "adapter", "rewards"} < set(figures[name]["calculated parts"])


def test_resumed_runs(rehearsed):
    figures = rehearsed("resume")
    for name in ("float32", "bfloat16"):
        assert figures[name]["resumed, largest difference"] == 0.0 == figures[name]["run again, largest difference"]
        assert figures[name]["largest number"] > 0


def test_a_base_in_4_bit(rehearsed):
    pytest.importorskip("bitsandbytes")
    figures = rehearsed("qlora")
    assert figures["finite"] and len(figures["rewards"]) == 2 and figures["episodes_per_second"] > 0
