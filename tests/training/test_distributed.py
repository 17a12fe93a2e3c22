"""Two processes (gloo) against one: the same rollouts give the same losses, gradients, KL control and adapters."""

import json
import os
import subprocess

import pytest
import torch
from forked import warm_python
from places import HELPERS
from ports import free_port
from safetensors.torch import load_file

from rsoups import SettingsError

CPU = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import save_file
import rsoups.training.ppo
from ppo_runs import PROMPTS, trainer

torch.set_num_threads(1)
whole = {"generation_batch_size": 32, "mini_batch_size": 32, "max_steps": 6, "kl_target": 0.01, "kl_horizon": 100}
# One response in each minibatch: of two processes one waits, in turns.
turns = {"generation_batch_size": 4, "mini_batch_size": 1, "max_steps": 8}
bare = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, "steps_per_generation": None}


def pays_for_length_and_prompt(prompts, completions, **columns):
    return [len(text.split()) / 4 + prompt.count("w1") for prompt, text in zip(prompts, completions)]


def in_one_order(rollout):
    # The order in which two processes that take turns see the rows that each of them has.
    rows = len(rollout["prompt_ids"])
    order = torch.arange(rows)
    if run.accelerator.num_processes == 1 and run.args.mini_batch_size == 1 and run._buffered_inputs is None:
        order = order.view(2, rows // 2).T.flatten()
    return {key: value[order] if value.ndim else value for key, value in rollout.items()}


def same_for_a_prompt(prompt_ids, *args, **kwargs):
    responses = []
    for ids in prompt_ids:  # of unequal lengths: processes hold unequal numbers of tokens
        draw = torch.Generator().manual_seed(sum(ids) * 7 + run.state.global_step)
        length = int(torch.randint(1, 7, (1,), generator=draw))
        responses.append(torch.randint(4, 24, (length,), generator=draw).tolist())
    return responses, None


def seen(model, grad_norm=None):
    if not gradients:
        parameters = run.accelerator.unwrap_model(model).named_parameters()
        gradients.append({k: v.grad.clone() for k, v in parameters if v.grad is not None})
    return norm(model, grad_norm)


rsoups.training.ppo.shuffle_sequence_dict = in_one_order
for name, sizes in (("whole", whole), ("turns", turns)):
    out, gradients = Path(sys.argv[2]) / name, []
    run = trainer(
        out, pays_for_length_and_prompt, learning_rate=1e-2, per_device_eval_batch_size=int(sys.argv[3]), **bare, **sizes
    )
    norm = run._get_grad_norm
    run._generate_single_turn, run._get_grad_norm = same_for_a_prompt, seen
    run.train_dataset = PROMPTS.select(range(56))  # an epoch is a rollout of 32, and 24 prompts that make no whole one
    run.train()
    run.evaluate(PROMPTS.select(range(5)))  # not as many as two processes take at a time
    if run.accelerator.is_main_process:
        out.mkdir(exist_ok=True)
        save_file(gradients[0], out / "gradients.safetensors")
        run.save_model(str(out / "adapter"))
        rows = run.state.log_history
        (out / "log.json").write_text(json.dumps({"rows": rows, "processes": run.accelerator.num_processes}))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    (root / "script.py").write_text(SCRIPT)
    found = {}
    for processes in (1, 2):
        out = root / str(processes)
        # `accelerate launch --cpu` starts several processes through MPI only; --multi_gpu through torch's launcher.
        command = [warm_python(), "-m", "accelerate.commands.launch", *(["--multi_gpu"] if processes > 1 else [])]
        command += ["--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", str(free_port()), str(root / "script.py"), str(HELPERS), str(out)]
        command += [str(8 // processes)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=CPU)
        assert run.returncode == 0, run.stderr[-3000:]
        found[processes] = {name: read(out / name, processes) for name in ("whole", "turns")}
    return {name: (found[1][name], found[2][name]) for name in ("whole", "turns")}


def read(folder, processes):
    log = json.loads((folder / "log.json").read_text())
    assert log["processes"] == processes
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return log["rows"], load_file(folder / "gradients.safetensors"), adapter


@pytest.mark.parametrize("name", ["whole", "turns"])
def test_the_first_gradients_are_the_same(runs, name):
    (_, one, _), (_, two, _) = runs[name]
    assert one.keys() == two.keys() and any("value_head" in key for key in one)
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 1e-4
    for key, gradient in one.items():
        assert torch.allclose(gradient, two[key], rtol=1e-4, atol=1e-7), key


@pytest.mark.parametrize(
    "metric",
    ["reward", "kl", "kl_coef", "policy_loss", "value_loss", "entropy", "explained_variance", "distinct", "grad_norm"],
)
def test_what_is_logged_is_of_all_processes(runs, metric):
    one, two = ([row[metric] for row in rows if metric in row] for rows, _, _ in runs["whole"])
    assert len(one) == (6 if "loss" in metric or metric == "grad_norm" else 3)
    assert one == pytest.approx(two, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("metric", ["reward", "rewards/pays_for_length_and_prompt", "kl", "distinct"])
def test_an_uneven_evaluation_counts_each_prompt_once(runs, metric):
    one, two = (next(row[f"eval_{metric}"] for row in rows if f"eval_{metric}" in row) for rows, _, _ in runs["whole"])
    assert one == pytest.approx(two, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("name", ["whole", "turns"])
def test_the_adapters_end_alike(runs, name):
    (_, _, one), (_, _, two) = runs[name]
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], rtol=1e-3, atol=1e-5), key


# --- two processes that really sample -----------------------------------------------------------------------------------

SAMPLING = """
import json, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from accelerate.utils import gather_object
from ppo_runs import pays_for_one_word, trainer

torch.set_num_threads(1)
root = Path(sys.argv[2])
bare = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, "steps_per_generation": None}
sizes = {"generation_batch_size": 16, "mini_batch_size": 4, "max_steps": 16, "save_strategy": "steps", "save_steps": 6}


def run(name, checkpoint=None):
    made = trainer(root / name, log_completions=True, num_completions_to_print=1, **bare, **sizes)
    generate, texts = made._generate_single_turn, []

    def seen(*arguments, **options):
        found = generate(*arguments, **options)
        texts.extend(map(tuple, found[0]))
        return found

    made._generate_single_turn = seen
    made.train(checkpoint)
    return made, texts


whole, texts = run("whole")
by_process = gather_object([texts])
if whole.accelerator.is_main_process:
    shutil.copytree(root / "whole" / "run" / "checkpoint-6", root / "again" / "run" / "checkpoint-6")
whole.accelerator.wait_for_everyone()
again, _ = run("again", str(root / "again" / "run" / "checkpoint-6"))
if whole.accelerator.is_main_process:
    logged = [list(whole._logs[name]) for name in ("prompt", "completion")]
    logged.append(list(whole._logs["rewards"]["pays_for_one_word"]))
    scores = pays_for_one_word(logged[0], logged[1])
    parameters = dict(again.model.named_parameters())
    told = {
        "lengths": [len(values) for values in logged],
        "paired": max(abs(a - b) for a, b in zip(scores, logged[2])) < 1e-6,
        "alike": len(set(by_process[0]) & set(by_process[1])) / len(set(by_process[0])),
        "resumed": all(torch.equal(value, parameters[name]) for name, value in whole.model.named_parameters()),
        "moved": float(max(value.abs().max() for name, value in whole.model.named_parameters() if "lora_B" in name)),
    }
    (root / "told.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def sampling(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampling")
    (root / "script.py").write_text(SAMPLING)
    command = [warm_python(), "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), str(root / "script.py"), str(HELPERS), str(root)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=CPU)
    assert run.returncode == 0, run.stderr[-3000:]
    return root, json.loads((root / "told.json").read_text())


def test_processes_draw_different_responses_and_logs_pair_each_with_its_reward(sampling):
    told = sampling[1]
    assert told["lengths"] == [16, 16, 16] and told["paired"]
    assert told["alike"] < 0.5


def test_two_processes_resume_to_the_bit(sampling):
    assert sampling[1]["resumed"] and sampling[1]["moved"] > 1e-3


def test_another_number_of_processes_is_told_what_the_checkpoint_needs(sampling, tmp_path):
    from ppo_runs import trainer

    with pytest.raises(SettingsError, match="written by 2 processes, .* resume with --num_processes 2"):
        trainer(tmp_path, max_steps=16).train(str(sampling[0] / "whole" / "run" / "checkpoint-6"))
