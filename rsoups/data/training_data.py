"""What adapters were trained on, as their manifests tell it: which prompts, read through which chat template.

A manifest has a mark of each training prompt, some bytes of its hash: enough to find a prompt again, too little to read it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rsoups.adapters.adapter import Adapter
from rsoups.adapters.lineage import Manifest, manifest_of, parents_of, pinned
from rsoups.common.errors import DatasetError, HubError, LineageError
from rsoups.data.prompts import messages_of, response_start

_BYTES = 5  # of a mark: two of a million prompts are taken for each other once in a million million pairs
_MOST = 50_000  # marks of one manifest, 330 kB; of more prompts an even share is kept
_RECIPES = ("ppo", "grpo", "rloo")  # kinds of manifests that tell of a chat template

logger = logging.getLogger(__name__)


def prompt_marks(prompts: Iterable[Any]) -> dict[str, Any]:
    """Marks of prompts for a manifest: ``{"one_in", "base64"}``; of very many prompts an even share is kept, one in so many."""
    marks = sorted({_mark(prompt) for prompt in prompts})
    one_in = -(-len(marks) // _MOST) or 1
    kept = [mark for mark in marks if int.from_bytes(mark, "big") % one_in == 0]
    return {"one_in": one_in, "base64": base64.b64encode(b"".join(kept)).decode()}


def _mark(prompt: Any) -> bytes:
    """A prompt's mark, whatever spaces are in it and whichever words of a response it begins (``--prefix_tokens``)."""
    if isinstance(prompt, str):
        start = response_start(prompt)
        text: Any = " ".join(prompt.removesuffix(start).split() if start else prompt.split())
    else:
        text = [[message["role"], message["content"].strip()] for message in messages_of(prompt)]
    return hashlib.sha256(json.dumps(text).encode()).digest()[:_BYTES]


def manifests_of(adapter: Adapter) -> list[Manifest]:
    """The manifest of an adapter and those of all that it was made from; none where it has none of its own weights."""
    try:
        manifest = manifest_of(pinned(str(adapter.source), adapter.revision))
    except (HubError, LineageError) as error:
        logger.warning("the lineage of %s is not known: %s", adapter.source, error)
        return []
    if manifest is None or manifest.get("sha256") not in (None, adapter.sha256):
        return []
    found = [manifest, *manifest["history"].values()]
    return found + [below for one in found if (below := (one.get("base") or {}).get("lineage"))]


def check_trained(
    manifests: Mapping[str, Sequence[Manifest]], prompts: Sequence[Any], allowed: bool = False
) -> dict[str, int]:
    """How many of some prompts each of some adapters was trained on, as far as manifests tell.

    Args:
        manifests: By the adapters' names, as of `manifests_of`.
        prompts: Texts or messages.
        allowed: Return the numbers where there are such prompts.

    Raises:
        DatasetError: There are such prompts, and they are not allowed.
    """
    marks = [_mark(prompt) for prompt in prompts]
    seen = {name: set().union(*map(_marks_of, found)) for name, found in manifests.items()}
    counts = {name: sum(mark in known for mark in marks) for name, known in seen.items()}
    counts = {name: count for name, count in counts.items() if count}
    if counts and not allowed:
        told = ", ".join(f"{name} on {count}" for name, count in counts.items())
        raise DatasetError(
            f"of {len(prompts)} prompts, {told} were trained on: rewards there say nothing of other prompts. Take other "
            "prompts, such as the test split of the same dataset, or pass allow_trained_prompts, and the report says so"
        )
    return counts


def _marks_of(manifest: Manifest) -> set[bytes]:
    """The marks of a manifest, which may come from anyone."""
    told = (manifest.get("data") or {}).get("prompt_marks")
    try:
        found = base64.b64decode(told["base64"] if isinstance(told, dict) else "", validate=True)
    except (TypeError, KeyError, ValueError):  # binascii.Error is a ValueError
        return set()
    return {found[place : place + _BYTES] for place in range(0, len(found), _BYTES)}


def chat_template_of(manifests: Mapping[str, Sequence[Manifest]]) -> dict[str, Any]:
    """The variables of the chat template that adapters were trained with; none where no manifest tells of any.

    Raises:
        DatasetError: They were trained with different ones.
    """
    told: dict[str, dict[str, Any]] = {}
    for name, found in manifests.items():
        for number, manifest in enumerate(_runs(found), 1):
            settings = (manifest.get("config") or {}).get("chat_template_kwargs")
            told[f"{name}, ingredient {number}" if "ingredients" in found[0] else name] = (
                settings if isinstance(settings, dict) else {}
            )

    different = {json.dumps(settings, sort_keys=True) for settings in told.values()}
    if len(different) > 1:
        raise DatasetError(f"the adapters were trained with different chat_template_kwargs, {told}: say which to use")
    return dict(next(iter(told.values()), {}))


def _runs(manifests: Sequence[Manifest]) -> list[Manifest]:
    """The runs that an adapter comes from: its own, or those of a soup's ingredients."""
    runs = list(manifests[:1])
    if runs and "ingredients" in runs[0]:
        hashes = {str(parent["sha256"]) for parent in parents_of(runs[0])}
        runs = [one for one in manifests[1:] if str(one.get("sha256")) in hashes]
    return [one for one in runs if one.get("kind") in _RECIPES]
