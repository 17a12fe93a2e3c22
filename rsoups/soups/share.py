"""Publish several soups of the same adapters in one repository.

rsoups.push_front("user/front", rsoups.interpolate(adapters, [[0.25, 0.75], [0.5, 0.5]]))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Unpack

from rsoups.common.errors import HubError
from rsoups.hub.push import PushOptions, check_one_front, push
from rsoups.hub.upload import check_repo_id
from rsoups.soups.soup import Soup

if TYPE_CHECKING:
    from rsoups.fronts.front import Front


def push_front(
    repo_id: str, soups: Sequence[Soup], front: Front | str | Path | None = None, **options: Unpack[PushOptions]
) -> str:
    """Publish several soups of the same ingredients as subfolders ``lambda-0.3-0.7`` of one repository, with one card.

    Subfolders of earlier fronts stay. ``Soup.from_pretrained("user/front/lambda-0.3-0.7")`` reads one, and PEFT with
    ``subfolder="lambda-0.3-0.7"``.

    Args:
        repo_id: ``user/name``; created if it does not exist.
        soups: At least one soup; all of the same ingredients, by name and hash, each at its own λ.
        front: As `Soup.push_to_hub`.
        options: ``private``, ``license``, ``base``, ``commit_message``, ``create_pr``, ``dry_run`` and ``token``, as
            `Soup.push_to_hub`.

    Returns:
        The URL of the commit or the pull request; of a dry run the folder.

    Raises:
        HubError: As `Soup.push_to_hub`; or the soups do not make one front.
    """
    check_repo_id(repo_id)
    check_one_front([soup.lineage for soup in soups])
    folders = {subfolder(soup): soup for soup in soups}
    if len(folders) < len(soups):
        raise HubError(f"a front holds one soup at each λ; got {[subfolder(soup) for soup in soups]}")

    with TemporaryDirectory() as temporary:
        for name, soup in folders.items():
            soup.save_pretrained(Path(temporary, name))
        return push(temporary, repo_id, front=front, sources=soups[0].sources or None, **options)


def subfolder(soup: Soup) -> str:
    """Name of a soup's folder in the repository of a front."""
    return "lambda-" + "-".join(f"{weight:.4g}" for weight in soup.lambdas)
