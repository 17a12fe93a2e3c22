"""GRPO, RLOO and training on from another adapter: each gives an ingredient of the same soup."""

import json
import sys

import pytest
from places import RECIPES
from recipe_runs import CONFIGS, SHORT, launch

import rsoups


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short PPO run."""
    root = tmp_path_factory.mktemp("runs")
    launch(RECIPES / "ppo_reward.py", "--reward", "naturalness", "--output_dir", root / "naturalness", *SHORT)
    return root


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_adapters_of_other_algorithms_go_into_the_same_soup(runs, tmp_path, algorithm):
    flags = ["--config", CONFIGS / "embedded-grpo.yaml", "--algorithm", algorithm, "--reward", "coverage", *SHORT]
    flags += ["--reward_weights", -2]
    launch(RECIPES / "ppo_reward.py", *flags, "--eval_prompts", 8, "--output_dir", tmp_path / algorithm)
    soup = rsoups.interpolate(
        [tmp_path / algorithm, runs / "naturalness"], [0.5, 0.5], method="factors"
    )  # one initialization
    assert soup.lambdas == (0.5, 0.5)
    held_out = json.loads((tmp_path / algorithm / "held_out_results.json").read_text())
    assert held_out["before"].keys() == held_out["after"].keys() >= {"reward"}
    logs = json.loads((tmp_path / algorithm / "trainer_state.json").read_text())["log_history"]
    log = next(log for log in logs if "reward" in log)
    assert log["reward"] == pytest.approx(-log["rewards/coverage/mean"], abs=1e-5), "divided by |-2|"


def test_an_adapter_can_be_trained_on(runs, tmp_path):
    flags = ["--config", CONFIGS / "embedded.yaml", "--adapter_name_or_path", runs / "naturalness", *SHORT]
    flags += ["--reward", "coverage", "--output_dir", tmp_path / "on"]
    launch(RECIPES / "ppo_reward.py", *flags, python=sys.executable)  # just as a user does
    names = {path.name for path in (tmp_path / "on").iterdir()}
    assert "adapter_model.safetensors" in names
    rsoups.interpolate([tmp_path / "on", runs / "naturalness"])
