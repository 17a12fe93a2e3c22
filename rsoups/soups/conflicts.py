"""Merge conflicts: adapters that no soup is well made of, and what can be done."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from rsoups.adapters.adapter import Adapter
from rsoups.bases.weights import of_one_base
from rsoups.fronts.barriers import barriers
from rsoups.fronts.front import Front
from rsoups.soups.methods import cosines_of_starts

_ONE_START = 0.5  # cosine of A
_START = (
    "{a} and {b} start from different initializations (cosine of A {cosine:+.2f}). Method factors mixes directions that do not "
    "belong together: use exact or svd; or train both from one adapter (--adapter_name_or_path, or one adapter_init_seed). "
    "Permutation alignment does not help a LoRA: the order of its rank's directions does not change B·A, and the base, "
    "whose neurons it would permute, is the same for all."
)


def merge_conflicts(adapters: Mapping[str, Adapter], front: Front | None = None) -> list[str]:
    """What speaks against a soup of these adapters, each with its remedy; an empty list where nothing does.

    Args:
        adapters: By name.
        front: Of soups of them, if they were evaluated: barriers show in rewards alone.
    """
    adapters = of_one_base(adapters)
    names, found = list(adapters), []
    starts = cosines_of_starts(list(adapters.values()))
    for i, j in combinations(range(len(names)), 2):
        if starts[i][j] < _ONE_START:
            found.append(_START.format(a=names[i], b=names[j], cosine=starts[i][j]))
    return found + (barriers(front) if front is not None else [])
