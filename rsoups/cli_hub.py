"""The commands that treat models as software: push, pull, log, diff, verify, patch, revert, test."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add them to the parser of `rsoups`."""
    push = commands.add_parser("push", help="publish a soup, or a trained adapter, on the Hub in one commit")
    push.add_argument("folder", help="of the soup, or of a run of recipes/ppo_reward.py or sft.py")
    push.add_argument("repo_id", help="user/name")
    push.add_argument("--front", type=Path, help="records.jsonl of the sweep that the soup was chosen from")
    push.add_argument("--require", type=Path, help="a test suite (YAML) that the soup must pass first")
    push.add_argument("--licence", help="of what is published, by the Hub's name; see the card if left out")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--commit-message", help="λ if left out")
    push.add_argument("--create_pr", "--create-pr", action="store_true", help="open a pull request instead of a commit")
    push.add_argument(
        "--dry-run",
        nargs="?",
        const=True,
        default=False,
        help="only write the folder that would be pushed (NAME-dry-run)",
    )
    push.set_defaults(run=_push)

    pull = commands.add_parser("pull", help="copy a soup or an adapter from the Hub")
    pull.add_argument("source", help="user/name, user/name@revision, user/name/subfolder")
    pull.add_argument("--out", type=Path, help="folder; the repository's name if left out")
    pull.set_defaults(run=_pull)


def _push(args: argparse.Namespace) -> None:
    from rsoups._errors import HubError
    from rsoups.hub import push, push_adapter, read_soup
    from rsoups.lineage import SOUP_FILE

    options = {
        "licence": args.licence,
        "private": args.private,
        "commit_message": args.commit_message,
        "create_pr": args.create_pr,
        "dry_run": args.dry_run,
    }
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
    from rsoups.hub import pull

    print(pull(args.source, args.out or Path(args.source.partition("@")[0]).name))
