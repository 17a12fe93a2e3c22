"""Read, check and write safetensors, tensor by tensor: no file is ever held as a whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
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
# Numbers that are looked at at once. Larger blocks torch shares out to threads, beside those in which files are read: they
# wait for each other, longer than they work.
_BLOCK = 2**15 - 1
_HELD = 2**30  # largest file that is kept in memory, in bytes
_UNHASHED = 4  # tensors that may wait for their hash: more would only take memory
_UNSYNCED = 2**23  # bytes that are written before the disk is asked to store them


class Scan(NamedTuple):
    """Result of reading all tensors once.

    Attributes:
        sha256: SHA-256 of the file.
        largest: Largest magnitude of all values.
        not_finite: Name of the first tensor with NaN or infinity, or None.
    """

    sha256: str
    largest: float
    not_finite: str | None


class TensorFile:
    """A safetensors file, opened once: everything is read from this one file, even if another takes its name.

    It is read, never mapped, so that a file that is cut short causes an error and not a crash.

    Attributes:
        layout: Meta tensor for each name, in the order of the file. A type that is not floating-point appears as int64.
        found_as: Status of the file when it was opened.
    """

    def __init__(self, path: Path, hold: bool = False):
        """Open the file, and check its header.

        Args:
            path: Name of the file.
            hold: Keep the tensors that `scan` reads, up to 1 GiB.

        Raises:
            OSError, ValueError, SafetensorError: The file cannot be read, or is not safetensors.
        """
        with path.open("rb") as file:
            self.found_as = os.fstat(file.fileno())
            # It refuses headers that are too long or malformed, gaps, overlaps, and wrong sizes.
            self._file = safe_open(path, "pt", backend="pread")
            length = file.read(8)
            self._header = length + file.read(int.from_bytes(length, "little"))
        now = path.stat()
        if now.st_ino != self.found_as.st_ino or now.st_mtime_ns != self.found_as.st_mtime_ns:
            raise OSError("it was written while it was being opened")

        views = {name: self._file.get_slice(name) for name in self._file.offset_keys()}
        self.layout = {
            name: torch.empty(view.get_shape(), dtype=DTYPES.get(view.get_dtype(), torch.int64), device="meta")
            for name, view in views.items()
        }
        self._held: dict[str, Tensor] | None = {} if hold and self.found_as.st_size <= _HELD else None

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some rows of it, on the CPU.

        Raises:
            OSError: The file is cut short.
        """
        whole = rows == slice(None)
        if self._held and name in self._held:
            return self._held[name] if whole else self._held[name][rows]
        try:
            return self._file.get_tensor(name) if whole else self._file.get_slice(name)[rows]
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise OSError(str(error)) from None

    def scan(self) -> Scan:
        """Read the file once: hash it, and look for values that are not finite.

        Raises:
            OSError: The file is cut short.
        """
        total, top, not_finite = hashlib.sha256(self._header), 0.0, None
        for name in self.layout:
            tensor = self.read(name)
            total.update(_bytes_of(tensor))
            if not_finite is None and tensor.is_floating_point():
                magnitude = largest(tensor)
                top, not_finite = max(top, magnitude), None if math.isfinite(magnitude) else name
            if self._held is not None:
                self._held[name] = tensor
        return Scan(total.hexdigest(), top, not_finite)


def write(
    path: Path,
    layout: Mapping[str, tuple[str, Sequence[int]]],
    pieces: Callable[[str], Iterable[Tensor]],
) -> tuple[int, str]:
    """Write a safetensors file, byte for byte as `safetensors.torch.save_file` does if `layout` is in its order.

    Args:
        path: Name of the file.
        layout: Type (in safetensors' words) and shape of each tensor by name, in the order of the file.
        pieces: Function from a name to the tensor's rows, in one piece or several.

    Returns:
        Bytes of all tensors, and the SHA-256 of the file.

    Raises:
        OSError: The disk is full: found before the first tensor is made, if the system can reserve space.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape) in layout.items():
        end = at + _SIZES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    start = len(text).to_bytes(8, "little") + text
    total = hashlib.sha256(start)
    hashing, syncing = (ThreadPoolExecutor(1, thread_name_prefix=f"rsoups-{task}") for task in ("sha256", "sync"))
    with path.open("wb") as file, hashing, syncing:
        if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
            os.posix_fallocate(file.fileno(), 0, len(start) + at)
        file.write(start)
        hashed: deque[Future[None]] = deque()
        synced, unsynced = [], 0
        for name in layout:
            for piece in pieces(name):
                # The disk and the hash work while the next tensors are made.
                data = _bytes_of(piece)
                hashed.append(hashing.submit(total.update, data))
                file.write(data)
                if len(hashed) > _UNHASHED:
                    hashed.popleft().result()
                unsynced += len(data)
                if unsynced >= _UNSYNCED:
                    file.flush()
                    synced.append(syncing.submit(getattr(os, "fdatasync", os.fsync), file.fileno()))
                    unsynced = 0
        for task in synced:
            task.result()  # an error of the disk is reported only once
    return at, total.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def largest(tensor: Tensor) -> float:
    """The largest magnitude; not finite if any value is not. It takes a quarter of the time of torch.isfinite."""
    top = 0.0
    for block in tensor.reshape(-1).split(_BLOCK) if tensor.numel() else ():
        low, high = torch.aminmax(block.float() if block.dtype.itemsize == 1 else block)
        magnitude = max(-low.item(), high.item())  # NaN in any makes both NaN
        if not math.isfinite(magnitude):
            return magnitude
        top = max(top, magnitude)
    return top


def is_finite(tensor: Tensor) -> bool:
    return math.isfinite(largest(tensor))
