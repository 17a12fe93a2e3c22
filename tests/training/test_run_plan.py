"""What a run says before it starts: the sizes, the steps and the memory of recipes/configs/README.md."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppo_runs import BARE, config, trainer
from transformers import LlamaConfig, LlamaForCausalLM

from rsoups.training.run_plan import memory, run_plan, settle_checkpointing


@pytest.fixture(scope="module")
def llama7b():
    """LLaMA-7b's shape in bfloat16 with the paper's LoRA, without values."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(dtype=torch.bfloat16)).to(torch.bfloat16)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(base, LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize(
    ("settings", "longest", "name", "size"),
    [  # the last three rows of the table, for 122 tokens before a response of 32
        ({}, 122, "generation from 128 prompts (154 tokens each)", 128 * 154 * 0.00052),
        ({"local_rollout_forward_batch_size": 4}, 122, "update of 4 responses (154 tokens each)", 4 * 154 * 0.0055),
        (
            {"local_rollout_forward_batch_size": 2, "activation_checkpointing": True},
            122,
            "update of 4 responses (154 tokens each)",
            4 * 154 * 0.00043,
        ),
    ],
)
def test_the_memory_of_llama_7b_is_that_of_the_table(tmp_path, llama7b, settings, longest, name, size):
    args = config(tmp_path, **BARE, mini_batch_size=4, max_completion_length=32, bf16=True, **settings)
    reward = type("Reward", (), {})()
    reward._model = torch.nn.Linear(1000, 435_000, bias=False, device="meta", dtype=torch.bfloat16)  # 0.87 GB
    parts = memory(llama7b, [reward], args, longest)
    assert list(parts) == ["base", "adapter", "rewards", name, "CUDA"]
    assert (parts["base"], parts["rewards"], parts["CUDA"]) == (pytest.approx(13.5, abs=0.05), pytest.approx(0.87), 1.0)
    assert parts["adapter"] == pytest.approx(16 * 16_777_216 / 1e9)
    assert parts[name] == pytest.approx(size, rel=0.03)


def test_the_plan_counts_what_the_run_then_does(tmp_path):
    run = trainer(tmp_path, max_steps=-1, num_train_epochs=1, generation_batch_size=16, mini_batch_size=4, **BARE)
    told = run_plan(run.model, [], run.args, len(run.train_dataset), 2, "cpu")
    lines = told.splitlines()
    assert lines[0] == "rollout  16 responses, minibatches of 4, gone through 2 times: 8 optimizer steps"
    assert lines[1] == "run      64 prompts, 4 rollouts, 32 optimizer steps"
    assert lines[2].startswith("memory   about 0.0 GB in each process, worked out: base <0.1, adapter <0.1, ")
    run.train()
    assert run.state.global_step == 32
    assert sum("reward" in row for row in run.state.log_history) == 4


@pytest.mark.parametrize(
    ("given", "longest", "memory_gb", "checkpoints"),
    [
        ({}, 122, 64, False),  # 4 responses of 154 tokens keep 3.4 GB; base and adapter take 13.8
        ({}, 122, 30, True),
        ({}, 8000, 64, True),  # 177 GB
        ({"activation_checkpointing": True}, 122, 1000, True),
        ({"activation_checkpointing": False}, 8000, 8, False),
        ({"gradient_checkpointing": True}, 122, 1000, True),
    ],
)
def test_activations_are_kept_where_the_memory_holds_them(
    tmp_path, llama7b, monkeypatch, given, longest, memory_gb, checkpoints
):
    machine = SimpleNamespace(total=memory_gb * 10**9)
    monkeypatch.setattr("rsoups.training.run_plan.psutil.virtual_memory", lambda: machine)
    settings = BARE | {"local_rollout_forward_batch_size": 4, "activation_checkpointing": None} | given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old name
        args = config(tmp_path, mini_batch_size=4, max_completion_length=32, bf16=True, **settings)
    settle_checkpointing(args, llama7b, [], longest)
    assert args.activation_checkpointing is args.gradient_checkpointing is checkpoints
