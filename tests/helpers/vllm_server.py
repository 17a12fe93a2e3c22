"""A real vLLM server on this machine's processor, and the embedded policy in a shape that it takes."""

import json
import math
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import torch
from places import ROOT
from ports import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsoups.common.assets import resolve
from rsoups.data.datasets import load_rows
from rsoups.data.tasks import find_task

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
_STARTS = 240.0  # seconds
_HEAD = 64  # vLLM's attention on a CPU takes heads of 32, 64, 80, ... but not the embedded policy's 48
SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class VLLMServer:
    """A server process; it can be killed and started again at the same address."""

    def __init__(self, base, log, **environment):
        self._base, self._log, self._port, self._process = base, log, free_port(), None
        self._environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._environment |= SETTINGS | environment

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    def start(self, wait=True):
        command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", self._base, "--dtype", "float32"]
        command += ["--enable-lora", "--max-lora-rank", "32", "--max-loras", "2", "--enforce-eager"]
        # vLLM 0.32 dies on a processor of a prompt with a seed that it reads in two steps.
        command += ["--max-model-len", "256", "--no-enable-chunked-prefill", "--served-model-name", "embedded"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        with self._log.open("a") as log:
            environment = self._environment
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        end = time.monotonic() + _STARTS
        while wait and not self.answers():
            died = self._process.poll() is not None
            assert not died and time.monotonic() < end, self._log.read_text()[-3000:]
            time.sleep(0.5)

    def answers(self):
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as answer:
                return bool(json.load(answer))
        except OSError:
            return False

    def kill(self):
        """Kill the server with the processes that it has started, as a machine that goes down does."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)


@contextmanager
def vllm_server(base, log, **environment):
    """A running server of a base, whose output is appended to a file."""
    server = VLLMServer(base, log, **environment)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def concepts(count, split):
    """Prompts of the embedded task."""
    return [row["prompt"] for row in load_rows(find_task("concepts"), None, split, count)]


def with_wide_heads(folder):
    """The embedded policy with heads padded by zeros to `_HEAD` and a context of 512: the same function, in float32.

    RoPE turns dimension i with i + half, by an angle that the base of its frequencies gives: both follow the new size.
    """
    source = resolve("rsoups/tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = type(model.config).from_pretrained(source)
    size, heads = config.head_dim, config.num_attention_heads
    config.head_dim, config.dtype, config.max_position_embeddings = _HEAD, torch.float32, 512
    theta = config.rope_parameters["rope_theta"] ** (_HEAD / size)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    places = torch.cat([torch.arange(size // 2), torch.arange(size // 2) + _HEAD // 2])

    def spread(weight):
        wide = torch.zeros(heads, _HEAD, weight.shape[1])
        wide[:, places] = weight.view(heads, size, -1)
        return wide.flatten(0, 1)

    state = model.state_dict()
    for name, weight in state.items():
        if "q_proj" in name:  # scores are divided by the root of the head's size
            state[name] = spread(weight) * math.sqrt(_HEAD / size)
        elif "k_proj" in name or "v_proj" in name:
            state[name] = spread(weight)
        elif "o_proj" in name:
            state[name] = spread(weight.T).T.contiguous()
    wide = type(model)(config).eval()
    wide.load_state_dict(state)
    ids = torch.arange(100, 160)[None]
    with torch.no_grad():
        assert torch.allclose(wide(ids).logits, model(ids).logits, atol=1e-3)
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder
