"""What a PPO run does beside training: it can be interrupted, and it shows where it is."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback


class Interrupt(TrainerCallback):
    """Saves and stops after the step in which Ctrl-C was pressed, on all processes at once."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.asked = False

    def handle(self, signum: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.accelerator.num_processes > 1:  # a signal may reach one process a step later than another
            asked = torch.tensor(float(self.asked), device=self.accelerator.device)
            self.asked = bool(self.accelerator.reduce(asked, reduction="sum") > 0)
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


class PPOProgress(ProgressCallback):
    """The progress bar with the last rollout's figures beside it, instead of a printed dictionary at each log."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[float, float] | None = None  # moment and tokens of the last log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and self.training_bar is not None and logs):
            return
        shown = {key: f"{logs[key]:.2f}" for key in ("reward", "kl", "value_loss") if key in logs}
        if "num_tokens" in logs:
            now = (time.monotonic(), logs["num_tokens"])
            if self._last is not None:
                seconds, tokens = now[0] - self._last[0], now[1] - self._last[1]
                shown["tokens/s"] = f"{tokens / max(seconds, 1e-9):.0f}"
            self._last = now
        self.training_bar.set_postfix(shown)
