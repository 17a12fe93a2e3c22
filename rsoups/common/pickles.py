"""Find pickled weights and their conversions in the cache; nothing is opened here."""

from __future__ import annotations

import re
import shlex
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
# What trainers leave beside weights, in pickles too.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")


@dataclass(frozen=True)
class Pickles:
    """Where pickles are.

    Attributes:
        name: What the user called it, without a revision.
        revision: The Hub's commit; None for a folder.
        folder: Where the files are.
        pickles: Names of the pickles, and of the safetensors that they become.
        index: Whether an index tells which tensor is in which file.
    """

    name: str
    revision: str | None
    folder: Path
    pickles: dict[str, str]
    index: bool = False

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def converted(source: str, revision: str | None = None) -> Path | None:
    """The cached conversion of a Hub id or a folder; None if it was not converted.

    Args:
        source: ``user/name``, ``user/name@revision``, or a folder.
        revision: Of the Hub id, where it names none.
    """
    if not _home().is_dir():
        return None
    try:
        if Path(source).expanduser().is_dir():
            folder = place_in_cache(find_pickles(source, check=False))
        elif (
            fetched := from_hub(_pinned(source, revision), CONFIG_FILES)
        ) is not None:  # small, and it tells the commit
            folder = _home() / _named(source.partition("@")[0], fetched[1])
        else:
            return None
    except (CheckpointError, HubError):
        return None
    return folder if folder.is_dir() else None


def holds_only_pickles(source: str, revision: str | None = None) -> bool:
    """Whether a folder or a Hub repository has pickled weights and no safetensors."""
    names = _names(_pinned(source, revision))
    return any(map(_is_pickle, names)) and not any(name.endswith(".safetensors") for name in names)


def remedy(source: str, revision: str | None = None) -> str:
    """What to do about a source that holds only pickles: the exact command."""
    place = _pinned(source, revision)
    out = f" --out {shlex.quote(f'{Path(source).name}-safetensors')}" if Path(source).is_dir() else ""
    again = ", and give that folder instead" if out else ", once; this name then works everywhere"
    return (
        "it holds only pickled weights, which rsoups never opens unasked. Where you trust it, run: "
        f"rsoups convert {shlex.quote(place)}{out}{again} (recipes/ppo_reward.py does it with --convert_pickles)"
    )


# --- where the pickles are ---------------------------------------------------------------------------------------------


def find_pickles(source: str, check: bool = True) -> Pickles:
    """The pickles of a source, fetched.

    Args:
        source: As `convert` takes it.
        check: Refuse a source that has safetensors too.
    """
    path = Path(source).expanduser()
    if path.is_file():
        name = _ADAPTER if (path.parent / "adapter_config.json").is_file() else MODEL_STEM
        return Pickles(source, None, path.parent, {path.name: f"{name}.safetensors"})

    names = _names(source)
    if check and any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{source} holds safetensors already: there is nothing to convert")
    pickles = [name for name in names if _is_pickle(name)]
    index = PICKLE_INDEX in names and "adapter_model.bin" not in pickles
    if index:
        pickles = [name for name in pickles if re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", name)]
    elif len(pickles) > 1:
        pickles = [name for name in ("adapter_model.bin", "pytorch_model.bin") if name in pickles] or pickles
        pickles = pickles[:1] if pickles[0] in ("adapter_model.bin", "pytorch_model.bin") else pickles
    if not pickles or (len(pickles) > 1 and not index):
        kinds = "/".join(PICKLE_SUFFIXES)
        what = f"several ({', '.join(sorted(pickles))}): name one of the files" if pickles else f"no weights in {kinds}"
        raise CheckpointError(f"{source} holds {what}")

    folder, revision = path, None
    if not path.is_dir():
        fetched = from_hub(source, [*pickles, *CONFIG_FILES, *TOKENIZER_PATTERNS, *([PICKLE_INDEX] if index else [])])
        assert fetched is not None, "its files were listed"
        folder, revision = fetched
    if index:
        new = {
            name: name.replace("pytorch_model", MODEL_STEM).replace(".bin", ".safetensors") for name in sorted(pickles)
        }
    else:
        stem = _ADAPTER if "adapter_config.json" in names else MODEL_STEM
        new = {pickles[0]: f"{stem}.safetensors"}
    return Pickles(source.partition("@")[0] if revision else source, revision, folder, new, index)


def _names(source: str) -> list[str]:
    """Names of a source's files, at its top level."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(entry.name for entry in path.iterdir() if entry.is_file())
    if (names := hub_files(source)) is None:
        raise CheckpointError(
            f"no folder or file {source!r}, and it is no Hub id (user/name, user/name@revision) either"
        )
    return names


def _is_pickle(name: str) -> bool:
    return name.endswith(PICKLE_SUFFIXES) and not _NOT_WEIGHTS.fullmatch(name)


def _pinned(source: str, revision: str | None) -> str:
    return f"{source}@{revision}" if revision and "@" not in source else source


def _home() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "rsoups" / "converted"


def place_in_cache(found: Pickles) -> Path:
    """The place in the cache: of a commit, or of a folder's very bytes."""
    if found.revision:
        return _home() / _named(found.name, found.revision)
    hashes = "".join(sha256_of(found.folder / name) for name in found.pickles)
    return _home() / f"{found.folder.resolve().name}@{hashes[:32]}"


def _named(repository: str, commit: str) -> str:
    return f"{repository.replace('/', '--')}@{commit}"
