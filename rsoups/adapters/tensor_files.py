"""Safetensors, read and written piece by piece, so that they need not be held; and what is asked of every block."""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
# Numbers in a block, which torch computes at once. It shares larger ones out to threads, and on a busy machine their waiting
# for one another, operation after operation, costs many times the work.
_BLOCK = 2**15 - 1
_PIECE = 2**18  # numbers in a piece, which is read or written at once
_HELD = 2**30  # bytes of a file at most that are kept
_UNSYNCED = 2**23  # bytes, from which on the disk is set to work
_UNHASHED = 8  # pieces at most that are held because their hash is behind


class Scan(NamedTuple):
    """What one reading of all tensors tells.

    Attributes:
        sha256: Of the file.
        largest: The largest magnitude of all values.
        not_finite: Name of the first tensor that holds NaN or infinity, None where there is none.
    """

    sha256: str
    largest: float
    not_finite: str | None


class TensorFile:
    """A safetensors file, opened once: whatever its name leads to later, all that is read is of this one file.

    It is read, never mapped, so that a file that is cut short is an error and no crash.

    Attributes:
        layout: Names, shapes and dtypes of its tensors (on the meta device, without values; what is not floating-point is
            told by its kind only), in the order of the file.
        found_as: What the system told of it when it was opened.
    """

    def __init__(self, path: Path, hold: bool = False):
        """Open and check the file.

        Args:
            path: Of the file.
            hold: Keep what `scan` reads, so that the file is read once; no more than 1 GiB.

        Raises:
            OSError, ValueError, SafetensorError: It cannot be read, or is no safetensors file.
        """
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._turn = Lock()
        self.found_as = os.fstat(self._file.fileno())
        with safe_open(path, "pt", backend="pread") as checked:  # refuses what is out of order: gaps, overlaps, sizes
            views = {name: checked.get_slice(name) for name in checked.keys()}  # noqa: SIM118 (not a dict)
            kinds = {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}
        if (now := path.stat()).st_ino != self.found_as.st_ino or now.st_mtime_ns != self.found_as.st_mtime_ns:
            raise OSError("it was written while it was being opened")
        length = int.from_bytes(self._bytes(0, 8), "little")
        self._start = 8 + length
        header = json.loads(self._bytes(8, length))
        header.pop("__metadata__", None)
        if {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} != kinds:
            raise ValueError("its header tells two things of one tensor")
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        self._places: dict[str, tuple[int, int]] = dict(sorted(places.items(), key=lambda item: item[1]))
        self.layout = {
            name: torch.empty(kinds[name][1], dtype=DTYPES.get(kinds[name][0], torch.int64), device="meta")
            for name in self._places
        }
        size = self.found_as.st_size - self._start
        self._held = torch.empty(size if hold and size <= _HELD else 0, dtype=torch.uint8)
        self._holds = False

    def _bytes(self, at: int, count: int) -> bytearray:
        data = bytearray(count)
        self._read_into(memoryview(data), at)
        return data

    def _read_into(self, data: memoryview, at: int) -> None:
        """Fill `data` with the file's bytes from `at` on."""
        with self._turn:
            self._file.seek(at)
            filled = 0
            while filled < len(data):
                if not (count := self._file.readinto(data[filled:])):
                    raise OSError("it ends too early")
                filled += count

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Some rows of a tensor, or all of it.

        Raises:
            OSError: The file is cut short.
        """
        like = self.layout[name]
        start, stop, _ = rows.indices(like.shape[0]) if like.dim() else (0, 1, 1)
        shape = (stop - start, *like.shape[1:]) if like.dim() else ()
        row = math.prod(like.shape[1:]) * like.dtype.itemsize
        first, size = self._places[name][0] + start * row, (stop - start) * row
        if self._holds:
            data = self._held[first : first + size]
            data = data if first % like.dtype.itemsize == 0 else data.clone()
        else:
            data = torch.empty(size, dtype=torch.uint8)
            self._read_into(data.numpy().data, self._start + first)
        return data.view(like.dtype).view(shape)

    def scan(self) -> Scan:
        """Read the file, once.

        Raises:
            OSError: It is cut short.
        """
        total, top, not_finite = hashlib.sha256(self._bytes(0, self._start)), 0.0, None
        for name, (first, stop) in self._places.items():
            dtype = self.layout[name].dtype
            for data in self._pieces(first, stop):
                total.update(data.numpy().data)
                if not_finite is None and dtype.is_floating_point:
                    found = max(map(largest, data.view(dtype).split(_BLOCK)), default=0.0)
                    top, not_finite = max(top, found), None if math.isfinite(found) else name
        self._holds = self._held.numel() > 0
        return Scan(total.hexdigest(), top, not_finite)

    def _pieces(self, first: int, stop: int) -> Iterator[Tensor]:
        """The bytes of a tensor, into the memory that holds them or into the same piece of memory again and again."""
        again = torch.empty(0 if self._held.numel() else min(8 * _PIECE, stop - first), dtype=torch.uint8)
        for at in range(first, stop, 8 * _PIECE):  # of whole numbers, whatever their size
            size = min(8 * _PIECE, stop - at)
            piece = self._held[at : at + size] if self._held.numel() else again[:size]
            self._read_into(piece.numpy().data, self._start + at)
            yield piece


def write(
    path: Path,
    layout: Mapping[str, tuple[str, Sequence[int]]],
    pieces: Callable[[str], Iterable[Tensor]],
) -> tuple[int, str]:
    """Write a file of tensors, as `safetensors.torch.save_file` does where `layout` is in its order.

    Args:
        path: Of the file.
        layout: safetensors' dtype and the shape of each tensor, by name, in the order of the file.
        pieces: From a name to the tensor's values, some rows at a time.

    Returns:
        Bytes of all tensors, and the SHA-256 of the file, which is taken beside the writing, as the disk works beside it.

    Raises:
        OSError: The disk is full: told before any tensor is asked for, where the system can set space aside.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape) in layout.items():
        end = at + _SIZES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    total = hashlib.sha256()
    hashing, syncing = (ThreadPoolExecutor(1, thread_name_prefix=f"rsoups-{task}") for task in ("sha256", "sync"))
    sync = getattr(os, "fdatasync", os.fsync)  # not on macOS
    with path.open("wb") as file, hashing, syncing:
        if hasattr(os, "posix_fallocate"):  # not on macOS; written faster, too, where space is laid out at once
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + at)
        start = len(text).to_bytes(8, "little") + text
        file.write(start)
        hashed, synced, unsynced = deque([hashing.submit(total.update, start)]), [], 0
        for name in layout:
            for piece in pieces(name):
                data = piece.contiguous().view(-1).view(torch.uint8).numpy().data
                hashed.append(hashing.submit(total.update, data))
                file.write(data)
                if len(hashed) > _UNHASHED:
                    hashed.popleft().result()
                if (unsynced := unsynced + len(data)) >= _UNSYNCED:
                    file.flush()
                    synced.append(syncing.submit(sync, file.fileno()))
                    unsynced = 0
        for task in synced:
            task.result()  # an error of the disk is told once
    return at, total.hexdigest()


def rows_of_pieces(shape: Sequence[int]) -> int:
    """How many rows of a tensor make a piece."""
    return max(1, _PIECE // max(1, math.prod(shape[1:])))


def in_blocks(*pieces: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of pieces that have equally many, few enough to be computed at once."""
    rows = max(1, _BLOCK // max(piece[:1].numel() for piece in pieces)) if len(pieces[0]) else 1
    return zip(*(piece.split(rows) for piece in pieces), strict=True)


def largest(block: Tensor) -> float:
    """The largest magnitude; not finite where any value is not. In a quarter of the time of torch.isfinite."""
    if not block.numel():
        return 0.0
    low, high = torch.aminmax(block.float() if block.dtype.itemsize == 1 else block)
    return max(-low.item(), high.item())  # NaN in any makes both NaN


def is_finite(tensor: Tensor) -> bool:
    return math.isfinite(largest(tensor))
