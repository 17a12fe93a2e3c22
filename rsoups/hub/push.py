"""Publish folders on the Hugging Face Hub and read from it: one commit, with a card that says only what is known.

push("runs/coverage", "user/coverage")                   # an adapter with its lineage.json
push("soup", "user/soup", front="sweep/records.jsonl")   # a soup with its soup.json
pull("user/soup@main", "soup")
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypedDict

from rsoups.adapters.adapter import holds_tokens, read_adapter
from rsoups.adapters.filenames import CARD_FILE, CONFIG_FILE, MANIFEST_FILE, SOUP_FILE, WEIGHTS_FILE
from rsoups.adapters.lineage import Manifest, manifest_of, parents_of, renamed_base, soup_ingredients
from rsoups.bases.files import TOKENIZER_FILES, copy_files
from rsoups.bases.names import public_name, short_name
from rsoups.common.errors import AdapterError, HubError, LineageError, OutputError
from rsoups.common.files import from_hub, whole_folder
from rsoups.common.published import scrubbed
from rsoups.hub.card import card
from rsoups.hub.evaluation import Evaluation
from rsoups.hub.licenses import license_of
from rsoups.hub.upload import OUR_FILES, check_repo_id, commit

if TYPE_CHECKING:
    from peft import LoraConfig

    from rsoups.fronts.front import Front


class PushOptions(TypedDict, total=False):
    """Options of `push` that `Soup.push_to_hub` and `push_front` pass on."""

    private: bool | None
    license: str | None
    base: str | None
    commit_message: str | None
    create_pr: bool
    dry_run: bool | str | Path
    token: str | None


def push(
    folder: str | Path,
    repo_id: str,
    *,
    front: Front | str | Path | None = None,
    private: bool | None = None,
    license: str | None = None,
    base: str | None = None,
    sources: Sequence[tuple[str, str | None]] | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dry_run: bool | str | Path = False,
    token: str | None = None,
) -> str:
    """Publish a folder in one commit, with a card for what it holds.

    Args:
        folder: An adapter with lineage.json; a soup with soup.json; or a front, that is subfolders with soups of the same
            ingredients.
        repo_id: ``user/name``; created if it does not exist.
        front: Front with the soup among its points, or its records.jsonl (with the sweep's settings in the same folder). Its
            figures, its picture and evaluation results are published too.
        private: Visibility of a new repository.
        license: The Hub's name of the license. By default the strictest of the base's and the ingredients', where all of them
            are known and one of them is the strictest; else the card has none and says why.
        base: Name of the base on the Hub, in place of a folder of this disk. No path of a disk is published.
        sources: Folder or Hub id, and commit, of each ingredient, to read their licenses from. The manifest's by default.
        commit_message: Message of the commit; λ of a soup by default.
        create_pr: Open a pull request instead of committing to the main branch.
        dry_run: Only write the folder that would be pushed: to this path, or to ``<name>-dry-run`` if True.
        token: Hub token; huggingface_hub's own by default. It is never logged.

    Returns:
        The URL of the commit or the pull request; of a dry run the folder.

    Raises:
        AdapterError: As `read_adapter`; or a tensor is not finite.
        LineageError: The folder has no manifest, or the manifest is that of other weights.
        FrontError: `front` has no point with this soup's λ.
        HubError: The Hub refuses (the error names the token's origin and the scope), or is not reached after bounded
            retries; nothing is half-published. Or the subfolders do not make one front.
    """
    check_repo_id(repo_id)

    models = _read(Path(folder).expanduser(), base)
    (first_name, first), *_ = models.items()
    manifests = {name: model.manifest for name, model in models.items()}
    if front is not None and not first.is_soup:
        raise HubError(f"{folder} holds no {SOUP_FILE}: front= belongs to a soup at one of its λ")

    evaluation = Evaluation.of(front, list(manifests.values())) if front is not None else None
    if sources is None:
        sources = [(parent["source"].partition("@")[0], parent["revision"]) for parent in parents_of(first.manifest)]
    terms = license_of(first.base or "", sources, license)
    text = card(repo_id, first.config, manifests, terms, evaluation)

    def write(out: Path) -> None:
        for name, model in models.items():
            model.write(out / name)
        if evaluation is not None:
            evaluation.write(out)
        (out / CARD_FILE).write_text(text, encoding="utf-8")

    if dry_run:
        out = Path(f"{repo_id.split('/')[1]}-dry-run" if dry_run is True else dry_run)
        if not first.is_soup and out.exists():  # a run's folder has checkpoints, too
            raise OutputError(f"{out} exists: it is not replaced; remove it or choose another folder")
        with whole_folder(out, str(Path(first_name, SOUP_FILE))) as partial:
            write(partial)
        return str(out)

    with TemporaryDirectory() as temporary:
        write(Path(temporary))
        return commit(Path(temporary), repo_id, private, commit_message or _message(models), create_pr, token)


def pull(source: str, out: str | Path) -> Path:
    """Copy an adapter or a soup from the Hub to a folder, all or nothing, with its card, lineage and front.

    Only files with these names are fetched: no other file of the repository, and no path that it names.

    Args:
        source: ``user/name``, ``user/name@revision``, ``user/name/subfolder@revision``.
        out: Folder of the copy.

    Raises:
        HubError: There is no such repository, or the Hub cannot be reached.
        AdapterError: The repository holds no adapter that a soup could hold.
        OutputError: The folder holds something else, or cannot be written.
    """
    fetched = from_hub(source, (*OUR_FILES, *TOKENIZER_FILES))
    if fetched is None:
        raise HubError(f"{source!r} is no Hub id (user/name, user/name@revision, user/name/subfolder)")
    folder, _ = fetched
    read_adapter(source).check_values()
    with whole_folder(out, SOUP_FILE) as partial:
        for name in OUR_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        copy_files(folder, TOKENIZER_FILES, partial)
    return Path(out)


# --- what is pushed --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """An adapter or a soup in a folder.

    Attributes:
        folder: The folder.
        weights: Its file of weights; in the cache where the folder itself holds a pickle.
        base: The base on this disk, or its name.
        config: PEFT's config, with the public name of the base.
        manifest: What is published of the manifest: no path of this disk.
        has_tokens: Whether its tensors are of tokens, so that the tokenizer belongs to them.
    """

    folder: Path
    weights: Path
    base: str | None
    config: LoraConfig
    manifest: Manifest
    has_tokens: bool

    @classmethod
    def read(cls, folder: Path, base_name: str | None) -> _Model:
        adapter, manifest = read_adapter(folder), manifest_of(folder)
        adapter.check_values()
        if manifest is None:
            raise LineageError(
                f"{folder} holds no {MANIFEST_FILE}: no card can tell what it is; rsoups' recipes write one"
            )
        if "ingredients" in manifest:
            soup_ingredients(folder, manifest)
        recorded = manifest.get("sha256")
        if isinstance(recorded, str) and recorded != adapter.sha256:
            raise LineageError(
                f"{folder}: its weights are {adapter.sha256[:12]}, its manifest is that of {recorded[:12]}: "
                "publish the folder as it was written"
            )

        base = adapter.config.base_model_name_or_path
        config = deepcopy(adapter.config)
        config.base_model_name_or_path = public_name(base, base_name)
        manifest = renamed_base(scrubbed(manifest), {base, short_name(base)}, config.base_model_name_or_path)
        place = adapter.folder or folder
        return cls(folder, place / WEIGHTS_FILE, base, config, manifest, holds_tokens(adapter.layout))

    @property
    def is_soup(self) -> bool:
        return "ingredients" in self.manifest

    def write(self, out: Path) -> None:
        """Copy the folder's files of the adapter, without paths of this disk."""
        out.mkdir(exist_ok=True)
        shutil.copyfile(self.weights, out / WEIGHTS_FILE)
        config = json.loads((self.folder / CONFIG_FILE).read_text("utf-8"))
        config["base_model_name_or_path"] = self.config.base_model_name_or_path
        _write_json(out / CONFIG_FILE, config, self.folder / CONFIG_FILE)

        name = SOUP_FILE if self.is_soup else MANIFEST_FILE
        _write_json(out / name, self.manifest, self.folder / name)
        if self.has_tokens:
            copy_files(self.folder, TOKENIZER_FILES, out)


def _read(folder: Path, base_name: str | None) -> dict[str, _Model]:
    """Models by their subfolder; "" is the folder itself."""
    if not folder.is_dir():
        raise AdapterError(f"no folder {str(folder)!r} to publish: give the folder of an adapter or a soup")
    subfolders = sorted(path.parent for path in folder.glob(f"*/{SOUP_FILE}"))
    if (folder / CONFIG_FILE).is_file() or not subfolders:
        return {"": _Model.read(folder, base_name)}
    soups = [_Model.read(path, base_name) for path in subfolders]
    check_one_front([soup.manifest for soup in soups])
    # In the order of a front's own points: the most of the first ingredient first.
    soups.sort(key=lambda soup: [-parent["lambda"] for parent in parents_of(soup.manifest)])
    return {soup.folder.name: soup for soup in soups}


def check_one_front(soups: Sequence[Manifest]) -> None:
    """Refuse soups that do not have the same ingredients, by name and hash.

    Raises:
        HubError: Two have other ingredients, or there is none.
    """
    if len({tuple((parent["name"], parent["sha256"]) for parent in parents_of(soup)) for soup in soups}) != 1:
        raise HubError("a front is of soups that have the same ingredients in the same order; push others on their own")


def _message(models: dict[str, _Model]) -> str:
    if len(models) > 1 or "" not in models:
        return f"Front of {len(models)} soups"
    manifest = models[""].manifest
    if not models[""].is_soup:
        return f"{str(manifest.get('kind', 'adapter')).upper()} adapter"
    return "Soup: " + ", ".join(f"{parent['lambda']:g} {parent['name']}" for parent in parents_of(manifest))


def _write_json(path: Path, data: dict[str, Any], original: Path) -> None:
    """Write JSON; a file that changes nothing about the original is a copy of it, byte for byte."""
    if original.is_file() and json.loads(original.read_text("utf-8")) == data:
        shutil.copyfile(original, path)
    else:
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
