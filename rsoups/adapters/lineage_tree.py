"""Draw the tree of a manifest: what a model was made from."""

from __future__ import annotations

import io
from typing import Any

from rsoups.adapters.lineage import Manifest, parents_of

_DEEPEST = 200  # generations
_WIDTH = 2**14  # columns: lines are not wrapped


def log(manifest: Manifest, name: str) -> str:
    """Each model on a line, its parents below it, the base at the ends.

    Args:
        manifest: Manifest of the model, with its history.
        name: Name of the model.
    """
    from rich.console import Console
    from rich.tree import Tree

    trunk = Tree("", hide_root=True)
    _add(trunk, name, manifest.get("sha256"), manifest, manifest.get("history", {}), set())

    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(trunk)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _add(
    above: Any,
    label: str,
    sha256: Any,
    manifest: Manifest | None,
    history: dict[str, Manifest],
    seen: set[str],
    base: str = "",
    depth: int = 0,
) -> None:
    """Add a model and its ancestors to a branch of the tree.

    Args:
        above: Branch of rich's tree.
        label: Name of the model.
        sha256: Hash of its weights; several for a whole model.
        manifest: Its manifest, if known.
        history: Manifests by hash.
        seen: Hashes of the models that are drawn already; their ancestors are not drawn again.
        base: Name of the base, for a model without a manifest.
        depth: Number of generations above.
    """
    parents = parents_of(manifest or {})
    short = sha256[:12] if isinstance(sha256, str) else ""
    again = bool(short) and sha256 in seen and bool(parents)
    branch = above.add(_line(f"{label}  {_summary(manifest)}{'  (above)' if again else ''}  {short}"))
    if manifest is None and base:
        branch.add(_line(f"base {base}"))
    if manifest is None or again or depth > _DEEPEST:
        return

    seen.add(str(sha256))
    base = _base(manifest) if (manifest.get("base") or {}).get("model") else ""
    for parent in parents:
        hashed = parent["sha256"]
        ancestor = history.get(hashed) if isinstance(hashed, str) else None
        _add(branch, _parent(parent), hashed, ancestor, history, seen, base, depth + 1)
    if parents:
        return

    trained = (manifest.get("base") or {}).get("lineage")
    if trained:
        _add(branch, f"base {_base(manifest)}", None, trained, history, seen, "", depth + 1)
    else:
        branch.add(_line(f"base {_base(manifest)}"))


def _line(text: str) -> Any:
    from rich.text import Text

    # Names may come from anyone, and a terminal obeys some characters.
    return Text("".join(c if c.isprintable() else "?" for c in text.rstrip()))


def _parent(parent: dict[str, Any]) -> str:
    """Name of a parent, with its λ and its source."""
    revision = f"@{parent['revision'][:12]}" if parent.get("revision") else ""
    source, name = parent["source"] + revision, parent["name"]
    weight = f"{parent['lambda']:.4g} × " if "lambda" in parent else ""
    return weight + (name if source.rsplit("/", 1)[-1] == name else f"{name} ({source})")


def _base(manifest: Manifest) -> str:
    base = manifest.get("base") or {}
    return f"{base.get('model') or 'not recorded'}" + (f"@{base['revision']}" if base.get("revision") else "")


def _summary(manifest: Manifest | None) -> str:
    """A manifest in a few words."""
    if manifest is None:
        return "no manifest"
    if "ingredients" in manifest:
        rank = f", rank {manifest['rank']}" if manifest.get("rank") else ""
        return f"soup, {manifest.get('method')}{rank}"

    config = manifest.get("config") or {}
    rewards = " + ".join(str(reward.get("name")) for reward in manifest.get("rewards") or ())
    kind = str(manifest.get("kind", "adapter"))
    words = [(kind.upper() if kind.isalpha() else kind) + (f" on {rewards}" if rewards else "")]
    if "steps" in config:
        words.append(f"{config['steps']} steps")
    if isinstance(config.get("kl_coef"), (int, float)):
        words.append(f"KL {config['kl_coef']:g}")
    dataset = (manifest.get("data") or {}).get("dataset")
    if dataset:
        words.append(str(dataset))
    if manifest.get("seed") is not None:
        words.append(f"seed {manifest['seed']}")
    return ", ".join(words)
