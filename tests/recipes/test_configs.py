"""The recipes' configs and help: they parse, and describe what they do."""

import ast
import runpy
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from places import RECIPES, ROOT
from recipe_runs import CONFIGS, parse_ppo
from trl import ModelConfig, RewardConfig, SFTConfig, TrlParser

from rsoups.data.tasks import TASKS
from rsoups.rewards.load import cards


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("llama7b-*.yaml")), ids=lambda path: path.stem)
def test_the_papers_set_up_parses(path):
    """Batch 128 in mini-batches of 4, 4 epochs, lr 1.41e-5, adaptive KL .2 (target 6, horizon 10,000): FACTS of the paper."""
    script, training, model = parse_ppo("--config", str(path), "--bf16", "false")
    assert (model.model_name_or_path, model.load_in_8bit) == ("huggyllama/llama-7b", True)
    assert script.adapter_name_or_path == "tloen/alpaca-lora-7b"
    assert all(name in cards() for name in script.reward)
    assert (training.generation_batch_size, training.mini_batch_size, training.num_iterations) == (128, 4, 4)
    assert (training.learning_rate, training.kl_coef, training.kl_target, training.kl_horizon) == (
        1.41e-5,
        0.2,
        6,
        10000,
    )
    assert (training.gamma, training.lam, training.cliprange, training.cliprange_value) == (1, 0.95, 0.2, 0.2)
    assert training.vf_coef == 0.1
    assert (training.min_completion_length, training.max_completion_length, script.prefix_tokens) == (16, 32, [2, 8])
    assert training.save_steps == 10 * 4 * 128 // 4
    task = path.stem.removeprefix("llama7b-")
    assert (script.task, script.dataset) == (task, TASKS[task].dataset)


def test_there_is_a_config_for_each_of_the_papers_tasks():
    found = {path.stem.removeprefix("llama7b-") for path in CONFIGS.glob("llama7b-*.yaml")}
    assert found == TASKS.keys() - {"concepts", "film"}


HELPED = [path.stem for path in sorted(RECIPES.glob("*.py")) if path.stem != "__init__"]


@pytest.mark.parametrize("name", HELPED)
def test_a_recipes_help_describes_every_flag_and_shows_defaults(name, monkeypatch, capsys):
    """And each recipe opens with what it does, its launch line, and how it differs from the paper."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    recipe = RECIPES / f"{name}.py"
    with pytest.raises(SystemExit):
        runpy.run_path(str(recipe), run_name="__main__")
    shown = " ".join(capsys.readouterr().out.split())
    text = ast.get_docstring(ast.parse(recipe.read_text("utf-8")))
    first = " ".join(text.splitlines()[0].split())
    assert first in shown and "(default: " in shown
    assert f"recipes/{name}.py" in text or f"rsoups {name}" in text
    assert "differs from" in " ".join(text.split())


@pytest.mark.parametrize(
    ("recipe", "kind", "config"),
    [
        ("sft", SFTConfig, "embedded-sft"),
        ("sft", SFTConfig, "embedded-sft-copying"),
        ("reward_model", RewardConfig, "embedded-coverage"),
        ("reward_model", RewardConfig, "embedded-coverage-sampled"),
        ("reward_model", RewardConfig, "embedded-naturalness"),
        ("reward_model", RewardConfig, "embedded-rating"),
    ],
)
def test_the_embedded_models_configs_parse(recipe, kind, config):
    arguments = runpy.run_path(str(RECIPES / f"{recipe}.py"))["ScriptArguments"]
    parser = TrlParser((arguments, kind, ModelConfig))
    script, training, _ = parser.parse_args_and_config(["--config", str(CONFIGS / f"{config}.yaml")])
    assert training.seed == 0 and script.dataset.endswith("_train.jsonl.gz")


@pytest.mark.parametrize(
    ("path", "kind", "machines"),
    [
        ("accelerate_config.yaml", "MULTI_GPU", 1),
        ("recipes/accelerate/zero2.yaml", "DEEPSPEED", 1),
        ("recipes/accelerate/zero3.yaml", "DEEPSPEED", 1),
        ("recipes/accelerate/fsdp2.yaml", "FSDP", 1),
        ("recipes/accelerate/multi_node.yaml", "MULTI_GPU", 2),
    ],
)
def test_accelerate_reads_its_configs(path, kind, machines):
    config = load_config_from_file(str(ROOT / path))  # refuses unknown keys
    assert (config.distributed_type, config.num_machines, config.mixed_precision) == (kind, machines, "bf16")
    assert not config.use_cpu and config.num_processes > machines
