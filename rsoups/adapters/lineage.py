"""Manifests: what an adapter was made from.

A recipe writes ``lineage.json`` beside its adapter; a soup has ``soup.json``:

    {"kind": "ppo", "sha256": ..., "base": {...}, "parents": [{"name", "source", "revision", "sha256"}, ...],
     "recipe", "command", "config", "seed", "data", "rewards", "versions", "history": {sha256: manifest, ...}}

The parents of a soup are called ingredients, each with its ``lambda``. `history` holds the manifests of all ancestors by the
hash of their weights, each once.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rsoups.adapters.filenames import MANIFEST_FILE, SOUP_FILE, WEIGHTS_FILE
from rsoups.common.errors import HubError, LineageError
from rsoups.common.files import from_hub, sha256_of, write_whole
from rsoups.common.published import command, published, scrubbed
from rsoups.common.schema import validated

_LONGEST = 2**24  # bytes of a manifest; real ones have some thousands
_WHOLE = "full weights"  # the method of `interpolate_checkpoints`
SOUP_METHODS = ("exact", "factors", "svd")  # of a soup of adapters
# Settings that do not change what is trained.
_LEFT_OUT = set(
    "output_dir logging_dir run_name report_to resume resume_from_checkpoint seed config accelerator_config debug "
    "disable_tqdm logging_steps push_to_hub hub_model_id hub_private_repo".split()
)
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Ingredient:
    """Origin of one adapter of a soup.

    Attributes:
        name: Name that the caller gave, or the folder's name.
        source: Hub id or folder; only the last part of an absolute path.
        revision: Hub commit, or None.
        sha256: SHA-256 of the weights file.
    """

    name: str
    source: str
    revision: str | None
    sha256: str


_Number = Annotated[float, Field(gt=-1e6, lt=1e6)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Parent(_Fields):
    name: str
    source: str
    revision: str | None
    sha256: str | dict[str, str]
    weight: _Number = Field(0.0, alias="lambda")


class _Base(_Fields):
    lineage: _Manifest | None = None


class _Manifest(_Fields):
    """Types of the fields of a manifest that rsoups reads: the file may come from anyone."""

    kind: Any = None
    method: Any = None
    base: _Base | None = None
    ingredients: list[_Parent] = []
    parents: list[_Parent] = []
    config: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    rewards: list[dict[str, Any]] | None = None
    results: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    svd_error: _Number | None = None
    factors_distance: _Number | None = None
    history: dict[str, _Manifest] = {}

    @model_validator(mode="after")
    def _one_hash(self) -> _Manifest:
        is_whole = self.method == _WHOLE or self.kind == "conversion"
        for parent in [*self.ingredients, *self.parents]:
            if not is_whole and not isinstance(parent.sha256, str):
                raise ValueError(f"sha256 of {parent.name} is not a text; only whole models have one for each file")
        return self


def manifest_of(source: str | Path) -> Manifest | None:
    """The manifest of an adapter or a soup; None if there is none.

    Args:
        source: Folder or Hub id, as `read_adapter` takes it.

    Raises:
        LineageError: The manifest is invalid.
        HubError: The Hub cannot be reached or refuses.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        fetched = from_hub(str(source), (MANIFEST_FILE, SOUP_FILE))
        if fetched is None:
            return None
        folder = fetched[0]
    for name in (SOUP_FILE, MANIFEST_FILE):
        if (folder / name).is_file():
            return read_manifest(folder / name)

    # A folder of pickled weights has no manifest; their conversion in the cache has one.
    from rsoups.common.pickles import converted

    copy = converted(str(source))
    return read_manifest(copy / MANIFEST_FILE) if copy else None


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        LineageError: It is not JSON, or a field has a wrong type.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise LineageError(f"{path} has {path.stat().st_size} bytes: real manifests have a few thousand")
        data = json.loads(path.read_text(encoding="utf-8"))
    except LineageError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise LineageError(f"{path} is not valid JSON ({error})") from None

    validated(_Manifest, data, str(path), LineageError)
    data.setdefault("history", {})
    return data


def parents_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Ingredients of a soup, or the adapter that training started from."""
    return manifest.get("ingredients", manifest.get("parents")) or []


def soup_ingredients(source: str | Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the ingredients of a soup of adapters, each with its ``lambda``.

    Args:
        source: Name of the soup, for the error.
        manifest: Manifest of the soup.

    Raises:
        LineageError: The manifest is not that of a soup of adapters.
    """
    ingredients = manifest.get("ingredients") or []
    if manifest.get("method") not in SOUP_METHODS or not ingredients or any("lambda" not in i for i in ingredients):
        raise LineageError(
            f"{source}: {SOUP_FILE} is not that of a soup of adapters (method {manifest.get('method')!r}, "
            f"{len(ingredients)} ingredients): make the soup again with rsoups.interpolate"
        )
    return ingredients


