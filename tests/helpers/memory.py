"""How much memory a piece of work takes at its peak, as Linux tells it."""

import gc
from pathlib import Path

import pytest

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
told = pytest.mark.skipif(not _RESET.exists(), reason="only Linux tells a process's peak of memory anew")
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # environment of a process whose freed memory is seen to be free


def growth(work):
    """Megabytes at the peak beyond those that were there before. (`ru_maxrss` hides what is below the peak of the imports.)"""
    gc.collect()
    _RESET.write_text("5")
    before = _megabytes("VmRSS")
    work()
    return _megabytes("VmHWM") - before


def _megabytes(kind):
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024
