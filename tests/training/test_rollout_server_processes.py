"""Two processes (gloo) whose rollouts come from one server: under DDP, and with the parameters in pieces (FSDP2)."""

import json
import os
import subprocess
import sys

import pytest
from places import HELPERS
from ports import free_port
from ppo_runs import WORDS
from tiny import tiny_llama, tiny_tokenizer
from vllm_stand_in import stand_in

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from accelerate.utils import gather_object
from ppo_runs import history, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

torch.set_num_threads(1)
root, url = Path(sys.argv[2]), sys.argv[3]
bare = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, "steps_per_generation": None}
sizes = {"generation_batch_size": 16, "mini_batch_size": 8, "max_steps": 12, "learning_rate": 1e-2}
run = trainer(root, rollout_server=url, **bare, **sizes)
generate, texts = run.rollout_server.generate, []


def seen(prompts):
    responses = generate(prompts)
    texts.extend(map(tuple, responses))
    return responses


run.rollout_server.generate = seen
run.train()
texts = gather_object([texts])
told = {
    "difference": max(history(run, "server_difference")),
    "alike": len(set(texts[0]) & set(texts[1])) / len(set(texts[0])),
    "responses": [len(each) for each in texts],
}

sharded = trainer(root / "sharded", rollout_server=url, **bare, **sizes)
with torch.no_grad():
    for (name, parameter), trained in zip(sharded.model.named_parameters(), run.model.parameters()):
        parameter.copy_(trained)
mesh = init_device_mesh("cpu", (2,))
for layer in sharded.model.get_base_model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded.model, mesh=mesh)
assert all(isinstance(parameter, DTensor) for name, parameter in sharded.model.named_parameters())
sharded.rollout_server.generate([[4, 5, 6], [7, 8]])
told["sharded"] = sharded.rollout_server.difference
told["moved"] = max(float(p.detach().abs().max()) for n, p in run.model.named_parameters() if "lora_B" in n)
if run.accelerator.is_main_process:
    (root / "told.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    (root / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", str(free_port()), str(root / "script.py"), str(HELPERS), str(root)]
    tokenizer = tiny_tokenizer(WORDS)
    with stand_in(lambda: tiny_llama(vocab_size=len(tokenizer)), tokenizer) as server:
        env = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, server.url], capture_output=True, text=True, check=False, timeout=240, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not server.loaded, "the main process unloads what it has loaded"
    return json.loads((root / "told.json").read_text())


def test_each_process_draws_its_own_responses_of_one_policy(told):
    assert told["responses"] == [2 + 3 * 8] * 2, "the check, and three rollouts"
    assert told["alike"] < 0.5 and told["difference"] < 1e-4 and told["moved"] > 1e-2


def test_pieces_of_an_adapter_are_gathered(told):
    assert told["sharded"] < 1e-4
