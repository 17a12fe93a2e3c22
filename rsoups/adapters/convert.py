"""Convert pickled weights to safetensors.

Nothing else in rsoups opens a pickle. Here a child process without network (`rsoups.common.unpickle`) opens it with torch's
weights-only unpickler, and writes only tensors.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rsoups.adapters.filenames import MANIFEST_FILE
from rsoups.adapters.lineage import parents_of, read_manifest, write_manifest
from rsoups.common.errors import CheckpointError, OutputError
from rsoups.common.files import sha256_of, whole_folder
from rsoups.common.pickles import (
    CONFIG_FILES,
    MODEL_STEM,
    PICKLE_INDEX,
    PICKLE_SUFFIXES,
    TOKENIZER_PATTERNS,
    Pickles,
    converted,
    find_pickles,
    place_in_cache,
)
from rsoups.common.published import published

_LONGEST_INDEX = 2**26  # bytes


def convert(source: str | Path, out: str | Path | None = None, *, say: Callable[[str], None] = print) -> Path:
    """Convert the ``.bin`` or ``.pt`` files of an adapter, a reward model or a whole model to safetensors.

    Equal files give equal conversions. Only configs and tokenizers are copied. ``lineage.json`` holds the SHA-256 of each
    original file and of each converted one.

    Args:
        source: Folder, one file, or Hub id (``user/name``, ``user/name@revision``).
        out: The new folder. By default a place in the cache (``$HF_HOME/rsoups/converted``), where every command of rsoups
            finds it under the Hub id.
        say: Is called with each message: what is opened, and what is written.

    Returns:
        The new folder.

    Raises:
        CheckpointError: There is no pickle, or it holds something other than tensors, or it needs too much memory.
        OutputError: `out` exists, or cannot be written.
        HubError: The Hub cannot be reached or refuses.
    """
    originals = find_pickles(str(source))
    target = Path(out) if out is not None else place_in_cache(originals)
    if out is None and target.is_dir():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists: choose another folder, or remove it first")
    hashes = {name: sha256_of(originals.folder / name) for name in originals.pickles}
    say(f"opening {originals}: " + ", ".join(f"{name} (SHA-256 {sha256[:12]})" for name, sha256 in hashes.items()))

    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target, MANIFEST_FILE) as partial:
        for name, new in originals.pickles.items():
            _convert_file(originals.folder / name, partial / new)
        for path in _files_to_copy(originals.folder):
            shutil.copyfile(path, partial / path.name)
        if originals.index:
            _write_index(originals, partial)
        _write_lineage(originals, partial, hashes)
    say(f"wrote {target}")
    return target


def conversion_of(source: str, revision: str | None = None) -> dict[str, Any] | None:
    """Origin of the conversion of a source in the cache; None if there is none.

    Returns:
        ``revision``, and the SHA-256 of the ``original`` and the ``converted`` weights (for several files a dict by name).
    """
    folder = converted(source, revision)
    if folder is None:
        return None
    manifest = read_manifest(folder / MANIFEST_FILE)
    (parent,) = parents_of(manifest)
    return {"revision": parent["revision"], "original": parent["sha256"], "converted": manifest["sha256"]}


# --- writing ---------------------------------------------------------------------------------------------------------


def _convert_file(pickle: Path, out: Path) -> None:
    """Convert one pickle in a child process."""
    if find_spec("resource") is None:
        raise CheckpointError(
            f"{pickle} is not converted: only Linux and macOS can bound the memory of the process that opens it"
        )

    # The child gets no token, and no variable that could change what torch does.
    inherited = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG") if name in os.environ
    }
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent.parent), *sys.path]))
    with tempfile.TemporaryDirectory(prefix="rsoups-") as home:
        command = [sys.executable, "-W", "ignore", "-m", "rsoups.common.unpickle"]
        child = subprocess.run(
            [*command, str(pickle.resolve()), str(out.resolve())],
            env=inherited | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HOME": home, "PYTHONDONTWRITEBYTECODE": "1"},
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


def _files_to_copy(folder: Path) -> Iterator[Path]:
    """Files to copy: configs and the tokenizer, never code, pickles or a card."""
    for pattern in (*CONFIG_FILES, *TOKENIZER_PATTERNS):
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not path.name.endswith((*PICKLE_SUFFIXES, ".py")):
                yield path


def _write_index(originals: Pickles, partial: Path) -> None:
    """Write the index of the new files, from their headers; the old index must list the same tensors."""
    from safetensors import safe_open

    path = originals.folder / PICKLE_INDEX
    try:
        if path.stat().st_size > _LONGEST_INDEX:
            raise ValueError("it is too long")
        old = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        listed = {name: originals.pickles[file] for name, file in old.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of the files beside it: {error!r}") from None
    weight_map: dict[str, str] = {}
    total = 0
    for new in originals.pickles.values():
        with safe_open(partial / new, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), new)
        total += (partial / new).stat().st_size
    if different := sorted(listed.items() ^ weight_map.items()):
        raise CheckpointError(f"{path} and its files differ on {different[0][0]}: fetch the model again")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (partial / f"{MODEL_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_lineage(originals: Pickles, partial: Path, hashes: dict[str, str]) -> None:
    """Write the manifest of the conversion: its parent is the original, with the hashes of the pickles."""
    config: dict[str, Any] = {}
    if (partial / "adapter_config.json").is_file():
        try:
            config = json.loads((partial / "adapter_config.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{originals.folder / 'adapter_config.json'} is not valid JSON") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    original = next(iter(hashes.values())) if len(hashes) == 1 else hashes
    write_manifest(
        partial,
        "conversion",
        base={"model": str(base or published(originals.name)), "revision": None},
        recipe="rsoups convert",
        config={"files": originals.pickles},
        data={},
        parent=(originals.name, originals.revision, original),
    )
