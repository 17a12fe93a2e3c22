"""Find pickled weights and their conversions in the cache; nothing is opened here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rsoups.common.errors import CheckpointError, HubError
from rsoups.common.files import from_hub, hub_files, sha256_of

_ADAPTER, MODEL_STEM = "adapter_model", "model"
PICKLE_INDEX = "pytorch_model.bin.index.json"
CONFIG_FILES: tuple[str, ...] = ("adapter_config.json", "config.json", "generation_config.json")
TOKENIZER_PATTERNS: tuple[str, ...] = tuple(
    "tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json chat_template* *.model sentencepiece*".split()
)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Other pickles that trainers write beside the weights.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")


@dataclass(frozen=True)
class Pickles:
    """Pickled weights of one model or adapter.

    Attributes:
        name: Name that the user gave, without the revision.
        revision: Commit on the Hub; None for a folder.
        folder: Folder of the files.
        pickles: File name of each pickle -> name of the safetensors file that it becomes.
        index: Whether an index names the file of each tensor.
    """

    name: str
    revision: str | None
    folder: Path
    pickles: dict[str, str]
    index: bool = False

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def converted(source: str, revision: str | None = None) -> Path | None:
    """The conversion in the cache of a Hub id or a folder; None if there is none.

    Args:
        source: ``user/name``, ``user/name@revision``, or a folder.
        revision: Revision of a Hub id that names none.
    """
    if not _home().is_dir():
        return None
    try:
        if Path(source).expanduser().is_dir():
            folder = place_in_cache(find_pickles(source, check=False))
        else:
            # The configs are small, and fetching them tells the commit.
            fetched = from_hub(_at_revision(source, revision), CONFIG_FILES)
            if fetched is None:
                return None
            folder = _home() / _named(source.partition("@")[0], fetched[1])
    except (CheckpointError, HubError):
        return None
    return folder if folder.is_dir() else None


def holds_only_pickles(source: str, revision: str | None = None) -> bool:
    """Whether a folder or a Hub repository has pickled weights and no safetensors."""
    names = _names(_at_revision(source, revision))
    return any(map(_is_pickle, names)) and not _has_safetensors(names)


def remedy(source: str, revision: str | None = None) -> str:
    """The command that converts a source that has only pickles, for an error."""
    place = _at_revision(source, revision)
    out = f" --out {shlex.quote(f'{Path(source).name}-safetensors')}" if Path(source).is_dir() else ""
    again = ", and give that folder instead" if out else ", once; this name then works everywhere"
    return (
        "it holds only pickled weights, which rsoups never opens unasked. Where you trust it, run: "
        f"rsoups convert {shlex.quote(place)}{out}{again} (recipes/ppo_reward.py does it with --convert_pickles)"
    )


# --- where the pickles are ---------------------------------------------------------------------------------------------


def find_pickles(source: str, check: bool = True) -> Pickles:
    """Find the pickles of a source, and fetch them.

    Args:
        source: Source as `convert` takes it.
        check: Refuse a source that also has safetensors.

    Raises:
        CheckpointError: There are no pickles, or several without an index.
        HubError: The Hub cannot be reached or refuses.
    """
    path = Path(source).expanduser()
    if path.is_file():
        stem = _ADAPTER if (path.parent / "adapter_config.json").is_file() else MODEL_STEM
        return Pickles(source, None, path.parent, {path.name: f"{stem}.safetensors"})

    names = _names(source)
    if check and _has_safetensors(names):
        raise CheckpointError(f"{source} holds safetensors already: there is nothing to convert")
    pickles, index = _weights_among(source, names)

    folder, revision = path, None
    if not path.is_dir():
        fetched = from_hub(source, [*pickles, *CONFIG_FILES, *TOKENIZER_PATTERNS, *([PICKLE_INDEX] if index else [])])
        assert fetched is not None, "its files were listed"
        folder, revision = fetched

    stem = _ADAPTER if "adapter_config.json" in names else MODEL_STEM
    new_names = {pickles[0]: f"{stem}.safetensors"}
    if index:
        stems = {name: name.removesuffix(".bin").replace("pytorch_model", MODEL_STEM) for name in sorted(pickles)}
        new_names = {name: f"{stem}.safetensors" for name, stem in stems.items()}
    return Pickles(source.partition("@")[0] if revision else source, revision, folder, new_names, index)


def _weights_among(source: str, names: list[str]) -> tuple[list[str], bool]:
    """The pickles of weights among the names of files, and whether an index lists them."""
    pickles = [name for name in names if _is_pickle(name)]
    usual: list[str] = [name for name in ("adapter_model.bin", "pytorch_model.bin") if name in pickles]
    if PICKLE_INDEX in names and "adapter_model.bin" not in pickles:
        pickles = [name for name in pickles if re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", name)]
        if pickles:
            return pickles, True
    elif len(pickles) > 1 and usual:
        return usual[:1], False
    if len(pickles) == 1:
        return pickles, False

    several = f"several ({', '.join(sorted(pickles))}): name one of the files"
    none = f"no weights in {'/'.join(PICKLE_SUFFIXES)}"
    raise CheckpointError(f"{source} holds {several if pickles else none}")


def _names(source: str) -> list[str]:
    """Names of a source's files, at its top level."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(entry.name for entry in path.iterdir() if entry.is_file())
    names = hub_files(source)
    if names is None:
        raise CheckpointError(
            f"no folder or file {source!r}, and it is no Hub id (user/name, user/name@revision) either"
        )
    return names


def _has_safetensors(names: Iterable[str]) -> bool:
    return any(name.endswith(".safetensors") for name in names)


def _is_pickle(name: str) -> bool:
    return name.endswith(PICKLE_SUFFIXES) and not _NOT_WEIGHTS.fullmatch(name)


def _at_revision(source: str, revision: str | None) -> str:
    """A Hub id at a revision, unless it names one; `adapters.lineage.pinned` puts a commit in place of what it names."""
    return f"{source}@{revision}" if revision and "@" not in source else source


def _home() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "rsoups" / "converted"


def place_in_cache(pickles: Pickles) -> Path:
    """Folder in the cache, named by the commit, or by the bytes of a local folder's pickles."""
    if pickles.revision:
        return _home() / _named(pickles.name, pickles.revision)
    hashes = "".join(sha256_of(pickles.folder / name) for name in pickles.pickles)
    return _home() / f"{pickles.folder.resolve().name}@{hashes[:32]}"


def _named(repository: str, commit: str) -> str:
    return f"{repository.replace('/', '--')}@{commit}"
