"""The prompts and the chat template that adapters were trained with, as their manifests record them.

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

_BYTES = 5  # of a mark: two prompts have the same one once in a million million pairs
_MOST = 50_000  # marks of one manifest, 330 kB
_RECIPES = ("ppo", "grpo", "rloo")  # kinds of manifests that record a chat template

logger = logging.getLogger(__name__)


def prompt_marks(prompts: Iterable[Any]) -> dict[str, Any]:
    """Return marks of prompts for a manifest, ``{"one_in", "base64"}``.

    Of more than 50,000 different prompts, only about one in `one_in` has a mark, chosen by its hash.
    """
    marks = sorted({_mark(prompt) for prompt in prompts})
    one_in = -(-len(marks) // _MOST) or 1
    sampled = [mark for mark in marks if int.from_bytes(mark, "big") % one_in == 0]
    return {"one_in": one_in, "base64": base64.b64encode(b"".join(sampled)).decode()}


def _mark(prompt: Any) -> bytes:
    """Return a prompt's mark, which ignores spaces and the words of a response that it begins (``--prefix_tokens``)."""
    if isinstance(prompt, str):
        start = response_start(prompt)
        text: Any = " ".join(prompt.removesuffix(start).split() if start else prompt.split())
    else:
        text = [[message["role"], message["content"].strip()] for message in messages_of(prompt)]
    return hashlib.sha256(json.dumps(text).encode()).digest()[:_BYTES]


def manifests_of(adapter: Adapter) -> list[Manifest]:
    """Return the manifests of an adapter and of its ancestors; none if its own is missing or describes other weights."""
    try:
        manifest = manifest_of(pinned(str(adapter.source), adapter.revision))
    except (HubError, LineageError) as error:
        logger.warning("the lineage of %s cannot be read: %s", adapter.source, error)
        return []
    if manifest is None or manifest.get("sha256") not in (None, adapter.sha256):
        return []

    manifests = [manifest, *manifest["history"].values()]
    of_bases = [(one.get("base") or {}).get("lineage") for one in manifests]
    return manifests + [lineage for lineage in of_bases if lineage]


def check_trained(
    manifests: Mapping[str, Sequence[Manifest]], prompts: Sequence[Any], allowed: bool = False
) -> dict[str, int]:
    """Return by adapter how many of some prompts it was trained on, as far as manifests record it.

    Args:
        manifests: Manifests by the adapters' names, as `manifests_of` returns them.
        prompts: Texts or messages.
        allowed: Do not refuse such prompts.

    Raises:
        DatasetError: There are such prompts, and they are not allowed.
    """
    marks = [_mark(prompt) for prompt in prompts]
    seen = {name: set().union(*map(_marks_of, chain)) for name, chain in manifests.items()}
    counts = {name: sum(mark in known for mark in marks) for name, known in seen.items()}
    counts = {name: count for name, count in counts.items() if count}
    if counts and not allowed:
        numbers = ", ".join(f"{name} on {count}" for name, count in counts.items())
        raise DatasetError(
            f"of {len(prompts)} prompts, {numbers} were trained on: rewards there say nothing about other prompts. Take other "
            "prompts, such as the test split of the same dataset, or pass allow_trained_prompts, and the report says so"
        )
    return counts


def _marks_of(manifest: Manifest) -> set[bytes]:
    """Return the marks of a manifest; none if they are malformed, as a manifest may come from anyone."""
    recorded = (manifest.get("data") or {}).get("prompt_marks")
    try:
        marks = base64.b64decode(recorded["base64"] if isinstance(recorded, dict) else "", validate=True)
    except (TypeError, KeyError, ValueError):  # binascii.Error is a ValueError
        return set()
    return {marks[place : place + _BYTES] for place in range(0, len(marks), _BYTES)}


def chat_template_of(manifests: Mapping[str, Sequence[Manifest]]) -> dict[str, Any]:
    """Return the variables of the chat template that adapters were trained with; none if no manifest records any.

    Raises:
        DatasetError: They were trained with different ones.
    """
    variables: dict[str, dict[str, Any]] = {}
    for name, history in manifests.items():
        for number, manifest in enumerate(_runs(history), 1):
            recorded = (manifest.get("config") or {}).get("chat_template_kwargs")
            key = f"{name}, ingredient {number}" if "ingredients" in history[0] else name
            variables[key] = recorded if isinstance(recorded, dict) else {}

    different = {json.dumps(each, sort_keys=True) for each in variables.values()}
    if len(different) > 1:
        raise DatasetError(
            f"the adapters were trained with different chat_template_kwargs, {variables}: pass those to use"
        )
    return dict(next(iter(variables.values()), {}))


def _runs(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Return the manifests of the runs that made an adapter: its own, or those of a soup's ingredients."""
    runs = list(manifests[:1])
    if runs and "ingredients" in runs[0]:
        hashes = {str(parent["sha256"]) for parent in parents_of(runs[0])}
        runs = [one for one in manifests[1:] if str(one.get("sha256")) in hashes]
    return [one for one in runs if one.get("kind") in _RECIPES]
