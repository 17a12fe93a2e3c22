"""A run that was cut anywhere and resumed ends as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from forked import warm_python
from places import HELPERS
from ppo_runs import CUT, pays_for_one_word, trainer

from rsoups import OutputError, RewardError, TrainingError
from rsoups.common.files import only_run_in
from rsoups.training.checkpoints import finish_checkpoint, is_complete, last_checkpoint


def adapter(run, folder):
    run.save_model(str(folder))
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def state(run):
    head = run.model.get_base_model().value_head
    return run.kl_controller.coef, head.weight.tolist(), head.bias.tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, **CUT)
    run.train()
    return folder / "run", adapter(run, folder / "adapter"), state(run)


# Inside a rollout, at its end, in its second epoch, at the data's end, in the data's second epoch.
@pytest.mark.parametrize("step", [1, 3, 4, 8, 9, 13])
def test_resuming_at_any_step_ends_with_the_same_adapter_bit_for_bit(whole, tmp_path, step):
    folder, expected, expected_state = whole
    torch.manual_seed(step)  # whatever the process did before
    run = trainer(tmp_path, **CUT)
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert run.state.global_step == 14
    assert state(run) == expected_state
    assert adapter(run, tmp_path / "adapter") == expected


def test_true_takes_the_newest_complete_checkpoint_or_begins(whole, tmp_path):
    fresh = trainer(tmp_path / "fresh", **CUT | {"max_steps": 2, "save_steps": 50})
    fresh.train(resume_from_checkpoint=True)
    assert fresh.state.global_step == 2

    shutil.copytree(whole[0], tmp_path / "run")
    for step in (12, 13, 14):  # a cut write, a cut copy, a folder of another kind
        weights = tmp_path / "run" / f"checkpoint-{step}" / "value_head.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-11"
    run = trainer(tmp_path, **CUT)
    run.train(resume_from_checkpoint=True)
    assert adapter(run, tmp_path / "adapter") == whole[1]
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-14", "the broken ones were written again"


def test_only_so_many_checkpoints_are_kept_and_no_partial_one(tmp_path):
    run = trainer(tmp_path, **CUT | {"save_total_limit": 2, "max_steps": 6})
    run.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == [
        "checkpoint-5",
        "checkpoint-6",
    ]
    assert all(is_complete(path) for path in (tmp_path / "run").glob("checkpoint-*"))


def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_partial_one(tmp_path, monkeypatch):
    run = trainer(tmp_path, **CUT)
    real = run._save_rollout

    def full(folder):
        if run.state.global_step == 3:
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(run, "_save_rollout", full)
    with pytest.raises(OutputError, match="checkpoint-3: No space left on device; earlier ones are valid"):
        run.train()
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"checkpoint-1", "checkpoint-2"}
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    with only_run_in(tmp_path / "run"), pytest.raises(OutputError, match="another run is writing into"):
        run.train()
    run.train()


def test_a_step_that_would_make_the_weights_nan_is_not_taken(tmp_path, monkeypatch):
    run = trainer(tmp_path, **CUT)
    real = run._compute_loss
    monkeypatch.setattr(run, "_compute_loss", lambda m, i: real(m, i) * (float("nan") if run._step == 5 else 1))
    with pytest.raises(TrainingError, match="gradient is nan at step 6"):
        run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-5"


def test_a_bad_score_keeps_the_last_checkpoint(tmp_path):
    calls = []

    def breaks_later(prompts, completions, **columns):
        calls.append(1)
        return [1.0 if len(calls) < 3 else float("inf")] * len(completions)

    with pytest.raises(RewardError, match="'breaks_later' returned inf"):
        trainer(tmp_path, reward=breaks_later, **CUT).train()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-8"


def test_ctrl_c_saves_and_the_run_can_go_on(whole, tmp_path):
    def presses(prompts, completions, **columns):
        os.kill(os.getpid(), signal.SIGINT)
        return pays_for_one_word(prompts, completions)

    before = signal.getsignal(signal.SIGINT)
    run = trainer(tmp_path, reward=presses, **CUT | {"save_steps": 50})
    run.train()
    assert run.state.global_step == 1 and last_checkpoint(tmp_path / "run").name == "checkpoint-1"
    assert signal.getsignal(signal.SIGINT) is before
    run = trainer(tmp_path, **CUT)
    run.train(resume_from_checkpoint=True)
    assert adapter(run, tmp_path / "adapter") == whole[1]


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    partial, final = tmp_path / "partial", tmp_path / "checkpoint-7"
    (partial / "inner").mkdir(parents=True)
    (partial / "inner" / "file").write_bytes(b"12345")
    assert not is_complete(partial) and last_checkpoint(tmp_path) is None
    finish_checkpoint(partial, final)
    assert last_checkpoint(tmp_path) == final and not partial.exists()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "complete.json").write_text(json.dumps(["no", "sizes"]))
    assert last_checkpoint(tmp_path) == final
    (final / "inner" / "file").unlink()
    assert last_checkpoint(tmp_path) is None


SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from ppo_runs import trainer
from ppo_runs import CUT
torch = __import__("torch")
torch.set_num_threads(1)
run = trainer(Path(sys.argv[1]), **CUT | {{"max_steps": int(sys.argv[2]), "save_total_limit": 2}})
print(os.getpid(), flush=True)
run.train(resume_from_checkpoint=True)
run.save_model(str(Path(sys.argv[1]) / "adapter"))
"""


def command(folder, steps):
    return [warm_python(), "-c", SCRIPT.format(tests=str(HELPERS)), str(folder), str(steps)]


def newest(folder):
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def kill_after(step, delay, folder, steps):
    """Start the run, or start it again, and SIGKILL it so many seconds after the checkpoint of a step is there."""
    with subprocess.Popen(command(folder, steps), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        process = int(run.stdout.readline())
        while run.poll() is None and newest(folder / "run") < step:
            time.sleep(0.002)
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process, signal.SIGKILL)
    return run.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("kills", "steps"), [(3, 40), pytest.param(20, 240, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_adapter(tmp_path, kills, steps):
    subprocess.run(command(tmp_path / "whole", steps), check=True, capture_output=True)
    expected = (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").read_bytes()
    delays = 0.02 * torch.rand(kills, generator=torch.Generator().manual_seed(kills))  # about a step takes as long
    for number, delay in enumerate(delays.tolist(), 1):
        step = number * steps // (kills + 2)
        assert kill_after(step, delay, tmp_path / "cut", steps), "it ended before it could be killed"
        assert last_checkpoint(tmp_path / "cut" / "run").name != f"checkpoint-{steps}"
    subprocess.run(command(tmp_path / "cut", steps), check=True, capture_output=True)
    assert (tmp_path / "cut" / "adapter" / "adapter_model.safetensors").read_bytes() == expected
