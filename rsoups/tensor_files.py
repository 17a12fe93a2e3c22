"""Safetensors, written block by block, so that what is written need not be held; and what is asked of every block."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
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
# Numbers in a block. Torch shares larger ones out to threads, and on a busy machine their waiting for one another, operation
# after operation, costs many times the work.
_BLOCK = 2**15 - 1
_UNHASHED = 64  # blocks at most that are held because their hash is behind


def write(
    path: Path,
    layout: Mapping[str, tuple[str, Sequence[int]]],
    blocks: Callable[[str], Iterable[Tensor]],
) -> tuple[int, str]:
    """Write a file of tensors, as `safetensors.torch.save_file` does where `layout` is in its order.

    Args:
        path: Of the file.
        layout: safetensors' dtype and the shape of each tensor, by name, in the order of the file.
        blocks: From a name to the tensor's values, some rows at a time.

    Returns:
        Bytes of all tensors, and the SHA-256 of the file, which is taken beside the writing.

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
    with path.open("wb") as file, ThreadPoolExecutor(1, thread_name_prefix="rsoups-sha256") as beside:
        if hasattr(os, "posix_fallocate"):  # not on macOS; written faster, too, where space is laid out at once
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + at)
        start = len(text).to_bytes(8, "little") + text
        file.write(start)
        hashed = deque([beside.submit(total.update, start)])
        for name in layout:
            for block in blocks(name):
                data = block.contiguous().view(-1).view(torch.uint8).numpy().data
                hashed.append(beside.submit(total.update, data))
                file.write(data)
                if len(hashed) > _UNHASHED:
                    hashed.popleft().result()
    return at, total.hexdigest()


def rows_of_blocks(shape: Sequence[int]) -> int:
    """How many rows of a tensor make a block, of blocks of much the same size."""
    blocks = math.ceil(math.prod(shape) / _BLOCK)
    return math.ceil((shape[0] if shape else 1) / max(blocks, 1)) or 1


def largest(block: Tensor) -> float:
    """The largest magnitude; not finite where any value is not. In a quarter of the time of torch.isfinite."""
    if not block.numel():
        return 0.0
    low, high = torch.aminmax(block.float() if block.dtype.itemsize == 1 else block)
    return max(-low.item(), high.item())  # NaN in any makes both NaN


def is_finite(tensor: Tensor) -> bool:
    return math.isfinite(largest(tensor))
