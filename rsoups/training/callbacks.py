"""Callbacks of a training run: Ctrl-C, a progress bar with PPO's figures, a file of progress for a launcher."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback

from rsoups.training.launch import PROGRESS_FILE

_FIGURES = ("reward", "kl", "value_loss")  # beside the bar


class Interrupt(TrainerCallback):
    """Saves and stops after the step in which Ctrl-C was pressed, on all processes at once."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.requested = False

    def handle(self, signum: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.accelerator.num_processes > 1:  # a signal may reach one process a step later than another
            requested = torch.tensor(float(self.requested), device=self.accelerator.device)
            self.requested = bool(self.accelerator.reduce(requested, reduction="sum") > 0)
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def interruptible(trainer: Any) -> Iterator[None]:
    """A context in which the first Ctrl-C saves a checkpoint after the step and stops; the second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return

    interrupt = Interrupt(trainer.accelerator)
    trainer.add_callback(interrupt)
    handler = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        trainer.remove_callback(interrupt)
    if interrupt.requested:
        trainer.accelerator.print(
            f"Interrupted at step {trainer.state.global_step}. Resume with --resume, or resume_from_checkpoint=True."
        )


class PPOProgress(ProgressCallback):
    """The progress bar with the last rollout's figures beside it, instead of a printed dictionary at each log."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[float, float] | None = None  # moment and tokens of the last log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and self.training_bar is not None and logs):
            return
        figures = {key: f"{logs[key]:.2f}" for key in _FIGURES if key in logs}
        if "num_tokens" in logs:
            now = (time.monotonic(), logs["num_tokens"])
            if self._last is not None:
                seconds, tokens = now[0] - self._last[0], now[1] - self._last[1]
                figures["tokens/s"] = f"{tokens / max(seconds, 1e-9):.0f}"
            self._last = now
        self.training_bar.set_postfix(figures)


class ProgressFile(TrainerCallback):
    """Writes a run's progress to a file for the process that started it, one JSON object a line.

    A line holds `step`, `steps` and, once there is a log, the figures of the last one. See `rsoups.training.launch`.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._figures: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self._figures = {key: logs[key] for key in (*_FIGURES, "loss") if logs and key in logs} or self._figures

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            line = {"step": state.global_step, "steps": state.max_steps} | self._figures
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def launcher_callbacks() -> list[TrainerCallback]:
    """A `ProgressFile` where a launcher asks for one by the environment; else none."""
    path = os.environ.get(PROGRESS_FILE)
    return [ProgressFile(path)] if path else []
