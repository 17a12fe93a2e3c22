"""Manifests: what made an adapter. Beside each is ``lineage.json``, written by its recipe, or ``soup.json`` of a soup.

    {"kind": "ppo", "sha256": ..., "base": {...}, "parents": [{"name", "source", "revision", "sha256"}, ...],
     "recipe", "command", "config", "seed", "data", "rewards", "versions", "history": {sha256: manifest, ...}}

A soup's parents are called ingredients, each with its ``lambda``. `history` holds the manifests of all ancestors by the hash of
their weights, each once however often it is one, so that a soup of soups of soups still tells where it came from.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

from rsoups.adapters.filenames import MANIFEST_FILE, SOUP_FILE, WEIGHTS_FILE
from rsoups.common.errors import HubError, LineageError
from rsoups.common.files import from_hub, sha256_of, write_whole

_LONGEST = 2**24  # bytes of a manifest; real ones have some thousands
_DEEPEST = 1000  # generations that a tree is followed through
_WHOLE = "full weights"  # the method of `interpolate_checkpoints`
SOUP_METHODS = ("exact", "factors", "svd")  # of a soup of adapters
# Settings that change nothing about what is trained.
_UNTOLD = {"output_dir", "logging_dir", "run_name", "report_to", "resume", "resume_from_checkpoint", "seed", "config"}
_UNTOLD |= {
    "accelerator_config",
    "debug",
    "disable_tqdm",
    "logging_steps",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
}
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Ingredient:
    """Where one adapter of a soup came from.

    Attributes:
        name: The key or the folder's name it was given under.
        source: Hub id or folder; of an absolute path only the last part, so that publishing tells no one's disk.
        revision: Hub commit, or None.
        sha256: Of its weights.
    """

    name: str
    source: str
    revision: str | None
    sha256: str


def manifest_of(source: str | Path) -> Manifest | None:
    """The manifest of an adapter or a soup; None where it has none, or no folder (a live model).

    Args:
        source: A folder or a Hub id, as `read_adapter` takes it.

    Raises:
        LineageError: A manifest that is none.
        HubError: The Hub cannot be reached or refuses.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if (found := from_hub(str(source), (MANIFEST_FILE, SOUP_FILE))) is None:
            return None
        folder = found[0]
    for name in (SOUP_FILE, MANIFEST_FILE):
        if (folder / name).is_file():
            return read_manifest(folder / name)
    from rsoups.common.pickles import converted

    copy = converted(str(source))  # of pickled weights, whose own folder tells nothing
    return read_manifest(copy / MANIFEST_FILE) if copy else None


