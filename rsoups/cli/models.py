"""Commands that treat models as software: push, pull, log, diff, verify, patch, revert, test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter


def push(
    folder: str,
    repo_id: str,
    *,
    front: Path | None = None,
    require: Path | None = None,
    license: str | None = None,
    base: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    out: Path | None = None,
) -> None:
    """Publish a soup, or a trained adapter, on the Hub in one commit.

    Example: `rsoups push soup user/soup --front runs/sweep/records.jsonl --dry-run`

    Args:
        folder: Folder of the soup, or of a run of `rsoups train` or `rsoups sft`.
        repo_id: Repository, user/name.
        front: File records.jsonl of the sweep that the soup was chosen from.
        require: Test suite (YAML) that the soup must pass first.
        license: License by the Hub's name; the strictest of base and ingredients if left out.
        base: Name of the base on the Hub, where the soup names a folder on this disk.
        private: Make a new repository private.
        commit_message: Message of the commit; λ if left out.
        create_pr: Open a pull request instead of committing.
        dry_run: Only write the folder that would be pushed, and list it.
        out: Folder of a dry run; NAME-dry-run if left out.
    """
    from rsoups.hub.push import push as push_folder

    options: dict[str, Any] = {
        "license": license,
        "base": base,
        "private": private,
        "commit_message": commit_message,
        "create_pr": create_pr,
        "dry_run": (out or True) if dry_run else False,
    }
    if require:
        _run_suite(require, folder, None, {})
    pushed = push_folder(folder, repo_id, front=front, **options)
    if dry_run:
        for path in sorted(path for path in Path(pushed).rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>12,}  {path.relative_to(pushed)}")
    print(pushed)


def pull(source: str, *, out: Path | None = None) -> None:
    """Copy a soup or an adapter from the Hub.

    Example: `rsoups pull user/soup@main --out soup`

    Args:
        source: Hub id: user/name, user/name@revision, user/name/subfolder.
        out: New folder; the repository's name if left out.
    """
    from rsoups.hub.push import pull as pulled

    print(pulled(source, out or Path(source.partition("@")[0]).name))


def log(source: str) -> None:
    """Show how a soup or an adapter was made: the tree of its ancestors down to the base.

    Example: `rsoups log soup`

    Args:
        source: Folder or Hub id.
    """
    from rsoups.adapters.lineage import manifest_of
    from rsoups.adapters.lineage_tree import log as tree_of
    from rsoups.common.errors import LineageError

    manifest = manifest_of(source)
    if manifest is None:
        raise LineageError(f"{source} has neither soup.json nor lineage.json: where it comes from is not known")
    print(tree_of(manifest, source))


def diff(one: str, other: str) -> None:
    """Compare two soups or adapters, layer by layer and in their ingredients.

    Example: `rsoups diff soup user/soup@main`

    Args:
        one: Folder or Hub id.
        other: Folder or Hub id.
    """
    from rsoups.versions.compare import diff as difference

    print(difference(one, other).to_text())


def verify(soup: str, *, ingredient: list[str] | None = None, base: str | None = None) -> None:
    """Make a soup again from its ingredients, and compare the two bit by bit.

    Example: `rsoups verify soup --ingredient helpful=runs/helpful`

    Args:
        soup: Folder or Hub id.
        ingredient: Ingredients that have moved, NAME=FOLDER for each.
        base: Folder or Hub id of the base, for a soup that was made with it.
    """
    from rsoups.versions.rebuild import verify as verification

    print(verification(soup, _named(ingredient), base))


def patch(
    soup: str,
    adapter: str,
    *,
    out: Path,
    weight: Annotated[float, Parameter(name="--lambda")],
    name: str | None = None,
    base: str | None = None,
    allow_base_mismatch: bool = False,
) -> None:
    """Add an ingredient to a soup; the others keep their ratio.

    Example: `rsoups patch soup runs/concise --lambda 0.2 --out patched`

    Args:
        soup: Folder or Hub id.
        adapter: The new ingredient, a folder or a Hub id.
        out: Folder of the new soup.
        weight: λ of the new ingredient.
        name: Name of the new ingredient; its folder's if left out.
        base: Folder or Hub id of the base, for a soup that was made with it.
        allow_base_mismatch: Accept a base of another name than the adapters'; recorded in soup.json.
    """
    from rsoups.soups.soup import Soup
    from rsoups.versions.rebuild import patch as patched

    options: dict[str, Any] = {"allow_base_mismatch": allow_base_mismatch, "base": base}
    new = patched(Soup.from_pretrained(soup), adapter, weight, name, **options)
    new.save_pretrained(out)
    print(f"{new.mix}\n{out}")


def revert(soup: str, name: str, *, out: Path, ingredient: list[str] | None = None, base: str | None = None) -> None:
    """Set an ingredient's λ to 0; the others keep their ratio.

    Example: `rsoups revert soup concise --out reverted`

    Args:
        soup: Folder or Hub id.
        name: Name of the ingredient.
        out: Folder of the new soup.
        ingredient: Ingredients that have moved, NAME=FOLDER for each.
        base: Folder or Hub id of the base, for a soup that was made with it.
    """
    from rsoups.soups.soup import Soup
    from rsoups.versions.rebuild import revert as reverted

    new = reverted(Soup.from_pretrained(soup), name, _named(ingredient), base)
    new.save_pretrained(out)
    print(f"{new.mix}\n{out}")


def test(
    soup: str,
    *,
    suite: Path,
    against: str | None = None,
    allow_base_mismatch: bool = False,
    allow_trained_prompts: bool = False,
) -> None:
    """Run a test suite: a soup's rewards against limits and a parent. The exit code is 2 if a check fails.

    Example: `rsoups test soup --suite suite.yaml --against user/soup@v1`

    Args:
        soup: Folder or Hub id.
        suite: Test suite (YAML): see docs/HUB.md.
        against: Folder or Hub id of a parent, instead of the suite's.
        allow_base_mismatch: Accept a base of another name than the adapters'.
        allow_trained_prompts: Accept prompts that an ingredient was trained on.
    """
    flags = {"allow_base_mismatch": allow_base_mismatch, "allow_trained_prompts": allow_trained_prompts}
    _run_suite(suite, soup, against, {name: True for name, given in flags.items() if given})


def _run_suite(path: Path, source: str, against: str | None, allowed: dict[str, Any]) -> None:
    from rsoups.sweeps.suites import Suite, gate, run_suite

    suite = replace(Suite.read(path), **allowed)  # what the suite itself allows stays allowed
    checks = run_suite(suite, source, against)
    print("\n".join(map(str, checks)))
    gate(checks)


def _named(pairs: list[str] | None) -> dict[str, str]:
    from rsoups.common.assets import named_sources
    from rsoups.common.errors import LineageError

    if unnamed := [pair for pair in pairs or [] if "=" not in pair]:
        raise LineageError(f"--ingredient takes NAME=FOLDER, got {unnamed[0]!r}")
    return named_sources(pairs or [], "ingredients", LineageError)
