"""Check that adapters are of one base, and that PEFT can hold their soup in one adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

from rsoups.adapters.adapter import TOKENS, Adapter, holds_tokens, named_as, reading, trained_tokens
from rsoups.adapters.layer_names import EXPERT, PREFIX, as_loaded, path_of, recorded_base, tells_class, written_name
from rsoups.adapters.lineage import pinned
from rsoups.adapters.lora_modules import LoraModule, holder_of
from rsoups.bases.files import check_vocabularies
from rsoups.bases.names import OVERRIDE, same_base
from rsoups.common.errors import AdapterError


def in_one_naming(adapters: Mapping[str, Adapter], base: Any = None) -> dict[str, Adapter]:
    """Rename the layers of adapters of one base as the base names them.

    Args:
        adapters: Adapters by name.
        base: The loaded base or a skeleton of it; by default a skeleton of the base that an adapter names.
    """
    if base is None:
        skeletons = (recorded_base(adapter.config) for adapter in adapters.values())
        base = next((skeleton for skeleton in skeletons if skeleton is not None), None)
    if base is None:
        return dict(adapters)
    named = {name: named_as(adapter, base) for name, adapter in adapters.items()}
    return {name: fused(adapter, base) for name, adapter in named.items()} if _need_fusing(named.values()) else named


def fused(adapter: Adapter, base: Any) -> Adapter:
    """Fuse the factors of single experts, as PEFT does when it loads an adapter.

    Raises:
        AdapterError: PEFT cannot fuse them.
    """
    if not any(EXPERT.search(path) for path in adapter.modules):
        return adapter
    try:
        config, tensors = as_loaded(base, adapter.config, {name: adapter.tensor(name) for name in adapter.layout})
    except AdapterError as error:
        raise AdapterError(f"{adapter.source}: {error}") from None
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return replace(adapter, config=config, layout=layout, _read=reading(tensors), _names={})


def _need_fusing(adapters: Iterable[Adapter]) -> bool:
    """Whether some adapters have factors of single experts, and others have fused factors or other experts."""
    adapters = list(adapters)
    targets = {frozenset(filter(EXPERT.search, adapter.modules)) for adapter in adapters} - {frozenset()}
    return len(targets) > 1 or (bool(targets) and any(map(_parameters_of, adapters)))


def check_compatible(adapters: Iterable[Adapter], allow_base_mismatch: bool = False, with_base: bool = False) -> None:
    """Refuse adapters that are not of one base.

    Args:
        adapters: Adapters as `in_one_naming` returns them.
        allow_base_mismatch: Accept bases of different names.
        with_base: Whether the base is available, for whole parameters that only some of the adapters have.

    Raises:
        AdapterError: The bases differ in name, revision or shape, only some adapters have a whole parameter, or PEFT cannot
            hold the soup in one adapter.
    """
    adapters = list(adapters)
    if not allow_base_mismatch:
        check_one_base(adapters)
    for one, other in combinations(adapters, 2):
        _check_modules(one, other)
        _check_whole(one, other, with_base)
        if not with_base and not any(tells_class(adapter.config) for adapter in (one, other)):
            _check_one_naming(one, other)
    with_tokens = [
        adapter for adapter in adapters if holds_tokens(written_name(n, adapter.modules) for n in adapter.full)
    ]
    if len(with_tokens) > 1:
        check_vocabularies(pinned(adapter.source, adapter.revision) for adapter in with_tokens)


def check_one_base(adapters: Iterable[Adapter]) -> None:
    """Refuse adapters that name different bases or revisions.

    Raises:
        AdapterError: The names or the revisions differ.
    """
    first, *others = adapters
    same = {"base_model_name_or_path": same_base, "revision": lambda one, two: not one or not two or one == two}
    for other in others:
        for name, are_same in same.items():
            ours, theirs = getattr(first.config, name), getattr(other.config, name)
            if not are_same(ours, theirs):
                raise AdapterError(
                    f"{name} differs: {ours!r} ({first.source}) and {theirs!r} ({other.source}); adapters of different bases "
                    f"do not add up. {OVERRIDE}"
                )


def _check_modules(one: Adapter, other: Adapter) -> None:
    for a, b in ((one, other), (other, one)):
        if _parameters_of(b) and (single := next(filter(EXPERT.search, a.modules), None)):
            raise AdapterError(
                f"{a.source} has factors of single experts ({single}), those of {b.source} are fused: pass base= (--base), so "
                "that they are fused as PEFT does"
            )
    names, others = _parameters_of(one), _parameters_of(other)
    for path in names.keys() & others.keys():
        unknown = "" in names[path] | others[path]
        if unknown and (names[path] != others[path] or _targets(one) != _targets(other)):
            raise AdapterError(
                f"target_parameters differ: {_targets(one)} ({one.source}) and {_targets(other)} ({other.source}), and the "
                f"files do not tell which parameter of {path} each of their tensors changes: write the full path of each "
                f"parameter into target_parameters, for example {path}.down_proj"
            )
    for a, b in ((one, other), (other, one)):
        if whole := sorted(p for p in _parameters_of(a) if p in b.modules and b.modules[p].parameter is None):
            raise AdapterError(
                f"{whole[0]} is among the target_modules of {b.source}, and {a.source} has its parameters among its "
                "target_parameters: PEFT cannot hold both in one adapter; train both with one of them"
            )
    for path in one.modules.keys() & other.modules.keys():
        ours, theirs = one.modules[path], other.modules[path]
        if (ours.shape, ours.embedding, ours.experts) != (theirs.shape, theirs.embedding, theirs.experts):
            raise AdapterError(
                f"module {path} has shape {_size(ours)} in the base of {one.source} and {_size(theirs)} in the base of "
                f"{other.source}"
            )


def _size(module: LoraModule) -> tuple[int, ...]:
    return module.shape if module.experts == 1 else (module.experts, *module.shape)


def _parameters_of(adapter: Adapter) -> dict[str, set[str]]:
    """Names of the adapted parameters by module, for modules that are not targeted as a whole; "" if the name is not known."""
    parameters: dict[str, set[str]] = {}
    for path, module in adapter.modules.items():
        if module.parameter is not None:
            parameters.setdefault(holder_of(path, module), set()).add(module.parameter)
    return parameters


def _targets(adapter: Adapter) -> list[str]:
    return sorted(adapter.config.target_parameters or ())


def _check_one_naming(one: Adapter, other: Adapter) -> None:
    """Refuse names that may be old and new names of the same layers, if the base is unknown."""
    if one.modules.keys() == other.modules.keys():
        return
    ours, theirs = _by_place(one), _by_place(other)
    for here in ours.keys() - theirs.keys():
        for there in theirs.keys() - ours.keys():
            both = ours[here].keys() & theirs[there].keys()
            halves = here.replace("encoder", "decoder") == there.replace(
                "encoder", "decoder"
            )  # of one base, not names of one
            if both and not halves and all(ours[here][inside] == theirs[there][inside] for inside in both):
                raise AdapterError(
                    f"{one.source} has layers in {here}, {other.source} has such layers in {there}: they may be the same "
                    "layers of a base whose layers were renamed, and neither tells its base's class: pass base= (--base)"
                )


def _by_place(adapter: Adapter) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of modules in layers, by the path above the layers, then by the rest of the path."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, module in adapter.modules.items():
        if match := re.fullmatch(r"(.*?)(\.\d+\..*)", path):
            shapes.setdefault(match[1], {})[match[2]] = module.shape
    return shapes


def _check_whole(one: Adapter, other: Adapter, with_base: bool) -> None:
    for key in one.full:
        if key in other.layout and (ours := tuple(one.layout[key].shape)) != (theirs := tuple(other.layout[key].shape)):
            raise AdapterError(
                f"{key} has shapes {ours} in {one.source} and {theirs} in {other.source}: "
                "of bases (or vocabularies) of different sizes"
            )
        if key.endswith(TOKENS) and key in other.layout:
            path = path_of(key)
            if trained_tokens(one.config, path) != trained_tokens(other.config, path):
                raise AdapterError(
                    f"trainable_token_indices differ between {one.source} and {other.source}: one adapter has one row for each "
                    "token, so only the same tokens in the same order can be interpolated"
                )
    for a, b in ((one, other), (other, one)):
        for key in set(a.full) - set(a.copies):
            path, tokens = path_of(key), key.endswith(TOKENS)
            other_kind = "has factors" if path in b.modules else "has single trained tokens"
            beside = path in b.modules or f"{PREFIX}{path}{TOKENS}" in b.layout and not tokens
            if beside and (tokens or key.endswith(".weight")):  # biases stay beside factors
                raise AdapterError(
                    f"{path} was trained {'at single tokens' if tokens else 'as a whole'} in {a.source} and {other_kind} in "
                    f"{b.source}: PEFT cannot hold both in one adapter"
                )
    own = {key for adapter in (one, other) for key in adapter.copies if path_of(key) in adapter.modules}
    if not with_base and (difference := (set(one.full) ^ set(other.full)) - own):
        raise AdapterError(
            f"{sorted(difference)[0]} was trained as a whole in only one of {one.source} and {other.source}: whole parameters "
            "are interpolated where every ingredient has them, or with the base's own: pass base= (--base)"
        )