def read_manifest(path: Path) -> Manifest:
    """A manifest, checked as far as this module and its callers rely on it: it may come from anyone.

    Raises:
        LineageError: Not JSON, or a field of another type; file and field are named.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise LineageError(f"{path} has {path.stat().st_size} bytes: that is no manifest")
        data = json.loads(path.read_text(encoding="utf-8"))
        _check(str(path), data)
    except LineageError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise LineageError(f"{path} is not valid JSON ({error})") from None
    history = data.setdefault("history", {})
    if not isinstance(history, dict):
        raise LineageError(
            f"{path}: history is {type(history).__name__}, must be an object of manifests by their hashes"
        )
    for key, manifest in history.items():
        _check(f"{path}, history of {key[:12]}", manifest)
    return data


def _check(where: str, data: Any) -> None:
    if not isinstance(data, dict):
        raise LineageError(f"{where} holds {type(data).__name__}, not an object of fields")
    for field in ("base", "config", "versions", "data", "results"):
        if data.get(field) is not None and not isinstance(data[field], dict):
            raise LineageError(f"{where}: {field} is {data[field]!r}, must be an object")
    rewards = data.get("rewards") or []
    if not isinstance(rewards, list) or not all(isinstance(reward, dict) for reward in rewards):
        raise LineageError(f"{where}: rewards are {rewards!r}, must be a list of objects")
    if "lineage" in (data.get("base") or {}):
        _check(f"{where}, base", data["base"]["lineage"])
    for field in ("svd_error", "factors_distance"):
        if data.get(field) is not None and not _is_number(data[field]):
            raise LineageError(f"{where}: {field} is {data[field]!r}, must be a number")
    for parent in _listed(where, data):
        texts = [parent.get(field) for field in ("name", "source")]
        hashes = parent.get("sha256")  # of a whole model one for each file
        several = data.get("method") == _WHOLE or data.get("kind") == "conversion"
        texts += list(hashes.values()) if isinstance(hashes, dict) and several else [hashes]
        if not all(isinstance(text, str) for text in texts) or not isinstance(
            parent.get("revision"), (str, type(None))
        ):
            raise LineageError(
                f"{where}: an ingredient or parent has name, source, sha256 and revision; got {parent!r}"
            )
        if not _is_number(parent.get("lambda", 0.0)):
            raise LineageError(f"{where}: λ of {parent['name']} is {parent['lambda']!r}, must be a finite number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e6


def _listed(where: str, data: Manifest) -> list[dict[str, Any]]:
    parents = data.get("ingredients", data.get("parents", []))
    if not isinstance(parents, list) or not all(isinstance(parent, dict) for parent in parents):
        raise LineageError(f"{where}: ingredients (or parents) are {parents!r}, must be a list of objects")
    return parents


def parents_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Ingredients of a soup, or what a run was trained on from."""
    return _listed("a manifest", manifest)


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
    """Manifests by the hash of the weights: of the parents, each (source, revision, sha256), and of theirs.

    A manifest that tells of other weights than those beside it is left out: someone exchanged them.
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
    """A Hub id with its commit; a folder as it is."""
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
    """Write ``lineage.json`` beside a run's adapter, all or nothing.

    Args:
        folder: Of the adapter. A whole model's has a hash for each file of its weights.
        kind: ``sft``, ``ppo``, ...
        base: ``{"model", "revision"}``. A folder with a manifest, of a supervised fine-tuning say, brings it along.
        recipe: The script.
        config: Settings that differ from their defaults, say; what is no JSON is told by its text.
        data: ``{"dataset", "split", "prompts", "sha256", ...}``.
        parent: (source, revision, sha256) of the adapter that was trained on, or of what was converted (a hash for each file).
        rewards: Their cards.
        seed: Of the run.
        results: ``{"prompts": n, "before": {figure: value}, "after": {...}}`` on held-out prompts, if there were any.

    Raises:
        OutputError: It cannot be written.
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
    """What was set otherwise than by default in some dataclasses of flags; no tokens, no absolute paths."""
    found = {}
    for given in arguments:
        for each in (one for one in fields(given) if one.init):
            default = each.default_factory() if each.default_factory is not MISSING else each.default
            value = getattr(given, each.name)
            if value != default and each.name not in _UNTOLD and "token" not in each.name.split("_"):
                found[each.name] = scrubbed(value)
    return found


def fingerprint(texts: Iterable[Any]) -> dict[str, Any]:
    """How many examples, and the SHA-256 of them in their order: two runs with the same one saw the same data."""
    total, count = hashlib.sha256(), 0
    for count, text in enumerate(texts, 1):  # noqa: B007
        total.update(json.dumps(text, ensure_ascii=False).encode() + b"\n")
    return {"rows": count, "sha256": total.hexdigest()}


def published(source: str) -> str:
    """A source as it is told to others, so that no one learns of anyone's disk.

    Of a path that is absolute or leads upwards, the last part, or all from `recipes` on. A Hub id, or a path below the current
    folder, stays as it is.
    """
    if not is_disk_path(source):
        return source
    parts = PureWindowsPath(source.removeprefix("file://")).parts  # which takes slashes of both kinds
    return "/".join(parts[parts.index("recipes") :]) if "recipes" in parts else parts[-1].strip("\\/")


def is_disk_path(text: str) -> bool:
    """Whether a text is a path that tells of a disk: from its root, a home folder, a drive, or upwards from here."""
    path = text.removeprefix("file://")
    return bool(_ROOT.match(path)) or ".." in PureWindowsPath(path).parts


_ROOT = re.compile(r"/|~[\w.-]*(/|$)|\\\\|[A-Za-z]:[\\/]")
# A path inside a longer text: after a sign that separates, as in --out=/home/me/x or a=/x,b=../y.
_PATH_INSIDE = re.compile(
    r"""(?<![^\s=,;:"'\[({<|])(?:file://)?(?:~[\w.-]*/|/(?!/)|[A-Za-z]:[\\/](?!/)|(?:\./)*\.\./)[^\s=,;:"'\])}>|]+"""
)
_TOKEN = re.compile(r"\bhf_\w+|(?<=token=).+")


def without_paths(text: str) -> str:
    """A text, a word of a command say, with `published` for each path in it."""
    flag, separator, value = text.partition("=")
    if " " in value and is_disk_path(value):  # where a path with spaces ends is known only of a whole value
        return f"{flag}{separator}{published(value)}"
    if " " in text and _ROOT.match(text):
        return published(text)
    return _PATH_INSIDE.sub(lambda found: published(found[0]), text)


