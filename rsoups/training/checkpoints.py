"""Checkpoints of a training run: written whole or not at all, found again, and PPO's own state in them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from rsoups.common.errors import SettingsError
from rsoups.common.files import sync

_PREFIX = "checkpoint-"
_MANIFEST = "complete.json"

_VALUE_HEAD = "value_head.safetensors"
_STATE = "ppo_state.json"
_ROLLOUT = "rollout-{}.safetensors"  # one for each process


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run's folder; None where there is none.

    A checkpoint is complete if it holds every file that it was finished with, at its size then. So neither an
    interrupted write nor half a copy counts as a checkpoint.
    """
    numbered = [path for path in Path(folder).glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]
    return max(filter(is_complete, numbered), key=lambda path: int(path.name[len(_PREFIX) :]), default=None)


def is_complete(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / _MANIFEST).read_text("utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def finish_checkpoint(partial: Path, final: Path) -> None:
    """Put a filled folder under its final name, in the same file system: a list of its files, fsync, one rename.

    An existing folder of the final name is replaced: a resumed run writes the steps after its checkpoint once more.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    (partial / _MANIFEST).write_text(json.dumps(sizes), "utf-8")
    for path in (*files, partial / _MANIFEST, partial):
        sync(path)

    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(final.parent)


@dataclass
class PPOState:
    """PPO's own state in a checkpoint, beside the files of transformers.

    Attributes:
        kl_coef: β of the KL controller.
        step: TRL's count of forward and backward passes: the place within a rollout.
        value_start: `ValueHead.start`.
        processes: Number of processes of the run.
    """

    kl_coef: float
    step: int
    value_start: float
    processes: int


def save_state(folder: Path, state: PPOState, value_head: dict[str, Tensor]) -> None:
    """Write PPO's state and the critic. For one process."""
    head = {name: value.detach().cpu().contiguous() for name, value in value_head.items()}
    save_file(head, folder / _VALUE_HEAD)
    (folder / _STATE).write_text(json.dumps(asdict(state)), "utf-8")


def load_state(folder: Path, processes: int) -> tuple[PPOState, dict[str, Tensor]]:
    """PPO's state and the critic's parameters.

    Raises:
        SettingsError: Another number of processes wrote the checkpoint, each its part of the rollout.
    """
    values = json.loads((folder / _STATE).read_text("utf-8"))
    state = PPOState(**({"processes": processes} | values))
    if state.processes != processes:
        raise SettingsError(
            f"{folder} was written by {state.processes} processes, each with its part of a rollout, but this run has "
            f"{processes}: resume with --num_processes {state.processes}"
        )
    return state, load_file(folder / _VALUE_HEAD)


def save_rollout(folder: Path, rollout: dict[str, Tensor] | None, process: int) -> None:
    """Write one process's rows of the rollout in progress; an empty file where there is none."""
    rows = {name: value.detach().cpu().contiguous().clone() for name, value in (rollout or {}).items()}
    save_file(rows, folder / _ROLLOUT.format(process))


def load_rollout(folder: Path, process: int) -> dict[str, Tensor] | None:
    """One process's rows of the rollout in progress, on the CPU; None where there is none."""
    return load_file(folder / _ROLLOUT.format(process)) or None
