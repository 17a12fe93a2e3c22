"""PPO's metrics: documented, logged, and those of the rollout."""

import re

import pytest
import torch
from ppo_runs import history, pays_for_one_word, rollouts, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rsoups import PPOTrainer


def test_explained_variance_is_of_the_returns_by_the_values(tmp_path):
    run = trainer(tmp_path, max_steps=8)
    kept = []
    real = run._log_rollout
    run._log_rollout = lambda *args: kept.append(args[4]) or real(*args)
    run.train()
    for batch, logged in zip(kept, history(run, "explained_variance"), strict=True):
        tokens = batch["completion_mask"].bool()
        returns, values = batch["returns"][tokens].double(), batch["old_values"][tokens].double()
        expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
        assert logged == pytest.approx(float(expected), abs=1e-6)


def test_metrics_are_documented_and_the_documented_ones_are_logged(tmp_path):
    def some(prompts, completions, **columns):
        return [None if i % 2 else 3.0 for i in range(len(completions))]

    run = trainer(tmp_path, reward=[pays_for_one_word, some])
    run.train()
    logged = {key for row in run.state.log_history[:-1] for key in row} - {"epoch", "step"}
    family = {"rewards": "rewards/NAME", "abstained": "abstained/NAME", "completions": "completions/..."}
    documented = set(re.findall(r"``([\w/.]+)``", PPOTrainer.__doc__.split("Metrics are")[1].split("Differs by")[0]))
    documented.remove("server_difference")  # of rollouts from a server
    parts = {"clipped_ratio", "terminated"}  # of completions/...
    assert parts <= documented and {"completions/clipped_ratio", "completions/mean_terminated_length"} <= logged
    assert {family.get(key.partition("/")[0], key) for key in logged} == documented - parts


def test_metrics_are_those_of_the_rollout(tmp_path):
    """One rollout of 32 responses, two minibatches of it, against sums over its tokens."""
    run = trainer(tmp_path, max_steps=2, num_iterations=1, learning_rate=1e-9, log_completions=True)
    logged, real = [], run._log_rollout
    run._log_rollout = lambda *args: logged.append(args) or real(*args)
    ((prompts, responses, batch),) = rollouts(run)
    ((_, _, texts, _, _, _),) = logged

    logps = [batch["old_logps"][i, : len(ids)].tolist() for i, ids in enumerate(responses)]
    ended = [ids for ids in responses if ids[-1] == 2]
    scores = pays_for_one_word(None, texts)
    assert 0 < len(ended) < 32 and any(scores)
    expected = {
        "entropy": -sum(map(sum, logps)) / sum(map(len, responses)),
        "reward": sum(scores) / 32,
        "rewards/pays_for_one_word": sum(scores) / 32,
        "distinct": len(set(texts)) / 32,
        "completions/mean_length": sum(map(len, responses)) / 32,
        "completions/max_length": max(map(len, responses)),
        "completions/clipped_ratio": 1 - len(ended) / 32,
        "completions/mean_terminated_length": sum(map(len, ended)) / len(ended),
        "num_tokens": sum(map(len, prompts + responses)),
        "kl_coef": 0.02,
    }
    for key, value in expected.items():
        assert history(run, key)[0] == pytest.approx(value, rel=1e-5), key
    assert history(run, "clip_fraction") == [0, 0], "the policy has hardly moved"
    assert list(run._logs["completion"]) == texts and list(run._logs["rewards"]["pays_for_one_word"]) == pytest.approx(
        scores
    )


def test_the_clip_fraction_is_the_share_of_tokens_whose_ratio_is_clipped(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    batch = run._rollout_tensors([[4]] * 2, [[5, 6, 2], [7]])
    logps, values = (tensor.detach() for tensor in run._actor_critic(run.model, batch))
    # Ratios of 1.5, 1, 0.5 and 1.5: of positive advantages the clip bounds what is above 1.2, of negative ones below 0.8.
    moved = torch.tensor([[1.5, 1.0, 0.5], [1.5, 1.0, 1.0]]).log()
    batch |= {"old_logps": logps - moved, "old_values": values, "returns": values}
    batch |= {"advantages": torch.tensor([[1.0, 1.0, -1.0], [-1.0, 1.0, 1.0]]), "num_items_in_batch": torch.tensor(4.0)}
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    run._compute_loss(run.model, batch)
    assert run._metrics["train"]["clip_fraction"] == [pytest.approx(2 / 4)]
    assert run._metrics["train"]["policy_loss"] == [pytest.approx((-1.2 - 1 + 0.8 + 1.5) / 4, rel=1e-5)]


def test_sample_responses_are_shown_as_a_table_on_request(tmp_path, capsys):
    run = trainer(tmp_path, log_completions=True, num_completions_to_print=3, max_steps=2)
    run.train()
    shown = capsys.readouterr().out
    assert "pays_for_one_word" in shown and "Completion" in shown
    assert any(text in shown for text in run._logs["completion"] if text)


def test_trackers_of_transformers_get_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = trainer(tmp_path, max_steps=4, report_to="tensorboard")
    run.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    written = [event.value for event in board.Scalars("train/reward")]
    assert written == pytest.approx(history(run, "reward"))
    assert {"train/kl", "train/value_loss", "train/rewards/pays_for_one_word"} <= set(board.Tags()["scalars"])
