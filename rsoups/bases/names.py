"""Names of bases: compare them, and find the name under which a base is published."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

from rsoups.common.assets import embedded_name, resolve
from rsoups.common.errors import AdapterError, CheckpointError, DatasetError
from rsoups.common.published import is_disk_path, published

_SAMPLES, _SAMPLE = 16, 4096  # how many, of how many bytes
# Repositories that are gone from the Hub, and the ones that hold the same weights.
_MOVED = {"decapoda-research/llama-7b-hf": "huggyllama/llama-7b"}
OVERRIDE = "If they are the same weights, pass allow_base_mismatch=True (on the command line --allow_base_mismatch)"


def same_base(one: str | None, other: str | None) -> bool:
    """Whether two names can mean one base; a missing name can mean any.

    Hub ids are compared as texts, and folders of this disk by their files. A folder that is not on this disk is on another
    machine: it is the same base if the last part of its path is the same.
    """
    one, other = (embedded_name(name or "") or _MOVED.get(name or "", name) for name in (one, other))
    if not one or not other or one == other:
        return True
    if all(embedded_name(name) or is_on_hub(name) for name in (one, other)):
        return False
    ours, theirs = _place(one), _place(other)
    if ours.is_dir() and theirs.is_dir():
        return ours.samefile(theirs) or _hold_the_same(ours, theirs)
    return PureWindowsPath(ours).name == PureWindowsPath(theirs).name  # which takes slashes of both kinds


def _place(name: str) -> Path:
    try:
        return Path(resolve(name)).expanduser()
    except (CheckpointError, DatasetError):  # an embedded base of another version, or one that is not installed
        return Path(name)


def _hold_the_same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, judged by samples of bytes from all over the files."""
    ours, theirs = ({path.name: path for path in sorted(folder.glob("*.safetensors"))} for folder in (one, other))
    return bool(ours) and ours.keys() == theirs.keys() and all(_some(ours[n]) == _some(theirs[n]) for n in ours)


def _some(path: Path) -> list[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        samples = [str(size).encode()]
        for part in range(_SAMPLES + 1):
            file.seek(max(0, size - _SAMPLE) * part // _SAMPLES)
            samples.append(file.read(_SAMPLE))
    return samples


def is_on_hub(name: str | None) -> bool:
    """Whether a name is ``user/name``, and not a folder of this disk. (A name without a user is the rest of a path.)"""
    return bool(name) and str(name).count("/") == 1 and embedded_name(str(name)) is None and not is_local(str(name))


def is_local(name: str) -> bool:
    """Whether a base is a folder of this disk, and not an embedded one."""
    return embedded_name(name) is None and (is_disk_path(name) or Path(name).expanduser().is_dir())


def check_base(
    named: Iterable[tuple[str, Any]], base: Any, allow_base_mismatch: bool = False, revision: str | None = None
) -> None:
    """Refuse a base whose name is not the name of the base that adapters were trained on.

    Args:
        named: Source and PEFT config of each adapter.
        base: Name of the base to use, or the loaded base.
        allow_base_mismatch: Accept any base.
        revision: Revision of the base, if known.

    Raises:
        AdapterError: The name differs, or the revision.
    """
    if allow_base_mismatch:
        return
    name = base if isinstance(base, (str, Path)) else getattr(base, "name_or_path", None)
    for source, config in named:
        wanted, version = config.base_model_name_or_path, config.revision
        if not same_base(wanted, str(name or "")):
            raise AdapterError(f"{source} was trained on the base {wanted!r}, this base is {str(name)!r}. {OVERRIDE}")
        if name and wanted and version and revision and version != revision:
            raise AdapterError(
                f"{source} was trained on revision {version!r} of {wanted!r}, this base is revision {revision!r}. {OVERRIDE}"
            )


def public_name(name: str | None, given: str | None = None) -> str | None:
    """Name to publish for a base: `given`, or its `short_name`; a warning if nobody else can load it."""
    if given or not name:
        return given or name
    short = short_name(name)
    if is_local(name):
        warnings.warn(
            f"the base is a folder of this disk: it is published as {short!r}, which nobody else can load. Pass "
            "base='user/name' (on the command line --base user/name) to publish the name of the model on the Hub",
            stacklevel=2,
        )
    return short


def short_name(name: str | None) -> str | None:
    """Name of a base without the path of a folder."""
    if not name or not is_local(name):
        return embedded_name(name or "") or name
    return published(name if is_disk_path(name) else str(Path(name).resolve()))
