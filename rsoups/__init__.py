"""Rewarded soups as a Hugging Face toolkit: train one adapter per reward, interpolate, sweep λ, share the result.

The public names are in `__all__`. They are imported when first used, so that ``import rsoups`` stays instant.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsoups.common.errors import (
        AdapterError,
        CheckpointError,
        DatasetError,
        FrontError,
        HubError,
        LambdasError,
        LineageError,
        OutputError,
        RewardError,
        RsoupsError,
        ServerError,
        SettingsError,
        SuiteError,
        TrainingError,
        VotesError,
    )
    from rsoups.explorer.app import explore
    from rsoups.explorer.space import write_space
    from rsoups.fronts.front import Front
    from rsoups.fronts.grids import simplex
    from rsoups.fronts.votes import fit_votes
    from rsoups.reports.report import write_report
    from rsoups.rewards.cards import RewardCard
    from rsoups.rewards.classifier import Reward
    from rsoups.rewards.judge import Judge, JudgeCard
    from rsoups.rewards.load import load_reward
    from rsoups.rewards.probing import Probe, probe
    from rsoups.soups.greedy import greedy
    from rsoups.soups.interpolation import interpolate
    from rsoups.soups.live import LiveSoup
    from rsoups.soups.share import push_front
    from rsoups.soups.soup import Soup
    from rsoups.soups.whole_models import interpolate_checkpoints
    from rsoups.sweeps.settings import SweepSettings
    from rsoups.sweeps.sweep import sweep
    from rsoups.training.averaging import EMACallback, moving_average
    from rsoups.training.ppo import PPOTrainer
    from rsoups.training.ppo_config import PPOConfig

__version__ = "0.1.0"

# Idle threads of torch sleep. Its OpenMP runtime lets them spin, and beside another busy process everything then takes several
# times as long. The runtime reads its settings once, when torch is loaded; what the user has set stays.
if "torch" not in sys.modules and not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

_HOMES = {
    "common.errors": (
        "AdapterError",
        "CheckpointError",
        "DatasetError",
        "FrontError",
        "HubError",
        "LambdasError",
        "LineageError",
        "OutputError",
        "RewardError",
        "RsoupsError",
        "ServerError",
        "SettingsError",
        "SuiteError",
        "TrainingError",
        "VotesError",
    ),
    "soups.greedy": ("greedy",),
    "training.averaging": ("EMACallback", "moving_average"),
    "explorer.app": ("explore",),
    "fronts.front": ("Front",),
    "soups.whole_models": ("interpolate_checkpoints",),
    "soups.share": ("push_front",),
    "fronts.grids": ("simplex",),
    "rewards.judge": ("Judge", "JudgeCard"),
    "soups.live": ("LiveSoup",),
    "training.ppo": ("PPOTrainer",),
    "training.ppo_config": ("PPOConfig",),
    "rewards.probing": ("Probe", "probe"),
    "generation.samples": ("Sample",),
    "reports.report": ("write_report",),
    "rewards.cards": ("RewardCard",),
    "rewards.classifier": ("Reward",),
    "rewards.load": ("load_reward",),
    "soups.interpolation": ("interpolate",),
    "soups.soup": ("Soup",),
    "explorer.space": ("write_space",),
    "sweeps.settings": ("SweepSettings",),
    "sweeps.sweep": ("sweep",),
    "fronts.votes": ("fit_votes",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DatasetError",
    "EMACallback",
    "Front",
    "FrontError",
    "HubError",
    "Judge",
    "JudgeCard",
    "LambdasError",
    "LineageError",
    "LiveSoup",
    "OutputError",
    "PPOConfig",
    "PPOTrainer",
    "Probe",
    "Reward",
    "RewardCard",
    "RewardError",
    "RsoupsError",
    "Sample",
    "ServerError",
    "SettingsError",
    "Soup",
    "SuiteError",
    "SweepSettings",
    "TrainingError",
    "VotesError",
    "explore",
    "fit_votes",
    "greedy",
    "interpolate",
    "interpolate_checkpoints",
    "load_reward",
    "moving_average",
    "probe",
    "push_front",
    "simplex",
    "sweep",
    "write_report",
    "write_space",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rsoups' has no attribute {name!r}")

    value = getattr(import_module(f"rsoups.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
