"""The processes that share a sweep."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

_LONGEST_WAIT = timedelta(days=7)  # for the slowest process; torch's own limit is ten minutes


class Processes:
    """This process among those of `accelerate launch`.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        is_main: Whether this process is the one that writes the files that all share.
    """

    def __init__(self) -> None:
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
        self.rank: int = self._state.process_index if self._state else 0
        self.count: int = self._state.num_processes if self._state else 1
        self.is_main = self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._state:
            self._state.wait_for_everyone()

    def main_first(self) -> AbstractContextManager[None]:
        """A context that the other processes enter when the main process has left it."""
        return self._state.main_process_first() if self._state else nullcontext()
