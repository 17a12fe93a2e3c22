"""Our maths on a batch of TRL 1.12's PPOTrainer: the same rollout, masks, values and scores give its losses.

Needs .venv-oracle: `make test-oracle` makes it. What differs by design, and is therefore not compared here: TRL ends an
episode one state after the end token (score and a value of their own there), we end it at the end token; TRL's critic
is a second model, ours a head on the policy; TRL averages each minibatch over its own tokens, we over the rollout's.
"""

import subprocess

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

from rsoups.training import rl_math

PYTHON = ROOT / ".venv-oracle" / "bin" / "python"
pytestmark = pytest.mark.oracle
GAMMA, LAM, KL_COEF, CLIP, CLIP_VALUE, VF_COEF = 0.97, 0.9, 0.15, 0.2, 0.1, 0.1


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    assert PYTHON.exists(), "make test-oracle makes .venv-oracle with TRL 1.12"
    out = tmp_path_factory.mktemp("oracle") / "out.safetensors"
    run = subprocess.run(
        [PYTHON, "tests/oracle/trl_ppo.py", out], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return load_file(out)


@pytest.fixture(scope="module")
def ours(trl):
    """TRL's episode is one state longer where a response ended early: `episode` marks its states, `mask` its tokens."""
    mask = trl["mask"].bool()
    responses = trl["query_responses"][:, int(trl["context"]) :]
    ended = (responses == 2).any(dim=1)
    assert ended.any() and not ended.all(), "both kinds of responses must be in the batch"
    episode = mask.clone()
    longer = mask.sum(dim=1)
    rows = (longer < mask.shape[1]).nonzero().squeeze(1)
    episode[rows, longer[rows]] = True
    logps, ref_logps = (trl[key].masked_fill(~mask, 0) for key in ("logps", "ref_logps"))
    rewards = rl_math.kl_penalized_rewards(trl["scores"], logps, ref_logps, episode, KL_COEF)
    advantages, returns = rl_math.gae(rewards, trl["values"], episode, GAMMA, LAM)
    return {"mask": mask, "episode": episode, "logps": logps, "advantages": advantages, "returns": returns}


def test_advantages_and_returns(trl, ours):
    real = ours["episode"]
    assert torch.allclose(ours["advantages"][real], trl["raw_advantages"][real], atol=1e-5)
    values = trl["values"].masked_fill(~real, 0)
    assert torch.allclose(ours["returns"][real], (trl["raw_advantages"] + values)[real], atol=1e-5)


def test_whitened_advantages(trl, ours):
    ours_white = rl_math.masked_whiten(ours["advantages"], ours["mask"])
    assert torch.allclose(ours_white[ours["mask"]], trl["advantages"][ours["mask"]], atol=1e-5)


def losses(trl, ours, logps, values):
    mask, episode = ours["mask"], ours["episode"]
    white = rl_math.masked_whiten(ours["advantages"], mask)
    policy, _ = rl_math.policy_loss(logps, ours["logps"], white, CLIP)
    value = rl_math.value_loss(values, trl["values"], ours["returns"], CLIP_VALUE)
    return rl_math.masked_mean(policy, mask), rl_math.masked_mean(value, episode)


def test_both_losses_of_both_epochs(trl, ours):
    """The first epoch's ratio is 1; the second one's policy and critic have moved, and both clips are active."""
    new_logps = trl["new_logps"].masked_fill(~ours["mask"], 0)
    ratio = (new_logps - ours["logps"]).exp()[ours["mask"]]
    assert ((ratio - 1).abs() > CLIP).any(), "the clip must be active"
    first = losses(trl, ours, ours["logps"], trl["values"])
    second = losses(trl, ours, new_logps, trl["new_values"])
    for (policy, value), total in zip((first, second), trl["losses"], strict=True):
        assert policy + VF_COEF * value == pytest.approx(float(total), abs=1e-5)
    assert (first[0] + second[0]) / 2 == pytest.approx(float(trl["policy_loss_mean"]), abs=1e-5)
    assert (first[1] + second[1]) / 2 == pytest.approx(float(trl["value_loss_mean"]), abs=1e-5)


def test_kl_per_response(trl, ours):
    kl = ((ours["logps"] - trl["ref_logps"].masked_fill(~ours["mask"], 0)) * ours["mask"]).sum(dim=1).mean()
    assert float(kl) == pytest.approx(float(trl["kl"]), abs=1e-5)
