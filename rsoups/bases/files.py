"""Files of a base on the disk: tensors, config and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from rsoups.common.errors import AdapterError, HubError
from rsoups.common.files import from_hub
from rsoups.common.published import is_disk_path

# What goes with a model's weights: configs and the tokenizer, never code or pickles.
TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_FILES += ("chat_template*", "spm.model", "spiece.model", "sentencepiece*", "source.spm", "target.spm")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_DATA = {".json", ".jsonl", ".txt", ".model", ".spm", ".jinja", ".tiktoken"}
_UNLIKE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # are no change of a config


def files_like(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Data files of a folder that match patterns; links to other folders are left out."""
    homes = {folder.resolve()}
    if folder.parent.name == "snapshots":  # the Hub's cache keeps the contents there
        homes.add(folder.parent.parent.resolve() / "blobs")
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return [path for path in paths if path.is_file() and path.suffix in _DATA and path.resolve().parent in homes]


def copy_files(folder: Path, patterns: tuple[str, ...], out: Path) -> bool:
    """Copy `files_like`, and remove paths of this disk from the tokenizer's settings. Return whether there were any."""
    paths = files_like(folder, patterns)
    for path in paths:
        shutil.copyfile(path, out / path.name)
    settings = out / "tokenizer_config.json"
    if settings.is_file():
        data = json.loads(settings.read_text("utf-8"))
        paths = [
            key
            for key, value in data.items()
            if key == "name_or_path" or (key.endswith("_file") and is_disk_path(str(value)))
        ]
        if paths:
            portable = {key: value for key, value in data.items() if key not in paths}
            settings.write_text(json.dumps(portable, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return bool(paths)


def tokenizer_folder(source: str) -> Path | None:
    """Folder of the tokenizer of a model or an adapter; None if it has none."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            fetched = from_hub(source, (*TOKENIZER_FILES, *PROCESSOR_FILES))
        except HubError:
            return None
        if fetched is None:
            return None
        folder = fetched[0]
    return folder if files_like(folder, TOKENIZER_FILES) else None


def check_vocabularies(sources: Iterable[str]) -> None:
    """Refuse adapters whose tokenizers differ; adapters without a tokenizer are not checked.

    Raises:
        AdapterError: Two vocabularies differ.
    """
    known: dict[str, dict[str, int]] = {}
    for source in sources:
        folder = tokenizer_folder(source)
        try:
            words = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab() if folder else None
        except (OSError, ValueError, KeyError):  # none that transformers reads without code of its own
            continue
        if words is None:
            continue
        for other, theirs in known.items():
            if words != theirs:
                token = sorted(key for key in words.keys() | theirs.keys() if words.get(key) != theirs.get(key))[0]
                raise AdapterError(
                    f"the tokenizers that came with {other} and {source} differ: {token!r} is {theirs.get(token)} and "
                    f"{words.get(token)}, so that rows of their embeddings are of unlike tokens"
                )
        known[source] = words


@dataclass(frozen=True)
class BaseFiles:
    """Files on this disk that a loaded model was read from; none if it was made from a config."""

    source: str
    revision: str | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> BaseFiles:
        return cls(str(model.name_or_path or ""), getattr(model.config, "_commit_hash", None))

    def path(self, name: str) -> Path | None:
        folder = Path(self.source).expanduser()
        if not self.source or folder.is_dir():
            return folder / name if self.source and (folder / name).is_file() else None
        try:
            cached = try_to_load_from_cache(self.source, name, revision=self.revision)
        except ValueError:  # no Hub id
            return None
        return Path(cached) if isinstance(cached, str) else None

    def tensors(self) -> dict[str, Path]:
        """File of each tensor, by the tensor's name."""
        if (index := self.path("model.safetensors.index.json")) is not None:
            files = json.loads(index.read_text("utf-8"))["weight_map"]
            return {key: path for key, name in files.items() if (path := self.path(name)) is not None}
        if (one := self.path("model.safetensors")) is None:
            return {}
        with safe_open(one, "pt") as file:
            return dict.fromkeys(file.keys(), one)

    def read(self, names: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors, one at a time."""
        for name, path in names.items():
            with safe_open(path, "pt") as file:
                yield name, file.get_tensor(name)

    def architectures(self) -> list[str] | None:
        """`architectures` in config.json; None if there is no file."""
        path = self.path("config.json")
        return json.loads(path.read_text("utf-8")).get("architectures") if path is not None else None

    def config(self, config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
        """A changed config in the words of the base's own config.json, which older versions of transformers can read.

        Args:
            config: Changed config.
            dtype: Name of the type of the weights.
        """
        after = _plain(config)
        path = self.path("config.json")
        before = AutoConfig.from_pretrained(path.parent) if path is not None else None
        if path is None or type(before) is not type(config):
            return {key: value for key, value in after.items() if key != "_name_or_path"} | {"dtype": dtype}
        written = json.loads(path.read_text("utf-8"))
        _update(written, _plain(before), after)
        written.pop("_name_or_path", None)
        return written | {"torch_dtype" if "torch_dtype" in written else "dtype": dtype}


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def _update(written: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in after.items():
        old = before.get(key)
        if key in _UNLIKE or value == old:
            continue
        if isinstance(value, dict) and isinstance(old, dict) and isinstance(written.get(key), dict):
            _update(written[key], old, value)
        else:
            written[key] = value
