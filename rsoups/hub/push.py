"""Publish on the Hugging Face Hub and read from it: one commit, with a card that says only what is known.

soup.push_to_hub("user/soup", front=front)
rsoups.Soup.from_pretrained("user/soup@main")
rsoups.push_front("user/front", soups, front)      # several λ, one repository
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from rsoups.adapters.adapter import holds_tokens, read_adapter
from rsoups.adapters.filenames import (
    CARD_FILE,
    CONFIG_FILE,
    FRONT_FILE,
    MANIFEST_FILE,
    PICTURE_FILE,
    SOUP_FILE,
    WEIGHTS_FILE,
)
from rsoups.adapters.layer_names import written_name
from rsoups.adapters.lineage import manifest_of, renamed_base
from rsoups.bases.files import TOKENIZER_FILES, copy_files
from rsoups.bases.names import public_name, short_name
from rsoups.common.errors import HubError, LineageError
from rsoups.common.files import from_hub, whole_folder
from rsoups.common.published import scrubbed
from rsoups.fronts.front import Front
from rsoups.fronts.points import Point
from rsoups.hub.card import Evaluation, adapter_card, front_card, soup_card
from rsoups.hub.upload import OUR_FILES, publish
from rsoups.soups.soup import METHODS, Soup


def push(
    soup: Soup,
    repo_id: str,
    *,
    front: Front | str | Path | None = None,
    private: bool | None = None,
    license: str | None = None,
    base: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dry_run: bool | str | Path = False,
    token: str | None = None,
) -> str:
    """Publish a soup in one commit: adapter, soup.json, card, and of a front its figures, its picture and evaluation results.

    Args:
        soup: The soup.
        repo_id: ``user/name``; made if it is not there.
        front: With the soup among its points, or the records.jsonl it is made of (beside which the sweep's settings are).
        private: Of a new repository.
        license: Of the soup, by the Hub's name. By default the strictest of the base's and the ingredients', where all of them
            are known and one of them is the strictest; else the card has none and says why.
        base: Name of the base on the Hub, in place of a folder of this disk. No path of a disk is published.
        commit_message: The λ by default.
        create_pr: Open a pull request instead of committing to the main branch.
        dry_run: Only write the folder that would be pushed: there, or ``<name>-dry-run`` if True.
        token: huggingface_hub's own by default; never logged.

    Returns:
        The URL of the commit or the pull request; of a dry run the folder.

    Raises:
        HubError: Refused (which token, which scope), or not reached after bounded retries. Nothing is half-published.
        FrontError: `front` has no point with this soup's λ.
    """
    evaluation = Evaluation.of(front, soup)
    told, place = soup.published(base), soup.config.base_model_name_or_path

    def write(folder: Path) -> None:
        told.save_pretrained(folder)
        _write_front(folder, evaluation)
        (folder / CARD_FILE).write_text(soup_card(told, repo_id, evaluation, license, place), encoding="utf-8")

    message = commit_message or f"Soup: {soup.mix}"
    return publish(repo_id, write, SOUP_FILE, private, message, create_pr, dry_run, token)


def push_front(
    repo_id: str,
    soups: Sequence[Soup],
    front: Front | str | Path | None = None,
    *,
    private: bool | None = None,
    license: str | None = None,
    base: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dry_run: bool | str | Path = False,
    token: str | None = None,
) -> str:
    """Publish several soups of the same ingredients as subfolders ``lambda-0.3-0.7`` of one repository, with one card.

    Subfolders of earlier fronts stay. ``Soup.from_pretrained("user/front/lambda-0.3-0.7")`` reads one, and PEFT with
    ``subfolder="lambda-0.3-0.7"``.

    Args:
        soups: At least one; all of the same ingredients, by name and hash, each at its own λ.
        repo_id, front, private, license, base, commit_message, create_pr, dry_run, token: As `push`.

    Raises:
        HubError: As `push`; or soups that do not make one front.
    """
    if len({tuple((i.name, i.sha256) for i in soup.ingredients) for soup in soups}) != 1:
        raise HubError("a front is of soups that have the same ingredients in the same order; push others on their own")
    folders = {subfolder(soup): soup for soup in soups}
    if len(folders) < len(soups):
        raise HubError(f"a front holds one soup at each λ; got {[subfolder(soup) for soup in soups]}")
    evaluation = Evaluation.of(front, *soups)
    told = {name: soup.published(base) for name, soup in folders.items()}
    place = soups[0].config.base_model_name_or_path

    def write(folder: Path) -> None:
        for name, soup in told.items():
            soup.save_pretrained(folder / name)
        _write_front(folder, evaluation)
        (folder / CARD_FILE).write_text(front_card(told, repo_id, evaluation, license, place), encoding="utf-8")

    message = commit_message or f"Front of {len(soups)} soups"
    return publish(repo_id, write, f"{next(iter(folders))}/{SOUP_FILE}", private, message, create_pr, dry_run, token)


def push_adapter(
    source: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    base: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dry_run: bool | str | Path = False,
    token: str | None = None,
) -> str:
    """Publish a trained adapter with its lineage.json, and a card that names reward, template, KL and data.

    Args:
        source: The run's folder.
        repo_id, private, license, base, commit_message, create_pr, dry_run, token: As `push`.

    Raises:
        AdapterError: As `read_adapter`.
        LineageError: No lineage.json: which reward trained it is not known.
        HubError: As `push`.
    """
    adapter, manifest = read_adapter(source), manifest_of(source)
    adapter.check_values()
    if manifest is None:
        raise LineageError(f"{source} holds no {MANIFEST_FILE}: no card can tell what it is; rsoups' recipes write one")
    place = adapter.config.base_model_name_or_path
    config = deepcopy(adapter.config)
    config.base_model_name_or_path = public_name(place, base)
    told = renamed_base(scrubbed(manifest), {place, short_name(place)}, config.base_model_name_or_path)

    def write(folder: Path) -> None:
        folder.mkdir()
        shutil.copyfile(Path(source) / WEIGHTS_FILE, folder / WEIGHTS_FILE)
        written = json.loads((Path(source) / CONFIG_FILE).read_text("utf-8"))
        _write_json(folder / CONFIG_FILE, written | {"base_model_name_or_path": config.base_model_name_or_path})
        _write_json(folder / MANIFEST_FILE, told)
        if holds_tokens(adapter.layout):
            copy_files(Path(source), TOKENIZER_FILES, folder)
        (folder / CARD_FILE).write_text(adapter_card(config, told, repo_id, license, place), encoding="utf-8")

    message = commit_message or f"{str(manifest.get('kind', 'adapter')).upper()} adapter"
    return publish(repo_id, write, None, private, message, create_pr, dry_run, token)


def read_soup(source: str | Path) -> Soup:
    """See `Soup.from_pretrained`."""
    adapter, manifest = read_adapter(source), manifest_of(source)
    if manifest is None or "ingredients" not in manifest:
        raise LineageError(
            f"{source} holds no {SOUP_FILE}: rsoups.interpolate([{str(source)!r}], [1.0]) takes any adapter"
        )
    weighed = manifest["ingredients"] and all("lambda" in ingredient for ingredient in manifest["ingredients"])
    if manifest.get("method") not in METHODS or not weighed:
        told = f"method {manifest.get('method')!r}, {len(manifest['ingredients'])} ingredients"
        raise LineageError(f"{source}: {SOUP_FILE} is none of a soup of adapters ({told})")
    state = {written_name(name, adapter.modules): adapter.tensor(name) for name in adapter.layout}
    return Soup(
        tensors=state,
        config=adapter.config,
        lambdas=tuple(float(ingredient["lambda"]) for ingredient in manifest["ingredients"]),
        method=manifest["method"],
        base_mismatch=bool(manifest.get("base_mismatch_allowed")),
        svd_error=manifest.get("svd_error"),
        factors_distance=manifest.get("factors_distance"),
        _manifest=manifest,
        _file=adapter,
    )


def pull(source: str, out: str | Path) -> Path:
    """Copy an adapter or a soup from the Hub to a folder, all or nothing: it, its card, lineage and front.

    Only files of these names are fetched: nothing that a repository holds beside them, and no path that it names.

    Args:
        source: ``user/name``, ``user/name@revision``, ``user/name/subfolder@revision``.
        out: The folder.

    Raises:
        HubError: No such repository, or the Hub cannot be reached.
        AdapterError: What is there is no adapter that a soup could hold.
        OutputError: The folder holds something else, or cannot be written.
    """
    found = from_hub(source, (*OUR_FILES, *TOKENIZER_FILES))
    if found is None:
        raise HubError(f"{source!r} is no Hub id (user/name, user/name@revision, user/name/subfolder)")
    read_adapter(source).check_values()
    with whole_folder(out, SOUP_FILE) as partial:
        for name in OUR_FILES:
            if (found[0] / name).is_file():
                shutil.copyfile(found[0] / name, partial / name)
        copy_files(found[0], TOKENIZER_FILES, partial)
    return Path(out)


def subfolder(soup: Soup) -> str:
    """Of a soup in a front's repository."""
    return "lambda-" + "-".join(f"{weight:.4g}" for weight in soup.lambdas)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- what is pushed --------------------------------------------------------------------------------------------------


def _write_front(folder: Path, evaluation: Evaluation | None) -> None:
    """front.json and front.png."""
    if evaluation is None:
        return
    from rsoups.reports.plots import draw_front

    front = evaluation.front
    data = {
        "rewards": front.rewards,
        "prompts": len(front.prompts),
        "interval": "95% bootstrap over prompts",
        "points": [_point(point) for point in front.points],
        "settings": evaluation.settings,
    }
    _write_json(folder / FRONT_FILE, data)
    draw_front(front).savefig(folder / PICTURE_FILE, dpi=160)


def _point(point: Point) -> dict[str, Any]:
    head = {"name": point.name, "lambdas": point.lambdas, "method": point.method, "n": point.n}
    return head | {"mean": point.mean, "low": point.low, "high": point.high}
