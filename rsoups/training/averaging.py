"""Averages along one run: of its checkpoints, and of its weights while it trains.

Uniform soups of runs that differ in seed or learning rate (DiWA, Ramé et al. 2022) are ``interpolate(adapters)``.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.filenames import WEIGHTS_FILE
from rsoups.common.errors import AdapterError, LambdasError, TrainingError
from rsoups.soups.interpolation import interpolate
from rsoups.soups.soup import Soup
from rsoups.training.checkpoints import is_complete

logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def moving_average(
    checkpoints_of_one_run: str | Path | Sequence[str | Path], *, method: str = "exact", rank: int | float | None = None
) -> Soup:
    """The uniform average of one run's checkpoints, the baseline of weight averaging along a trajectory.

    Args:
        checkpoints_of_one_run: Folder of the run, for all its complete checkpoints; or the checkpoints' folders.
        method, rank: As in `interpolate`. The exact average of M checkpoints has M times the rank; ``svd`` keeps it small, and
            ``factors`` averages A and B as an optimizer's average of the trained parameters would.

    Raises:
        AdapterError: No checkpoints, or as `interpolate`.
    """
    if isinstance(checkpoints_of_one_run, (str, Path)):
        run = Path(checkpoints_of_one_run)
        numbered = [
            p for p in run.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name) and (p / WEIGHTS_FILE).is_file()
        ]
        folders = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
        if not folders:
            raise AdapterError(f"{run} holds no checkpoint-N with an adapter: train with save_steps")
        if any((path / "complete.json").exists() for path in folders):
            folders = [path for path in folders if is_complete(path)]
    else:
        folders = [Path(path) for path in checkpoints_of_one_run]
    soup = interpolate(folders, method=method, rank=rank)
    assert isinstance(soup, Soup)
    return soup


class EMACallback(TrainerCallback):
    """Keeps the exponential moving average of the trained parameters: θ̄ ← d·θ̄ + (1 - d)·θ after each step.

    Each checkpoint, and the run's folder at the end, gets a folder ``ema`` with the averaged adapter. A resumed run continues
    the average of its checkpoint. For any transformers or TRL trainer of a PeftModel whose parameters are whole on each
    process (one process, DDP).

    Args:
        decay: Decay d, in [0, 1).
    """

    def __init__(self, decay: float = 0.99):
        if not 0 <= decay < 1:
            raise LambdasError(f"decay is {decay}, must be in [0, 1)")
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average = {name: p.detach().float().clone() for name, p in _trained(model)}
        if state.global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "ema"
            if not (folder / WEIGHTS_FILE).is_file():
                raise TrainingError(
                    f"{folder} is missing: resume from a checkpoint that holds it, or without EMACallback"
                )
            saved = read_adapter(folder)
            for name, average in self.average.items():
                if ".default." in name:  # the adapter's; a critic's head is averaged from here on, and never saved
                    average.copy_(saved.tensor(name.replace(".modules_to_save.", ".").replace(".default.", ".")))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in _trained(model):
            self.average[name].lerp_(parameter.detach().float(), 1 - self.decay)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", model, state)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._write(Path(args.output_dir), model, state)

    def _write(self, folder: Path, model: Any, state: Any) -> None:
        if not state.is_world_process_zero or not folder.is_dir():
            return
        policy = getattr(model, "module", model)
        partial = folder / ".ema.partial"
        with self._swapped_in(model):
            policy.save_pretrained(partial, selected_adapters=["default"])
        shutil.rmtree(folder / "ema", ignore_errors=True)
        partial.rename(folder / "ema")

    @contextmanager
    def _swapped_in(self, model: Any) -> Iterator[None]:
        """A context in which the model's parameters are the averages."""
        own = {name: parameter.detach().clone() for name, parameter in _trained(model)}
        try:
            for name, parameter in _trained(model):
                parameter.data.copy_(self.average[name])
            yield
        finally:
            for name, parameter in _trained(model):
                parameter.data.copy_(own[name])


def _trained(model: Any) -> list[tuple[str, Tensor]]:
    policy = getattr(model, "module", model)
    if not isinstance(policy, PeftModel):
        raise TrainingError("EMACallback averages an adapter, but the trainer's model is no PeftModel")
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