def command() -> str:
    """The command that is running, without absolute paths and tokens."""
    program, *words = sys.argv or [""]
    path = Path(program)
    head = "rsoups" if path.parts[-2:] == ("rsoups", "cli.py") else published(program)
    if path.suffix == ".py" and head != "rsoups":
        head = f"python {head}"
    told = [_TOKEN.sub("...", without_paths(word)) for word in words]
    for at, before in enumerate(words[:-1], 1):
        if before.endswith("token"):
            told[at] = "..."
    return f"{head} {shlex.join(told)}".strip()


# Texts that a model reads: a slash in them is no path.
_TEXTS = {"template", "input", "question", "system", "rubric", "prompt", "command"}


def scrubbed(value: Any) -> Any:
    """A manifest, or a part of one, without paths of a disk."""
    if isinstance(value, dict):
        return {
            key: (without_paths(str(each)) if key == "command" else each) if key in _TEXTS else scrubbed(each)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrubbed(each) for each in value]
    return published(value) if isinstance(value, str) else value


def renamed_base(manifest: Manifest, names: Collection[str | None], told: str | None) -> Manifest:
    """A manifest that tells another name of its base, and so do those in its history of the same base."""
    manifests = [manifest, *manifest.get("history", {}).values()]
    for each in manifests:
        if (each.get("base") or {}).get("model") in names:
            each["base"]["model"] = told
    return manifest


def log(manifest: Manifest, name: str) -> str:
    """The tree of a manifest, for people: each model on a line, what it was made from below it, the base at the ends."""
    lines: list[str] = []
    seen: set[str] = set()
    history = manifest.get("history", {})

    def visit(
        label: str, sha256: Any, data: Manifest | None, lead: str, joint: str, depth: int, base: str = ""
    ) -> None:
        short = sha256[:12] if isinstance(sha256, str) else ""
        again = bool(short) and sha256 in seen and bool(parents_of(data or {}))
        lines.append(f"{lead}{joint}{label}  {_summary(data)}{'  (above)' if again else ''}  {short}".rstrip())
        lead += {"": "", "├─ ": "│  ", "└─ ": "   "}[joint]
        if data is None and base:  # what is made of it says what it is for
            lines.append(f"{lead}└─ base {base}")
        if data is None or again or depth > _DEEPEST:
            return
        seen.add(str(sha256))
        parents = parents_of(data)
        if not parents and (below := (data.get("base") or {}).get("lineage")):
            visit(f"base {_base(data)}", None, below, lead, "└─ ", depth + 1)
        elif not parents:
            lines.append(f"{lead}└─ base {_base(data)}")
        base_of = _base(data) if (data.get("base") or {}).get("model") else ""
        for at, parent in enumerate(parents, 1):
            weight = f"{parent['lambda']:.4g} × " if "lambda" in parent else ""
            place = parent["source"] + (f"@{parent['revision'][:12]}" if parent["revision"] else "")
            told = parent["name"] if place.rsplit("/", 1)[-1] == parent["name"] else f"{parent['name']} ({place})"
            child = history.get(parent["sha256"]) if isinstance(parent["sha256"], str) else None
            last = at == len(parents)
            visit(f"{weight}{told}", parent["sha256"], child, lead, "└─ " if last else "├─ ", depth + 1, base_of)

    visit(name, manifest.get("sha256"), manifest, "", "", 0)
    # Names may come from anyone, and a terminal obeys some characters.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _base(data: Manifest) -> str:
    base = data.get("base") or {}
    return f"{base.get('model') or 'not recorded'}" + (f"@{base['revision']}" if base.get("revision") else "")


def _summary(data: Manifest | None) -> str:
    """A manifest in a few words."""
    if data is None:
        return "no manifest"
    if "ingredients" in data:
        return f"soup, {data.get('method')}" + (f", rank {data['rank']}" if data.get("rank") else "")
    config, rewards = data.get("config") or {}, [str(r.get("name")) for r in data.get("rewards") or ()]
    kind = str(data.get("kind", "adapter"))
    words = [(kind.upper() if kind.isalpha() else kind) + (f" on {' + '.join(rewards)}" if rewards else "")]
    words += [f"{config['steps']} steps"] if "steps" in config else []
    words += [f"KL {config['kl_coef']:g}"] if isinstance(config.get("kl_coef"), (int, float)) else []
    words += [f"{data['data']['dataset']}"] if (data.get("data") or {}).get("dataset") else []
    words += [f"seed {data['seed']}"] if data.get("seed") is not None else []
    return ", ".join(words)
