"""Names of bases: whether two of them are one base, and what others are told of a base that is a folder of this disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

from rsoups.common.assets import embedded_name, resolve
from rsoups.common.errors import AdapterError, DatasetError
from rsoups.common.published import is_disk_path, published

_SAMPLES, _SAMPLE = 16, 4096  # how many, of how many bytes
# Repositories that are gone from the Hub, and the ones that hold the same weights.
_MOVED = {"decapoda-research/llama-7b-hf": "huggyllama/llama-7b"}
OVERRIDE = "If they are the same weights, pass allow_base_mismatch=True (on the command line --allow_base_mismatch)"


def same_base(one: str | None, other: str | None) -> bool:
    """Whether two names can be of one base; a missing name says nothing.

    Hub ids are compared as they are, two folders of this disk by what they hold. Any other folder is on another machine: it is
    the same base where the last part of its path is the same.
    """
    one, other = (_MOVED.get(name or "", name) for name in (one, other))
    if not one or not other or one == other:
        return True
    ours, theirs = _place(one), _place(other)
    if ours.is_dir() and theirs.is_dir():
        return ours.samefile(theirs) or _hold_the_same(ours, theirs)
    if all(embedded_name(name) or is_on_hub(name) for name in (one, other)):
        return False
    return PureWindowsPath(ours).name == PureWindowsPath(theirs).name  # which takes slashes of both kinds


def _place(name: str) -> Path:
    try:
        return Path(resolve(name)).expanduser()
    except DatasetError:  # an embedded base of another version
        return Path(name)


def _hold_the_same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, as far as some bytes from all over the files tell."""
    ours, theirs = ({path.name: path for path in sorted(folder.glob("*.safetensors"))} for folder in (one, other))
    return bool(ours) and ours.keys() == theirs.keys() and all(_some(ours[n]) == _some(theirs[n]) for n in ours)


def _some(path: Path) -> list[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        found = [str(size).encode()]
        for part in range(_SAMPLES + 1):
            file.seek(max(0, size - _SAMPLE) * part // _SAMPLES)
            found.append(file.read(_SAMPLE))
    return found


def is_on_hub(name: str | None) -> bool:
    """Whether a name is ``user/name``, and no folder of this disk. (One without a user is what is left of a folder's path.)"""
    return bool(name) and str(name).count("/") == 1 and embedded_name(str(name)) is None and not is_local(str(name))


def is_local(name: str) -> bool:
    """Whether a base is a folder of this disk, and no embedded one."""
    return embedded_name(name) is None and (is_disk_path(name) or Path(name).expanduser().is_dir())


def check_base(
    named: Iterable[tuple[str, Any]], base: Any, allow_base_mismatch: bool = False, revision: str | None = None
) -> None:
    """Refuse a base that is not the one which adapters were trained on, as far as their names tell.

    Args:
        named: (Where an adapter is from, its PEFT config) of each.
        base: Name of the base that is to be used, or the loaded base itself.
        allow_base_mismatch: Accept it all the same.
        revision: The base's, where it is known.

    Raises:
        AdapterError: Another name, or another revision of the same name.
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
    """What others are told of a base: `given`, or its `short_name`, with a warning where nobody else can load that."""
    if given or not name:
        return given or name
    told = short_name(name)
    if is_local(name):
        warnings.warn(
            f"the base is a folder of this disk: it is published as {told!r}, which nobody else can load. Pass "
            "base='user/name' (on the command line --base user/name) to publish the name of the model on the Hub",
            stacklevel=2,
        )
    return told


def short_name(name: str | None) -> str | None:
    """A base's name without the path of a folder."""
    if not name or not is_local(name):
        return embedded_name(name or "") or name
    return published(name if is_disk_path(name) else str(Path(name).resolve()))
