"""Recipes as a user runs them, and short."""

import runpy
import subprocess

from forked import warm_python
from places import RECIPES

CONFIGS = RECIPES / "configs"


def parse_ppo(*argv):
    return runpy.run_path(str(RECIPES / "ppo_reward.py"))["parse"](list(argv))


def launch(*arguments, cwd=None, python=None):
    """As a user does, in a process of its own; its Python is warm unless another one is given."""
    command = [
        python or warm_python(),
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert run.returncode == 0, run.stderr[-3000:]


SHORT = ["--per_device_train_batch_size", 8, "--max_steps", 4, "--max_completion_length", 8, "--disable_tqdm", "true"]
SHORT += ["--eval_prompts", 8]
