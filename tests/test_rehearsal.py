"""The paper's experiment as README has it, line by line: the real ids, classes, tokenizers and formats, tiny, on a loopback Hub.

Nothing is replaced but the numbers of steps and prompts, and the machine: `accelerate launch` starts two processes on the CPU.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from paper_hub import publish_assistant
from test_distributed import free_port

import rsoups
from rsoups.lineage import manifest_of, read_manifest

ROOT = Path(__file__).parent.parent
REWARDS = ("deberta-v3-large-v2", "deberta-v3-base", "deberta-v3-base-v2", "electra-large")
TOKEN = "hf_neverToBePrintedAnywhere"
# In place of `accelerate` on the PATH: the true one, on two CPU processes, with few steps.
ACCELERATE = """
import os, sys
from accelerate.commands.accelerate_cli import main

script = next(word for word in sys.argv if word.endswith(".py"))
few = {{"ppo_reward.py": ["--max_steps", "2", "--eval_prompts", "4", "--use_cpu", "true"], "sweep.py": ["--prompts", "3"]}}
more = few[os.path.basename(script)]
if "ppo_reward" in script and "{eight_bit}" not in sys.argv:
    more += ["--load_in_8bit", "false"]
sys.argv[2:2] = ["--num_processes", "2", "--main_process_port", "{port}"]
sys.argv += more
main()
"""
RSOUPS = "import sys, rsoups.cli; sys.exit(rsoups.cli.main())"
LOGITS = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained("huggyllama/llama-7b", dtype=torch.float32)
ids = AutoTokenizer.from_pretrained("huggyllama/llama-7b")("### Instruction: How can you? ### Response:", return_tensors="pt")
plain = base(**ids).logits
loaded = [PeftModel.from_pretrained(base, sys.argv[1]).eval()(**ids).logits]
base = AutoModelForCausalLM.from_pretrained("huggyllama/llama-7b", dtype=torch.float32)
import rsoups
loaded.append(rsoups.Soup.from_pretrained(sys.argv[2]).load(base)(**ids).logits)
print(float((loaded[0] - loaded[1]).abs().max()), float((loaded[0] - plain).abs().max()))
"""


def commands():
    """The block of README that this test is about."""
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"runs this block as it stands\. -->\n```bash\n(.*?)```", text, re.S)
    return block


def on_path(folder, name, code):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{code}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A loopback Hub, and a checkout to stand in."""
    root = tmp_path_factory.mktemp("paper")
    with HubServer() as hub:
        hub.token = TOKEN
        hub.folder = root / "checkout"
        hub.folder.mkdir()
        for name in ("recipes", "rewards", "rsoups", "accelerate_config.yaml", "README.md"):
            os.symlink(ROOT / name, hub.folder / name)
        (root / "bin").mkdir()
        on_path(root / "bin", "accelerate", ACCELERATE.format(port=free_port(), eight_bit="electra-large"))
        on_path(root / "bin", "rsoups", RSOUPS)
        hub.env = os.environ | {
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(root / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            "ACCELERATE_USE_CPU": "1",
            "OMP_NUM_THREADS": "1",
        }
        (root / "made").mkdir()
        publish_assistant(hub, root / "made")
        hub.publish_again = root
        yield hub
        hub.shutdown()


def run(world, script, *arguments):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script, "bash", *arguments],
        cwd=world.folder, env=world.env, capture_output=True, text=True, check=False, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told(world):
    return run(world, commands().replace("ME=your-name", "ME=someone", 1))


def test_all_of_it_ran(world, told):
    runs = world.folder / "runs"
    assert sorted(path.name for path in (runs / "assistant").iterdir()) == sorted(REWARDS)
    assert {path.name for path in (runs / "assistant-sweep").iterdir()} >= {"records.jsonl", "front.png", "report.html"}
    print(told)
