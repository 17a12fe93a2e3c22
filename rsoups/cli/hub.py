"""The commands that treat models as software: push, pull, log, diff, verify, patch, revert, test."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any


def add_override(command: argparse.ArgumentParser) -> None:
    """The flag that accepts a base of another name than the adapters'."""
    command.add_argument(
        "--allow_base_mismatch",
        "--allow-base-mismatch",
        action="store_true",
        help="accept a base of another name than the adapters'; recorded",
    )


def add_commands(commands: Any) -> None:
    """Add them to the parser of `rsoups`."""
    push = commands.add_parser("push", help="publish a soup, or a trained adapter, on the Hub in one commit")
    push.add_argument("folder", help="of the soup, or of a run of recipes/ppo_reward.py or sft.py")
    push.add_argument("repo_id", help="user/name")
    push.add_argument("--front", type=Path, help="records.jsonl of the sweep that the soup was chosen from")
    push.add_argument("--require", type=Path, help="a test suite (YAML) that the soup must pass first")
    push.add_argument("--license", help="of what is published, by the Hub's name; see the card if left out")
    push.add_argument("--base", help="name of the base on the Hub, in place of a folder of this disk")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--commit-message", help="λ if left out")
    push.add_argument("--create_pr", "--create-pr", action="store_true", help="open a pull request instead of a commit")
    push.add_argument("--dry-run", action="store_true", help="only write the folder that would be pushed, and list it")
    push.add_argument("--out", type=Path, help="folder of a dry run; NAME-dry-run if left out")
    push.set_defaults(run=_push)

    pull = commands.add_parser("pull", help="copy a soup or an adapter from the Hub")
    pull.add_argument("source", help="user/name, user/name@revision, user/name/subfolder")
    pull.add_argument("--out", type=Path, help="folder; the repository's name if left out")
    pull.set_defaults(run=_pull)

    log = commands.add_parser("log", help="where a soup or an adapter comes from: the tree down to the base")
    log.add_argument("source", help="folder or Hub id")
    log.set_defaults(run=_log)

    diff = commands.add_parser("diff", help="how two soups or adapters differ, layer by layer and in their ingredients")
    diff.add_argument("one", help="folder or Hub id")
    diff.add_argument("other", help="folder or Hub id")
    diff.set_defaults(run=_diff)

    verify = commands.add_parser("verify", help="make a soup again from its ingredients, and compare")
    patch = commands.add_parser("patch", help="add an ingredient to a soup; the others keep their ratio")
    revert = commands.add_parser("revert", help="set an ingredient's λ to 0; the others keep their ratio")
    for command, run in ((verify, _verify), (patch, _patch), (revert, _revert)):
        command.add_argument("soup", help="folder or Hub id")
        command.add_argument("--base", help="folder or Hub id of the base, of a soup that was made with it")
        command.set_defaults(run=run)
    patch.add_argument("adapter", help="the new ingredient, a folder or a Hub id")
    patch.add_argument("--lambda", dest="weight", type=float, required=True, help="its λ")
    patch.add_argument("--name", help="its name; the folder's if left out")
    add_override(patch)
    revert.add_argument("name", help="of the ingredient")
    for command in (patch, revert):
        command.add_argument("--out", required=True, type=Path, help="folder of the new soup")
    for command in (verify, revert):
        command.add_argument(
            "--ingredient",
            action="append",
            default=[],
            metavar="NAME=FOLDER",
            help="where one is, if not where it was; may be given several times",
        )

    test = commands.add_parser(
        "test", help="rewards on prompt sets against thresholds and a parent; exit code 2 if one fails"
    )
    test.add_argument("soup", help="folder or Hub id")
    test.add_argument("--suite", required=True, type=Path, help="YAML: see rsoups/suites.py")
    test.add_argument("--against", help="a parent, instead of the suite's")
    add_override(test)
    test.set_defaults(run=_test)


def _push(args: argparse.Namespace) -> None:
    from rsoups.adapters.filenames import SOUP_FILE
    from rsoups.common.errors import HubError
    from rsoups.hub.push import push, push_adapter, read_soup

    options = {
        "license": args.license,
        "base": args.base,
        "private": args.private,
        "commit_message": args.commit_message,
        "create_pr": args.create_pr,
        "dry_run": (args.out or True) if args.dry_run else False,
    }
    if args.require:
        _run_suite(args.require, args.folder, None)
    if (Path(args.folder) / SOUP_FILE).is_file():
        pushed = push(read_soup(args.folder), args.repo_id, front=args.front, **options)
    elif args.front:
        raise HubError(f"{args.folder} is no soup: --front belongs to a soup at one of its λ")
    else:
        pushed = push_adapter(args.folder, args.repo_id, **options)
    if args.dry_run:
        for path in sorted(path for path in Path(pushed).rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>12,}  {path.relative_to(pushed)}")
    print(pushed)


def _pull(args: argparse.Namespace) -> None:
    from rsoups.hub.push import pull

    print(pull(args.source, args.out or Path(args.source.partition("@")[0]).name))


def _log(args: argparse.Namespace) -> None:
    from rsoups.adapters.lineage import manifest_of
    from rsoups.adapters.lineage_tree import log
    from rsoups.common.errors import LineageError

    manifest = manifest_of(args.source)
    if manifest is None:
        raise LineageError(f"{args.source} has neither soup.json nor lineage.json: where it comes from is not known")
    print(log(manifest, args.source))


def _diff(args: argparse.Namespace) -> None:
    from rsoups.soups.compare import diff

    print(diff(args.one, args.other).to_text())


def _verify(args: argparse.Namespace) -> None:
    from rsoups.soups.versions import verify

    print(verify(args.soup, _named(args.ingredient), args.base))


def _patch(args: argparse.Namespace) -> None:
    from rsoups.hub.push import read_soup
    from rsoups.soups.versions import patch

    options = {"allow_base_mismatch": args.allow_base_mismatch, "base": args.base}
    made = patch(read_soup(args.soup), args.adapter, args.weight, args.name, **options)
    made.save_pretrained(args.out)
    print(f"{made.mix}\n{args.out}")


def _revert(args: argparse.Namespace) -> None:
    from rsoups.hub.push import read_soup
    from rsoups.soups.versions import revert

    made = revert(read_soup(args.soup), args.name, _named(args.ingredient), args.base)
    made.save_pretrained(args.out)
    print(f"{made.mix}\n{args.out}")


def _test(args: argparse.Namespace) -> None:
    _run_suite(args.suite, args.soup, args.against, args.allow_base_mismatch)


def _run_suite(path: Path, source: str, against: str | None, allow_base_mismatch: bool = False) -> None:
    from rsoups.sweeps.suites import Suite, gate, run_suite

    suite = Suite.read(path)
    suite = replace(suite, allow_base_mismatch=allow_base_mismatch or suite.allow_base_mismatch)
    checks = run_suite(suite, source, against)
    print("\n".join(map(str, checks)))
    gate(checks)


def _named(pairs: list[str]) -> dict[str, str]:
    from rsoups.common.assets import named_sources
    from rsoups.common.errors import LineageError

    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise LineageError(f"--ingredient takes NAME=FOLDER, got {wrong[0]!r}")
    return named_sources(pairs, "ingredients", LineageError)
