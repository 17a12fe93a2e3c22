"""Greedy soups, and averages along one run."""

import shutil

import pytest
import torch
from dense import delta_of, dense
from peft import LoraConfig, get_peft_model
from ppo_runs import trainer
from safetensors.torch import load_file
from tiny import tiny_adapter, tiny_llama
from transformers import TrainerState, TrainingArguments

import rsoups
from rsoups import EMACallback, greedy, moving_average


@pytest.fixture
def three(tmp_path):
    return {name: tiny_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("abc")}


def by_names(values):
    """A score that knows soups by who is in them, and counts its calls."""
    calls = []

    def score(soup):
        calls.append("".join(sorted(i.name for i in soup.ingredients)))
        assert len(set(soup.lambdas)) == 1, "a greedy soup is uniform"
        return values[calls[-1]]

    return score, calls


def test_a_greedy_soup_keeps_what_does_not_hurt(three):
    score, calls = by_names({"a": 1.0, "b": 3.0, "c": 2.0, "bc": 2.5, "ab": 3.0})
    soup = greedy(three, score)
    assert calls == ["a", "b", "c", "bc", "ab"], "the best first, then the second best beside it"
    assert [i.name for i in soup.ingredients] == ["b", "a"] and soup.lambdas == (0.5, 0.5)
    score, _ = by_names({"a": 1.0, "b": 3.0, "c": 2.0, "bc": 3.5, "abc": 3.4})
    assert [i.name for i in greedy(three, score).ingredients] == ["b", "c"]
    score, _ = by_names({"a": 1.0, "b": 3.0, "c": 2.0, "bc": 0.0, "ab": 0.0})
    alone = greedy(three, score)
    original = load_file(three["b"] / "adapter_model.safetensors")
    assert all(torch.equal(alone.state_dict[key], original[key]) for key in original)


def test_what_cannot_be_souped_is_refused_before_it_is_scored(three, tmp_path):
    def never(soup):
        raise AssertionError("scored")

    broken = tiny_adapter(tmp_path / "broken", seed=9)
    (broken / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(rsoups.AdapterError, match="corrupt"):
        greedy([*three.values(), broken], never)
    with pytest.raises(rsoups.LambdasError, match="no adapters"):
        greedy([], never)
    score, _ = by_names({"a": 1.0, "b": 2.0, "c": float("nan")})
    with pytest.raises(rsoups.RewardError, match=r"soup of \['c'\] is nan"):
        greedy(three, score)


def run_of(tmp_path, **settings):
    run = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, **settings)
    run.train()
    return tmp_path / "run"


def test_the_moving_average_of_a_run_is_that_of_its_checkpoints(tmp_path):
    run = run_of(tmp_path)
    folders = [run / f"checkpoint-{step}" for step in (2, 4, 6)]
    for soup in (moving_average(run), moving_average(folders)):
        assert [i.name for i in soup.ingredients] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        expected = [dense(folder) for folder in folders]
        for path, delta in delta_of(soup).items():
            assert torch.allclose(delta, sum(e[path] for e in expected) / 3, atol=1e-7)
    averaged = moving_average(run, method="factors").state_dict
    each = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    for key, tensor in averaged.items():
        assert torch.allclose(tensor, sum(e[key] for e in each) / 3, atol=1e-7)
    (folders[1] / "adapter_config.json").unlink()  # a checkpoint that is not whole
    assert len(moving_average(run).ingredients) == 2
    with pytest.raises(rsoups.AdapterError, match="holds no checkpoint-N"):
        moving_average(tmp_path)


def test_checkpoints_of_one_name_all_count(tmp_path):
    folders = [tiny_adapter(tmp_path / part / "checkpoint-1", seed=i) for i, part in enumerate("ab")]
    soup = moving_average(folders)
    assert soup.lambdas == (0.5, 0.5)
    expected = [dense(folder) for folder in folders]
    for path, delta in delta_of(soup).items():
        assert torch.allclose(delta, (expected[0][path] + expected[1][path]) / 2, atol=1e-7)


def test_averages_of_whole_parameters_are_resumed_too(tmp_path):
    """`modules_to_save` go by other names in the file than in the model."""
    base = tiny_llama()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    ema = EMACallback(0.5)
    args, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(is_world_process_zero=True)
    ema.on_train_begin(args, state, None, model=model)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(0.25)
    ema.on_step_end(args, state, None, model=model)
    state.global_step = 1
    (tmp_path / "checkpoint-1").mkdir()
    ema.on_save(args, state, None, model=model)
    resumed = EMACallback(0.5)
    resumed.on_train_begin(args, state, None, model=model)
    assert any("modules_to_save" in name for name in ema.average)
    for name, average in ema.average.items():
        assert torch.equal(resumed.average[name], average), name


def test_an_exponential_moving_average_follows_the_run_and_its_resumption(tmp_path):
    """Against the recurrence over what each step left, written plainly."""
    decay, seen = 0.7, []

    class Watch(rsoups.training.averaging.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "lora" in n})

    def make(folder, steps):
        run = trainer(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=2)
        run.add_callback(EMACallback(decay))
        return run

    run = make("whole", 6)
    start = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad and "lora" in n}
    run.add_callback(Watch())
    run.train()
    for step in (2, 4, 6):
        expected = {name: tensor.double() for name, tensor in start.items()}
        for parameters in seen[:step]:
            expected = {name: decay * e + (1 - decay) * parameters[name].double() for name, e in expected.items()}
        saved = load_file(tmp_path / "whole" / "run" / f"checkpoint-{step}" / "ema" / "adapter_model.safetensors")
        for name, tensor in expected.items():
            assert torch.allclose(saved[name.replace(".default.", ".")].double(), tensor, atol=1e-6)
    final = load_file(tmp_path / "whole" / "run" / "ema" / "adapter_model.safetensors")
    last = load_file(tmp_path / "whole" / "run" / "checkpoint-6" / "adapter_model.safetensors")
    assert any(not torch.equal(final[key], last[key]) for key in final), "the model itself was saved, not the average"

    shutil.copytree(tmp_path / "whole" / "run", tmp_path / "cut" / "run")
    for late in ("checkpoint-6", "ema"):
        shutil.rmtree(tmp_path / "cut" / "run" / late)
    make("cut", 6).train(resume_from_checkpoint=True)
    resumed = load_file(tmp_path / "cut" / "run" / "ema" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[key], final[key]) for key in final)
    with pytest.raises(rsoups.LambdasError, match="decay"):
        EMACallback(1.0)
