"""The license of a soup: the strictest of its base and ingredients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rsoups.adapters.filenames import CARD_FILE
from rsoups.bases.names import is_on_hub
from rsoups.common.assets import resolve
from rsoups.common.files import is_hub_name

EMBEDDED_PREFIX = "rsoups/"  # their names look like the Hub's, and are not there
# How much each asks for; what is not among them has terms of its own.
_PERMISSIVE = {"cc0-1.0": 0, "unlicense": 0, "mit": 1, "bsd-2-clause": 1, "bsd-3-clause": 1, "apache-2.0": 2}


def on_hub(name: str) -> bool:
    return is_hub_name(name) and is_on_hub(name) and not Path(name).exists()


def license_of(base: str, parents: Sequence[tuple[str, str | None]], given: str | None) -> tuple[str | None, str]:
    """The license for the metadata, None where it would be a guess, and a sentence about it."""
    if given is not None:
        return given, ""
    sources = [(base, None), *parents]
    return strictest({Path(source).name or "the base": _stated(source, revision) for source, revision in sources})


def strictest(licenses: Mapping[str, str | None]) -> tuple[str | None, str]:
    """The license that asks for the most, where that is clear: all are known, and at most one of them is not permissive.

    Args:
        licenses: By what they are of; None where unknown.

    Returns:
        The license or None, and a sentence that says why there is none.
    """
    unknown = sorted(name for name, license in licenses.items() if license is None)
    if unknown:
        return None, f"No license is stated here, since none is known of {', '.join(unknown)}."
    found = {str(license).lower() for license in licenses.values()}
    others = found - _PERMISSIVE.keys()
    if len(others) > 1:
        told = ", ".join(f"{name}: {license}" for name, license in licenses.items())
        return None, f"No license is stated here, since several sets of terms apply ({told})."
    return (others.pop() if others else max(sorted(found), key=lambda name: _PERMISSIVE[name])), ""


def _stated(source: str, revision: str | None) -> str | None:
    """What the card of a model says: a folder's, or the Hub's, if it answers."""
    import httpx2
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    folder = Path(resolve(source)) if source else None
    if folder is None:
        return None
    try:
        if folder.is_dir():
            card = folder / CARD_FILE
            data = ModelCard.load(card, ignore_metadata_errors=True).data if card.is_file() else None
        elif on_hub(source):
            data = HfApi().model_info(source, revision=revision).card_data
        else:
            return None
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.TransportError, OSError, ValueError):
        return None
    return getattr(data, "license", None) if data is not None else None