def history_of(parents: Iterable[tuple[str, str | None, Any]]) -> dict[str, Manifest]:
    """Manifests of parents and of all their ancestors, by the hash of the weights.

    A manifest that names other weights than the file beside it is left out: someone replaced the file.

    Args:
        parents: Source, revision and SHA-256 of each.
    """
    history: dict[str, Manifest] = {}
    for source, revision, sha256 in parents:
        if revision is None and not Path(source).expanduser().is_dir():
            continue  # a live model, or a folder that is gone
        try:
            manifest = manifest_of(pinned(source, revision))
        except (HubError, LineageError) as error:  # nothing that should keep anyone from saving a soup
            warnings.warn(f"the lineage of {source} is not known: {error}", stacklevel=2)
            continue
        if manifest is not None and manifest.get("sha256") in (None, sha256):
            history |= manifest["history"] | {sha256: {k: v for k, v in manifest.items() if k != "history"}}
    return history


def pinned(source: str, revision: str | None) -> str:
    """A Hub id at a commit, in place of the revision that it names; a folder unchanged."""
    return f"{source.partition('@')[0]}@{revision}" if revision else source


def write_manifest(
    folder: str | Path,
    kind: str,
    *,
    base: Mapping[str, Any],
    recipe: str,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    parent: tuple[str, str | None, Any] | None = None,
    rewards: Iterable[Mapping[str, Any]] = (),
    seed: int | None = None,
    results: Mapping[str, Any] | None = None,
) -> None:
    """Write ``lineage.json`` beside an adapter, atomically.

    Args:
        folder: Folder of the adapter, or of a whole model (then there is a hash for each file of weights).
        kind: ``sft``, ``ppo``, ...
        base: ``{"model", "revision"}``. If the model is a folder with a manifest, the manifest is included.
        recipe: Path of the script.
        config: Settings that differ from their defaults; values that are not JSON become text.
        data: ``{"dataset", "split", "prompts", "sha256", ...}``.
        parent: Source, revision and SHA-256 (one for each file of a whole model) of the adapter that training started from, or
            of the converted files.
        rewards: Cards of the rewards.
        seed: Seed of the run.
        results: ``{"prompts": n, "before": {figure: value}, "after": {...}}`` on held-out prompts.

    Raises:
        OutputError: The file cannot be written.
    """
    folder = Path(folder)
    weights = {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))}
    parents = []
    if parent is not None:
        source, revision, sha256 = parent
        name = "original" if kind == "conversion" else "start"
        parents = [{"name": name, "source": published(source), "revision": revision, "sha256": sha256}]
    place = str(base.get("model") or "")
    below = manifest_of(place) if Path(place).expanduser().is_dir() else None
    manifest = {
        "kind": kind,
        "sha256": weights.get(WEIGHTS_FILE, weights),
        "base": {**base, "model": published(place)} | ({"lineage": below} if below else {}),
        "parents": parents,
        "recipe": recipe,
        "command": command(),
        "config": dict(config),
        "seed": seed,
        "data": dict(data) | ({"dataset": published(str(data["dataset"]))} if data.get("dataset") else {}),
        "rewards": [dict(reward) for reward in rewards],
        "results": dict(results or {}),
        "versions": {name: version(name) for name in ("rsoups", "peft", "torch", "transformers", "trl")},
        "history": history_of([parent] if parent is not None else []),
    }
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n")


def settings_of(*arguments: Any) -> dict[str, Any]:
    """Values of flags that differ from their defaults, without tokens and absolute paths.

    Args:
        arguments: Dataclasses of flags.
    """
    changed = {}
    for flags in arguments:
        for flag in fields(flags):
            if not flag.init or flag.name in _LEFT_OUT or "token" in flag.name.split("_"):
                continue
            default = flag.default_factory() if flag.default_factory is not MISSING else flag.default
            value = getattr(flags, flag.name)
            if value != default:
                changed[flag.name] = scrubbed(value)
    return changed


def fingerprint(texts: Iterable[Any]) -> dict[str, Any]:
    """Number and SHA-256 of examples, in their order: equal fingerprints mean equal data."""
    total, count = hashlib.sha256(), 0
    for count, text in enumerate(texts, 1):  # noqa: B007
        total.update(json.dumps(text, ensure_ascii=False).encode() + b"\n")
    return {"rows": count, "sha256": total.hexdigest()}


def renamed_base(manifest: Manifest, names: Collection[str | None], name: str | None) -> Manifest:
    """Rename the base of a manifest, and of the manifests in its history that have the same base.

    Args:
        manifest: Manifest to change.
        names: Present names of the base.
        name: New name.
    """
    manifests = [manifest, *manifest.get("history", {}).values()]
    for each in manifests:
        if (each.get("base") or {}).get("model") in names:
            each["base"]["model"] = name
    return manifest
