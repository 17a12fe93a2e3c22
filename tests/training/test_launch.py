"""Training runs as processes: side by side, each with its progress, under a final name only once whole."""

import json
import sys
from types import SimpleNamespace

import pytest

from rsoups import TrainingError
from rsoups.training import launch
from rsoups.training.callbacks import ProgressFile, launcher_callbacks
from rsoups.training.configs import config_path, with_config_path
from rsoups.training.launch import PROGRESS_FILE, Run, last_progress, run_step, train_all

# A recipe that waits for the other run, so that only runs side by side end; then it says how far it is.
RECIPE = """
import json, os, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = Path(flags["--output_dir"])
print("threads", os.environ["OMP_NUM_THREADS"])
(out / "adapter").write_text(flags["--reward"])
other = out.parent / flags["--waits_for"]
for _ in range(1000):
    if (other / "adapter").exists() or other.with_suffix("").is_dir():
        break
    time.sleep(0.01)
else:
    sys.exit("the other run never started")
with open(os.environ["RSOUPS_PROGRESS_FILE"], "a") as file:
    for step in (1, 2):
        file.write(json.dumps({"step": step, "steps": 2, "reward": 0.5 * step}) + "\\n")
if flags["--reward"] == "bad":
    print("CUDA is on fire")
    sys.exit(3)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.setattr(launch, "shipped", lambda folder: tmp_path)
    monkeypatch.setattr(launch, "_LAUNCH", [])  # plain python in place of accelerate, which takes seconds to start
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return "recipe.py"


def runs(tmp_path, *rewards):
    first, second = rewards
    return [
        Run(f"PPO on {reward}", tmp_path / f"ppo-{reward}", ["--reward", reward, "--waits_for", f"ppo-{other}.partial"])
        for reward, other in ((first, second), (second, first))
    ]


def test_runs_are_side_by_side_and_get_their_names_when_they_are_whole(recipe, tmp_path, capsys):
    train_all(runs(tmp_path, "a", "b"), recipe)
    for reward in "ab":
        folder = tmp_path / f"ppo-{reward}"
        assert (folder / "adapter").read_text() == reward
        assert (folder / "log.txt").read_text() == "threads 1\n", "two runs share two cores"
        assert not folder.with_name(f"{folder.name}.partial").exists()
    shown = capsys.readouterr()
    assert "PPO on a: 100%" in shown.err and "2/2" in shown.err and "reward=1.00" in shown.err

    train_all(runs(tmp_path, "a", "b"), recipe)
    assert capsys.readouterr().out.count("already there") == 2


def test_the_number_of_threads_that_the_user_set_stays(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    train_all(runs(tmp_path, "a", "b"), recipe)
    assert (tmp_path / "ppo-a" / "log.txt").read_text() == "threads 3\n"


def test_a_failed_run_is_named_with_its_log_and_the_others_are_kept(recipe, tmp_path, capsys):
    with pytest.raises(
        TrainingError, match=r"^PPO on bad: failed with exit code 3 \(its log: .*ppo-bad.partial/log.txt"
    ):
        train_all(runs(tmp_path, "a", "bad"), recipe)
    assert "CUDA is on fire" in capsys.readouterr().err
    assert (tmp_path / "ppo-a").is_dir() and not (tmp_path / "ppo-bad").exists()


def test_a_step_that_fails_stops_the_recipe():
    run_step("works", ["-c", "pass"])
    with pytest.raises(TrainingError, match="breaks: failed with exit code 4"):
        run_step("breaks", ["-c", "import sys; sys.exit(4)"])


def test_progress_is_of_whole_lines(tmp_path):
    assert last_progress(tmp_path / "progress") is None
    (tmp_path / "progress").write_text('{"step": 1, "steps": 9}\n{"step": 2, "st')
    assert last_progress(tmp_path / "progress") == {"step": 1, "steps": 9}


def test_a_run_under_a_launcher_writes_its_progress(tmp_path, monkeypatch):
    assert launcher_callbacks() == []
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "progress"))
    (callback,) = launcher_callbacks()
    assert isinstance(callback, ProgressFile)
    state = SimpleNamespace(global_step=1, max_steps=3, is_world_process_zero=True)
    callback.on_step_end(None, state, None)
    callback.on_log(None, state, None, {"reward": 0.25, "kl": 2.0, "epoch": 0.1})
    state.global_step = 2
    callback.on_step_end(None, state, None)
    callback.on_step_end(None, SimpleNamespace(global_step=2, max_steps=3, is_world_process_zero=False), None)
    lines = [json.loads(line) for line in (tmp_path / "progress").read_text().splitlines()]
    assert lines == [{"step": 1, "steps": 3}, {"step": 2, "steps": 3, "reward": 0.25, "kl": 2.0}]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config", "llama7b-news", "--seed", "1"], ["--config", str(config_path("llama7b-news")), "--seed", "1"]),
        (["--config=embedded.yaml"], ["--config", str(config_path("embedded"))]),
        (["--config", "recipes/configs/embedded.yaml"], ["--config", str(config_path("embedded"))]),
        (["--config", "nothing"], ["--config", "nothing"]),
        (["--config", sys.executable], ["--config", sys.executable]),
        (["--resume"], ["--resume"]),
    ],
)
def test_a_config_that_ships_is_known_by_its_name(tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    assert with_config_path(flags) == expected
