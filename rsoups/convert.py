"""Convert pickled weights to safetensors: the one door for pickles.

Nothing else in rsoups opens a pickle. Here it is opened by torch's weights-only unpickler in a child process without network
(`rsoups._unpickle`), and only tensors come out.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsoups._errors import CheckpointError, HubError, OutputError
from rsoups._files import from_hub, hub_files, sha256_of, whole_folder
from rsoups.lineage import MANIFEST_FILE, parents_of, published, read_manifest, write_manifest

_ADAPTER, _MODEL = "adapter_model", "model"
_INDEX = "pytorch_model.bin.index.json"
_CONFIGS: tuple[str, ...] = ("adapter_config.json", "config.json", "generation_config.json")
_TOKENIZER: tuple[str, ...] = tuple(
    "tokenizer* vocab* merges.txt special_tokens_map.json added_tokens.json chat_template* *.model sentencepiece*".split()
)
_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# What trainers leave beside weights, in pickles too.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")
_LONGEST_INDEX = 2**26  # bytes


@dataclass(frozen=True)
class _Source:
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


def convert(source: str | Path, out: str | Path | None = None, *, say: Callable[[str], None] = print) -> Path:
    """Write an adapter, a reward model or a whole model from ``.bin`` or ``.pt`` files as safetensors.

    The same bytes come out for the same bytes in. Configs and tokenizers are copied, nothing else. ``lineage.json`` tells the
    SHA-256 of each original file and of each converted one.

    Args:
        source: A folder, one file, or a Hub id (``user/name``, ``user/name@revision``).
        out: The new folder. By default a place in the cache (``$HF_HOME/rsoups/converted``), where every command of rsoups
            finds it under the Hub id.
        say: Is told what is opened, and of which revision, before it is opened.

    Returns:
        The folder.

    Raises:
        CheckpointError: There is no pickle, or one that holds anything but tensors, or that needs too much memory.
        OutputError: `out` is there already, or cannot be written.
        HubError: The Hub cannot be reached or refuses.
    """
    found = _find(str(source))
    target = Path(out) if out is not None else _cached(found)
    if out is None and target.is_dir():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists: choose another folder, or remove it first")
    hashes = {name: sha256_of(found.folder / name) for name in found.pickles}
    say(f"opening {found}: " + ", ".join(f"{name} (SHA-256 {sha256[:12]})" for name, sha256 in hashes.items()))

    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target, MANIFEST_FILE) as partial:
        for name, new in found.pickles.items():
            _convert_file(found.folder / name, partial / new)
        for path in _beside(found.folder):
            shutil.copyfile(path, partial / path.name)
        if found.index:
            _write_index(found, partial)
        _write_lineage(found, partial, hashes)
    say(f"wrote {target}")
    return target


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
            folder = _cached(_find(source, check=False))
        elif (fetched := from_hub(_pinned(source, revision), _CONFIGS)) is not None:  # small, and it tells the commit
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


def conversion_of(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """What the cache's conversion of a source was made from: ``revision``, and the SHA-256 of ``original`` and ``converted``
    weights (of several files by their names); None if there is none."""
    if (folder := converted(source, revision)) is None:
        return None
    manifest = read_manifest(folder / MANIFEST_FILE)
    (parent,) = parents_of(manifest)
    return {"revision": parent["revision"], "original": parent["sha256"], "converted": manifest["sha256"]}


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


def _find(source: str, check: bool = True) -> _Source:
    """The pickles of a source, fetched.

    Args:
        source: As `convert` takes it.
        check: Refuse a source that has safetensors too.
    """
    path = Path(source).expanduser()
    if path.is_file():
        name = _ADAPTER if (path.parent / "adapter_config.json").is_file() else _MODEL
        return _Source(source, None, path.parent, {path.name: f"{name}.safetensors"})

    names = _names(source)
    if check and any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{source} holds safetensors already: there is nothing to convert")
    pickles = [name for name in names if _is_pickle(name)]
    index = _INDEX in names and "adapter_model.bin" not in pickles
    if index:
        pickles = [name for name in pickles if re.fullmatch(r"pytorch_model-\d+-of-\d+\.bin", name)]
    elif len(pickles) > 1:
        pickles = [name for name in ("adapter_model.bin", "pytorch_model.bin") if name in pickles] or pickles
        pickles = pickles[:1] if pickles[0] in ("adapter_model.bin", "pytorch_model.bin") else pickles
    if not pickles or (len(pickles) > 1 and not index):
        kinds = "/".join(_SUFFIXES)
        what = f"several ({', '.join(sorted(pickles))}): name one of the files" if pickles else f"no weights in {kinds}"
        raise CheckpointError(f"{source} holds {what}")

    folder, revision = path, None
    if not path.is_dir():
        fetched = from_hub(source, [*pickles, *_CONFIGS, *_TOKENIZER, *([_INDEX] if index else [])])
        assert fetched is not None, "its files were listed"
        folder, revision = fetched
    if index:
        new = {name: name.replace("pytorch_model", _MODEL).replace(".bin", ".safetensors") for name in sorted(pickles)}
    else:
        stem = _ADAPTER if "adapter_config.json" in names else _MODEL
        new = {pickles[0]: f"{stem}.safetensors"}
    return _Source(source.partition("@")[0] if revision else source, revision, folder, new, index)


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
    return name.endswith(_SUFFIXES) and not _NOT_WEIGHTS.fullmatch(name)


def _pinned(source: str, revision: str | None) -> str:
    return f"{source}@{revision}" if revision and "@" not in source else source


def _home() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "rsoups" / "converted"


def _cached(found: _Source) -> Path:
    """The place in the cache: of a commit, or of a folder's very bytes."""
    if found.revision:
        return _home() / _named(found.name, found.revision)
    hashes = "".join(sha256_of(found.folder / name) for name in found.pickles)
    return _home() / f"{found.folder.resolve().name}@{hashes[:32]}"


