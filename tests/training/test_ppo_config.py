"""How a rollout is divided: the same rollout, minibatches and epochs on any number of processes, or a refusal."""

import platform
from collections import Counter

import pytest
import torch
import yaml
from places import RECIPES
from ppo_runs import BARE, config

from rsoups import PPOConfig, PPOTrainer, SettingsError
from rsoups.training.ppo_config import divide, has_bf16

CONFIGS = sorted((RECIPES / "configs").glob("llama7b-*.yaml"))


def rows_of_each_step(shares):
    """Which rows of the rollout each optimizer step sees, as the trainers of all processes hand them out."""
    held = shares.rollout // shares.processes
    steps = [Counter() for _ in range(shares.steps)]
    for process in range(shares.processes):
        place = type("Place", (), {"process_index": process})
        trainer = type("Trainer", (), {"args": type("Args", (), {"shares": shares}), "accelerator": place})
        ids = torch.arange(process * held, (process + 1) * held)
        rollout = {"prompt_ids": ids, "completion_mask": torch.ones(held, 3), "num_items_in_batch": torch.tensor(1)}
        for at, rows in enumerate(PPOTrainer._rows_of_passes(trainer, rollout)):
            real = rows["prompt_ids"][rows["completion_mask"].bool().all(dim=1)]
            steps[at // shares.accumulation].update(real.tolist())
    return steps


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_papers_sizes_are_the_same_on_any_number_of_processes(path, processes, rows):
    """Batch 128, mini-batch 4, 4 epochs: 32 steps over all processes, each response once in each epoch."""
    told = yaml.safe_load(path.read_text())
    shares = divide(told["generation_batch_size"], told["mini_batch_size"], processes, rows)
    assert (shares.rollout, shares.mini_batch, shares.steps, told["num_iterations"]) == (128, 4, 32, 4)
    steps = rows_of_each_step(shares)
    assert [sum(step.values()) for step in steps] == [4] * 32
    assert sum(steps, Counter()) == Counter(range(128))


def test_minibatches_of_several_passes():
    shares = divide(64, 32, 2, per_device=4)
    assert (shares.per_device, shares.accumulation, shares.steps) == (4, 4, 2)
    assert [sum(step.values()) for step in rows_of_each_step(shares)] == [32, 32]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"rollout": 130, "mini_batch": 4, "processes": 1}, "130 is no multiple of 4"),
        ({"rollout": 128, "mini_batch": 4, "processes": 3}, "128 is no multiple of 3"),
        ({"rollout": 126, "mini_batch": 2, "processes": 3}, "3 is no multiple of 2. Pass --mini_batch_size 3"),
        ({"rollout": 120, "mini_batch": 5, "processes": 2}, "5 is no multiple of 2. Pass --mini_batch_size 6"),
        ({"rollout": 128, "mini_batch": 4, "processes": 1, "per_device": 3}, "4 responses of a minibatch, and 3"),
        ({"rollout": 128, "mini_batch": 4, "processes": 1, "per_device": 8}, "4 responses of a minibatch, and 8"),
        ({"rollout": 128, "mini_batch": 4, "processes": 1, "accumulation": 3}, "x 3 .gradient_accumulation_steps"),
        ({"rollout": 128, "mini_batch": 4, "processes": 8, "per_device": 4}, "one response of a minibatch at most"),
        ({"rollout": 1, "mini_batch": 1, "processes": 1}, "a single response cannot be whitened"),
        ({"rollout": 8, "mini_batch": 0, "processes": 1}, "every size must be at least 1"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_with_the_numbers(numbers, reason):
    with pytest.raises(SettingsError, match=reason) as told:
        divide(**numbers)
    assert f"{numbers['rollout']} responses" in str(told.value) and f"of {numbers['mini_batch']} (" in str(told.value)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [  # rollout, minibatch, rows of a pass, passes of a step, passes of an epoch
        ({}, (128, 32, 32, 1, 4)),
        ({"mini_batch_size": 16}, (128, 16, 16, 1, 8)),
        ({"mini_batch_size": 16, "per_device_train_batch_size": 2}, (128, 16, 2, 8, 64)),
        ({"mini_batch_size": 16, "gradient_accumulation_steps": 2}, (128, 16, 8, 2, 16)),
        ({"generation_batch_size": 32, "mini_batch_size": 32}, (32, 32, 32, 1, 1)),
        ({"per_device_train_batch_size": 8}, (128, 8, 8, 1, 16)),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, (128, 16, 8, 2, 16)),
        ({"per_device_train_batch_size": 16, "steps_per_generation": 2}, (32, 16, 16, 1, 2)),
        ({"steps_per_generation": 4}, (128, 32, 32, 1, 4)),
    ],
)
def test_the_sizes_in_our_words_and_in_trls(tmp_path, settings, sizes):
    made = config(tmp_path, **(BARE | settings))
    found = (made.generation_batch_size, made.mini_batch_size, made.per_device_train_batch_size)
    assert (*found, made.gradient_accumulation_steps, made.steps_per_generation) == sizes
    assert made.num_generations == 1


def test_the_defaults_are_the_papers_but_for_learning_rate_and_minibatch(tmp_path):
    made = PPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert (made.learning_rate, made.lr_scheduler_type, made.num_iterations) == (3e-4, "constant", 4)
    assert (made.kl_coef, made.kl_target, made.kl_horizon, made.max_completion_length) == (0.2, 6, 10_000, 32)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"generation_batch_size": 128, "steps_per_generation": 8}, "both set the size of a rollout"),
        ({"mini_batch_size": 8, "steps_per_generation": 4}, "set generation_batch_size instead"),
        ({"kl_coef": -1.0}, "kl_coef is -1.0"),
        ({"min_completion_length": 9}, "between 1 and max_completion_length"),
        (
            {"generation_kwargs": '{"num_beams": 2, "use_cache": true}'},
            "^num_beams: PPO samples from the whole softmax",
        ),
        ({"generation_kwargs": "num_beams=2"}, "generation_kwargs are 'num_beams=2', must be a JSON object"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(tmp_path, settings, reason):
    with pytest.raises(SettingsError, match=reason):
        config(tmp_path, **(BARE | settings))


@pytest.mark.parametrize(
    ("has", "given", "bf16", "use_cpu"),
    [
        (True, {}, True, True),
        (False, {}, False, True),
        (True, {"bf16": False}, False, False),
        (False, {"bf16": True, "use_cpu": True}, True, True),
        (True, {"bf16": True, "use_cpu": True}, True, True),
    ],
)
def test_bfloat16_is_chosen_by_the_processor_and_by_the_user_first(tmp_path, monkeypatch, has, given, bf16, use_cpu):
    monkeypatch.setattr("rsoups.training.ppo_config.has_bf16", lambda: has)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    args = PPOConfig(output_dir=str(tmp_path), report_to="none", **given)
    assert (args.bf16, args.use_cpu) == (bf16, use_cpu)


@pytest.mark.parametrize(("name", "found"), [("avx512_bf16", True), ("amx_bf16", True), ("avx512_f", False)])
def test_a_processor_tells_whether_it_has_bfloat16(monkeypatch, name, found):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert {"avx512_bf16", "amx_bf16"} <= torch.cpu.get_capabilities().keys() or platform.machine() != "x86_64"
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False} | {name: True})
    assert has_bf16() is found
