"""Rewarded soups as a Hugging Face toolkit: train one adapter per reward, interpolate, sweep λ, share the result.

The public names are in `__all__`. They are imported when first used, so that ``import rsoups`` stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsoups._errors import (
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
    from rsoups.averaging import EMACallback, greedy, moving_average
    from rsoups.explorer import explore
    from rsoups.front import Front
    from rsoups.full_weights import interpolate_checkpoints
    from rsoups.grids import simplex
    from rsoups.hub import push_front
    from rsoups.judge import Judge, JudgeCard
    from rsoups.live import LiveSoup
    from rsoups.ppo import PPOTrainer
    from rsoups.ppo_config import PPOConfig
    from rsoups.probing import Probe, Sample, probe
    from rsoups.report import write_report
    from rsoups.scoring import Reward, RewardCard, load_reward
    from rsoups.soup import Soup, interpolate
    from rsoups.space import write_space
    from rsoups.sweeps import sweep
    from rsoups.votes import fit_votes

__version__ = "0.1.0"

_HOMES = {
    "_errors": (
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
    "averaging": ("EMACallback", "greedy", "moving_average"),
    "explorer": ("explore",),
    "front": ("Front",),
    "full_weights": ("interpolate_checkpoints",),
    "hub": ("push_front",),
    "grids": ("simplex",),
    "judge": ("Judge", "JudgeCard"),
    "live": ("LiveSoup",),
    "ppo": ("PPOTrainer",),
    "ppo_config": ("PPOConfig",),
    "probing": ("Probe", "Sample", "probe"),
    "report": ("write_report",),
    "scoring": ("Reward", "RewardCard", "load_reward"),
    "soup": ("Soup", "interpolate"),
    "space": ("write_space",),
    "sweeps": ("sweep",),
    "votes": ("fit_votes",),
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