def _named(repository: str, commit: str) -> str:
    return f"{repository.replace('/', '--')}@{commit}"


# --- what is written ---------------------------------------------------------------------------------------------------


def _convert_file(pickle: Path, out: Path) -> None:
    """Open one pickle in a child process, which writes `out`."""
    # Nothing of the environment that could change what torch does, and no token.
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG") if name in os.environ}
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), *sys.path]))
    with tempfile.TemporaryDirectory(prefix="rsoups-") as home:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "rsoups._unpickle", str(pickle.resolve()), str(out.resolve())],
            env=kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HOME": home, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode == 0 and out.is_file():
        return
    try:
        reason = str(json.loads(child.stderr.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        reason = f"the process that read it ended with status {child.returncode}"
    if "No space left" in reason:
        raise OutputError(f"cannot write {out}: {reason}")
    reason = reason.removeprefix("RefusedError: ").partition("\n")[0][:300]
    raise CheckpointError(
        f"{pickle} is not converted, and nothing of it was run: {reason}. Only files of plain tensors by name are converted"
    )


def _beside(folder: Path) -> Iterator[Path]:
    """Configs and the tokenizer; never code, pickles or a card."""
    for pattern in (*_CONFIGS, *_TOKENIZER):
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not path.name.endswith((*_SUFFIXES, ".py")):
                yield path


def _write_index(found: _Source, partial: Path) -> None:
    """The index of the new files, from their own headers; the old index must tell of the same tensors."""
    from safetensors import safe_open

    path = found.folder / _INDEX
    try:
        if path.stat().st_size > _LONGEST_INDEX:
            raise ValueError("it is too long")
        old = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        told = {name: found.pickles[file] for name, file in old.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of the files beside it: {error!r}") from None
    weight_map: dict[str, str] = {}
    total = 0
    for new in found.pickles.values():
        with safe_open(partial / new, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), new)
        total += (partial / new).stat().st_size
    if different := sorted(told.items() ^ weight_map.items()):
        raise CheckpointError(f"{path} and its files differ on {different[0][0]}: fetch the model again")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (partial / f"{_MODEL}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_lineage(found: _Source, partial: Path, hashes: dict[str, str]) -> None:
    """The manifest of the conversion: the original is its parent, with the hashes of the pickles."""
    config: dict[str, Any] = {}
    if (partial / "adapter_config.json").is_file():
        try:
            config = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{found.folder / 'adapter_config.json'} is not valid JSON") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    original = next(iter(hashes.values())) if len(hashes) == 1 else hashes
    write_manifest(
        partial,
        "conversion",
        base={"model": str(base or published(found.name)), "revision": None},
        recipe="rsoups convert",
        config={"files": found.pickles},
        data={},
        parent=(found.name, found.revision, original),
    )
