"""The child process that opens a pickle: python -m rsoups.common.unpickle PICKLE OUT. `rsoups.adapters.convert` starts it.

torch's weights-only unpickler builds tensors and plain containers and calls nothing else. The rest here is in case that it
has a hole: this process has no network, starts no program, changes no file but OUT, and has bounded memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000  # flags of Linux's unshare
_SPARE = 2**30  # bytes beyond the file's own size
_TIMES = 4  # a file may say that one storage is several tensors: so much more is written at most

# Python's audit events (docs.python.org/3/library/audit_events.html) of what reading tensors never needs.
_FORBIDDEN: tuple[str, ...] = tuple(
    "socket. subprocess. os.system os.exec os.fork os.posix_spawn os.spawn os.kill os.remove os.rename os.rmdir os.mkdir "
    "os.chmod os.chown os.link os.symlink os.truncate shutil. urllib. http. ftplib. smtplib. webbrowser. ctypes.".split()
)


class RefusedError(Exception):
    """The file holds something other than tensors."""


def main(pickle: str, out: str) -> None:
    leave_network()
    import torch
    from safetensors.torch import save_file

    limit_memory(_SPARE + (2 + _TIMES) * Path(pickle).stat().st_size)
    sys.addaudithook(forbid)
    is_zip = zipfile.is_zipfile(pickle)  # else torch's format before 1.6, which cannot be mapped
    if is_zip and any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(pickle).infolist()):
        raise RefusedError("its entries are compressed, as torch never writes them")  # mapped, they would be noise
    try:
        state = torch.load(pickle, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        # torch's message goes on to tell how to switch its guard off, which nobody should do.
        match = re.search(r"GLOBAL (\S+)", str(error))
        raise RefusedError(f"it asks for {match[1]}" if match else "it is no pickle of tensors, or damaged") from None
    save_file(tensors_of(state, Path(pickle).stat().st_size), out, metadata={"format": "pt"})


def leave_network() -> None:
    """Go into a network of one's own that holds nothing (Linux); before any thread starts, as the system wants it."""
    if sys.platform == "linux":
        system = ctypes.CDLL(None)
        if system.unshare(_NEW_NETWORK) and system.unshare(_NEW_NETWORK | _NEW_USER):
            return  # not allowed in some containers; the audit hook stays


def limit_memory(spare: int) -> None:
    """Allow so many bytes beyond what the process has already."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event.startswith(_FORBIDDEN) or writes:
        raise RefusedError(f"reading it asks for {event}{arguments[:1]}")


def tensors_of(state: Any, size: int) -> dict[str, Any]:
    """Tensors by name, each with memory of its own: what shared a storage is told apart."""
    import torch

    if not isinstance(state, dict):
        raise RefusedError(f"it holds a {type(state).__name__}, not tensors by name")
    total, storages, tensors = 0, set(), {}
    for name, tensor in state.items():
        if not isinstance(name, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise RefusedError(f"its entry {name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            raise RefusedError(f"its tensor {name!r} is of a kind that safetensors does not hold")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise RefusedError(f"its tensor {name!r} is larger than its values")
        total += tensor.numel() * tensor.element_size()
        if total > _TIMES * size + _SPARE // 4:
            raise RefusedError(f"its tensors are larger than {_TIMES} times the file")
        tensor = tensor.detach()
        is_whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        tensors[name] = tensor if is_whole and storage.data_ptr() not in storages else tensor.clone().contiguous()
        storages.add(storage.data_ptr())
    return tensors


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (Exception, MemoryError) as error:  # told to the parent in words, never as a traceback
        print(json.dumps(f"{type(error).__name__}: {error}"), file=sys.stderr)
        sys.exit(1)
