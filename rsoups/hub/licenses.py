"""The license of a soup: the strictest of its base and ingredients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rsoups.adapters.filenames import CARD_FILE
from rsoups.bases.names import is_on_hub
from rsoups.common.assets import resolve
from rsoups.common.files import is_hub_name

EMBEDDED_PREFIX = "rsoups/"  # names of embedded models look like Hub ids, but are not on the Hub
# Permissive licenses by how much they ask for. Any other license has terms of its own.
_PERMISSIVE = {"cc0-1.0": 0, "unlicense": 0, "mit": 1, "bsd-2-clause": 1, "bsd-3-clause": 1, "apache-2.0": 2}


class Terms(NamedTuple):
    """License of what is published.

    Attributes:
        license: The Hub's name of the license; None where it would be a guess.
        remark: Why the card has no license, in a sentence; "" otherwise.
    """

    license: str | None
    remark: str = ""


def on_hub(name: str) -> bool:
    """Whether a name is that of a repository on the Hub, and not of a folder of this disk."""
    return is_hub_name(name) and is_on_hub(name) and not Path(name).exists()


def license_of(base: str, ingredients: Sequence[tuple[str, str | None]], given: str | None) -> Terms:
    """Return the license of a soup or an adapter.

    Args:
        base: Folder or Hub id of the base.
        ingredients: Folder or Hub id, and commit, of each adapter that it is made of.
        given: The user's own choice, which is taken as it is.
    """
    if given is not None:
        return Terms(given)
    sources = [(base, None), *ingredients]
    return strictest({Path(source).name or "the base": _stated(source, revision) for source, revision in sources})


def strictest(licenses: Mapping[str, str | None]) -> Terms:
    """Return the license that asks for the most, where that is clear: all are known, and at most one is not permissive.

    Args:
        licenses: License of each model by its name; None where it is unknown.
    """
    unknown = sorted(name for name, license in licenses.items() if license is None)
    if unknown:
        return Terms(None, f"No license is stated here, since none is known of {', '.join(unknown)}.")

    names = {str(license).lower() for license in licenses.values()}
    others = names - _PERMISSIVE.keys()
    if len(others) > 1:
        pairs = ", ".join(f"{name}: {license}" for name, license in licenses.items())
        return Terms(None, f"No license is stated here, since several sets of terms apply ({pairs}).")
    return Terms(others.pop() if others else max(sorted(names), key=lambda name: _PERMISSIVE[name]))


def _stated(source: str, revision: str | None) -> str | None:
    """The license in the card of a model: a folder's, or the Hub's, if it answers."""
    import httpx2
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not source:
        return None
    folder = Path(resolve(source))
    data = None
    try:
        if (folder / CARD_FILE).is_file():
            data = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True).data
        elif not folder.is_dir() and on_hub(source):
            data = HfApi().model_info(source, revision=revision).card_data
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.TransportError, OSError, ValueError):
        return None
    return getattr(data, "license", None)
