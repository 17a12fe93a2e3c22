"""Interpolate whole models, file by file: full fine-tunings (DiWA), reward models (WARM), any transformers checkpoint.

Weights stream block by block from safetensors to safetensors, so that models larger than the memory can be averaged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from rsoups.adapters import tensor_files
from rsoups.adapters.filenames import SOUP_FILE
from rsoups.adapters.layer_names import skeleton
from rsoups.bases.files import PROCESSOR_FILES, TOKENIZER_FILES, copy_files
from rsoups.bases.load import why_not
from rsoups.common.assets import resolve
from rsoups.common.errors import CheckpointError, LambdasError
from rsoups.common.files import from_hub, sha256_of, whole_folder
from rsoups.common.pickles import converted
from rsoups.common.published import published
from rsoups.soups.lambdas import weights_of

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BLOCK = 2**22  # numbers that are read of each model at a time
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# What goes with the weights, but no card, which is not true of the average.
_COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES)
# Fields that may differ between configs.
_FREE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "unsloth_fixed",
    "unsloth_version",
}
# Buffers in old checkpoints that transformers computes anew, for models that it has no class for.
_BUFFER = re.compile(r".*(\.rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|\.position_ids)")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # of configs that transformers does not read


@dataclass(frozen=True)
class _Checkpoint:
    """A model's folder.

    Attributes:
        source: Folder or Hub id.
        folder: Folder on this disk.
        revision: Hub commit, or None.
        config: config.json as it is written.
        files: File of each tensor.
        kinds: safetensors' dtype, and shape, of each tensor.
        handles: Open file by its name.
    """

    source: str
    folder: Path
    revision: str | None
    config: dict[str, Any]
    files: dict[str, str]
    kinds: dict[str, tuple[str, tuple[int, ...]]]
    handles: dict[str, Any]

    def tensor(self, key: str) -> Tensor:
        return self.handles[self.files[key]].get_tensor(key)

    def transformers_config(self) -> Any:
        """The config as transformers reads it; None if it does not."""
        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except _UNREADABLE:
            return None


_Weighted = list[tuple[_Checkpoint, float]]


def interpolate_checkpoints(
    models: Sequence[Any] | Mapping[str, Any],
    lambdas: Any,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    normalize: bool = False,
    extrapolate: bool = False,
    progress: bool = True,
) -> Path:
    """Write Σ λi·θi, with the first model's config and tokenizer, in files as its own.

    Args:
        models: N folders or Hub ids (``user/name@revision``) of one architecture, in safetensors; or a dict of them by name.
        lambdas: N weights; None for uniform ones.
        out: Folder of the result.
        dtype: Dtype of floating-point tensors; by default that of the first model of non-zero weight. Sums are in float64,
            rounded once; a single model of weight 1 is copied bit for bit.
        normalize: Divide the weights by their sum.
        extrapolate: Allow weights outside [0, 1].
        progress: Show a progress bar.

    Returns:
        `out`. Peak memory is a few blocks of 4M numbers, whatever the size of the models.

    Raises:
        CheckpointError: A model cannot be read, or has other parameters, shapes, vocabulary, config or token ids than the
            first; a tensor is not finite, or integers differ.
        LambdasError: As `interpolate`.
        OutputError: The folder holds something other than a soup, or cannot be written.
    """
    if isinstance(models, (str, Path)) or not models:
        raise LambdasError("interpolate_checkpoints takes a list or a dict of models")
    if dtype is not None and dtype not in _NAMES:
        raise CheckpointError(f"dtype is {dtype}, must be one of {[str(known) for known in _NAMES]}")
    named = models if isinstance(models, Mapping) else {f"{i} {Path(str(m)).name}": m for i, m in enumerate(models)}
    (row,) = weights_of(lambdas, len(named), normalize, extrapolate, any_sum=False)
    checkpoints = _without_unread([_open(str(source)) for source in named.values()])
    first, *others = checkpoints
    for other in others:
        _check_alike(first, other)
    weighted = [(checkpoint, weight) for checkpoint, weight in zip(checkpoints, row, strict=True) if weight]

    with whole_folder(out, SOUP_FILE) as partial, ThreadPoolExecutor(1) as pool:
        hashes = [pool.submit(_hashes, checkpoint) for checkpoint in checkpoints]  # beside the writing
        copy_files(first.folder, _COPIED, partial)
        _write_weights(first, weighted, dtype, partial, progress)
        _write_config(partial / "config.json", dtype)
        ingredients = [
            {
                "name": name,
                "source": published(c.source),
                "revision": c.revision,
                "sha256": sha256.result(),
                "lambda": w,
            }
            for name, c, sha256, w in zip(named, checkpoints, hashes, row, strict=True)
        ]
        versions = {name: version(name) for name in ("rsoups", "torch", "safetensors")}
        _write_json(partial / SOUP_FILE, {"method": "full weights", "ingredients": ingredients, "versions": versions})
    return Path(out)


def _write_config(path: Path, dtype: torch.dtype | None) -> None:
    """The first model's config, with another dtype if one is asked for, and without the path that it was once read from."""
    config = _read_json(path)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if config.pop("_name_or_path", None) is not None or dtype is not None:
        _write_json(path, config)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def _hashes(checkpoint: _Checkpoint) -> dict[str, str]:
    return {name: sha256_of(checkpoint.folder / name) for name in sorted(checkpoint.handles)}


# --- reading ---------------------------------------------------------------------------------------------------------


def _open(source: str) -> _Checkpoint:
    folder, revision = Path(resolve(source)).expanduser(), None
    if not folder.is_dir():
        fetched = from_hub(source, (*_COPIED, "*.safetensors", _INDEX))
        if fetched is None:
            raise CheckpointError(
                f"no model folder {source!r}, and it is no Hub id (user/name or user/name@revision) either"
            )
        folder, revision = fetched
    config = _read_json(folder / "config.json")

    names = [_ONE_FILE] if (folder / _ONE_FILE).is_file() else []
    if (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / _INDEX} has no weight_map of tensors and files")
        names = sorted(set(weight_map.values()))
    if not names:
        copy = converted(source)
        if copy is not None:
            return replace(_open(str(copy)), source=source, revision=revision)
        remedy = why_not(source)
        raise CheckpointError(f"{source} holds neither {_ONE_FILE} nor {_INDEX}{f': {remedy}' if remedy else ''}")

    handles, files, kinds = {}, {}, {}
    for name in names:
        path = _inside(folder, name)
        try:
            handles[name] = file = safe_open(path, "pt", backend="pread")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(key)
                files[key], kinds[key] = name, (view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is corrupt or not a safetensors file ({error}); copy it again") from None
    return _Checkpoint(source, folder, revision, config, files, kinds, handles)


def _inside(folder: Path, name: str) -> Path:
    """A file that an index names: in the folder itself, or where the Hub's cache keeps its contents."""
    path = (folder / name).resolve()
    homes = {folder.resolve()}
    if folder.parent.name == "snapshots":
        homes.add(folder.parent.parent.resolve() / "blobs")
    if Path(name).name != name or path.parent not in homes:
        raise CheckpointError(f"{folder / _INDEX} names {name!r}, which is not a file of its folder")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}: is it a model's folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not an object of fields")
    return data


# --- checking --------------------------------------------------------------------------------------------------------


def _check_alike(first: _Checkpoint, other: _Checkpoint) -> None:
    """Refuse models that do not add up, before anything is written."""
    pair = f"{first.source} and {other.source}"
    one, two = _comparable_config(first), _comparable_config(other)
    for key in sorted(one.keys() | two.keys()):
        if one.get(key) != two.get(key):
            raise CheckpointError(f"config.json: {key} differs between {pair}: {one.get(key)!r} and {two.get(key)!r}")
    if difference := sorted(first.kinds.keys() ^ other.kinds.keys()):
        raise CheckpointError(f"only one of {pair} holds {difference[0]} ({len(difference)} such tensors)")

    for key, (kind, shape) in first.kinds.items():
        other_kind, other_shape = other.kinds[key]
        if shape != other_shape:
            raise CheckpointError(
                f"{key} has shapes {shape} and {other_shape} in {pair}: their sizes or vocabularies differ"
            )
        if kind != other_kind and not {kind, other_kind} <= _DTYPES.keys():
            raise CheckpointError(f"{key} is {kind} and {other_kind} in {pair}")
    _check_tokens(first, other)


def _comparable_config(checkpoint: _Checkpoint) -> dict[str, Any]:
    """A config as transformers reads it, whatever version wrote it; as it is written where transformers does not have it."""
    config = checkpoint.transformers_config()
    return _comparable(checkpoint.config if config is None else config.to_dict())


def _comparable(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {str(name): _comparable(inner, str(name)) for name, inner in value.items() if name not in _FREE}
    return [value] if key.endswith("_token_id") and isinstance(value, int) else value


def _without_unread(checkpoints: list[_Checkpoint]) -> list[_Checkpoint]:
    """Models without the tensors that only some of them hold and transformers does not read.

    Those are buffers that it computes anew, and the stored copy of a head that is tied to the embeddings.
    """
    in_all = set.intersection(*(set(c.kinds) for c in checkpoints))
    return [
        replace(c, kinds={key: kind for key, kind in c.kinds.items() if key in in_all or _is_read(c, key)})
        for c in checkpoints
    ]


def _is_read(checkpoint: _Checkpoint, key: str) -> bool:
    config = checkpoint.transformers_config()
    model = skeleton((config.architectures or [""])[0], config) if config is not None else None
    if model is None:
        return not _BUFFER.fullmatch(key)
    source = dict(model.all_tied_weights_keys).get(key)
    if source in checkpoint.kinds:
        return not torch.equal(checkpoint.tensor(key), checkpoint.tensor(source))
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    names = {key, rename_source_key(key, renamings, [], model.base_model_prefix, model.state_dict())[0]}
    return not (_BUFFER.fullmatch(key) and not names & model.state_dict().keys())


def _check_tokens(first: _Checkpoint, other: _Checkpoint) -> None:
    """Token ids must mean the same: in generation_config.json, and in the vocabularies where both have a tokenizer."""
    pair = f"{first.source} and {other.source}"
    name = "generation_config.json"
    if all((c.folder / name).is_file() for c in (first, other)):
        ours, theirs = _read_json(first.folder / name), _read_json(other.folder / name)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            if _comparable(ours.get(key), key) != _comparable(theirs.get(key), key):
                raise CheckpointError(f"{name}: {key} differs between {pair}: {ours.get(key)} and {theirs.get(key)}")
    if all((c.folder / "tokenizer_config.json").is_file() for c in (first, other)):
        one, two = (AutoTokenizer.from_pretrained(c.folder).get_vocab() for c in (first, other))
        if one != two:
            token = sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))[0]
            raise CheckpointError(
                f"the vocabularies of {pair} differ: {len(one)} and {len(two)} tokens, {token!r} is {one.get(token)} and "
                f"{two.get(token)}"
            )


# --- writing ---------------------------------------------------------------------------------------------------------


def _write_weights(
    first: _Checkpoint, weighted: _Weighted, dtype: torch.dtype | None, folder: Path, progress: bool
) -> None:
    from tqdm.auto import tqdm

    def kind_of(key: str) -> str:
        kind = weighted[0][0].kinds[key][0]
        return _NAMES[dtype] if dtype is not None and kind in _DTYPES else kind

    def blocks(key: str) -> Iterator[Tensor]:
        for block in _blocks(weighted, key):
            yield _average(block, key, _DTYPES.get(kind_of(key)))
        bar.update()

    total = 0
    with tqdm(total=len(first.kinds), unit="tensor", disable=not progress, desc="interpolate") as bar:
        for name in first.handles:
            layout = {key: (kind_of(key), shape) for key, (_, shape) in first.kinds.items() if first.files[key] == name}
            total += tensor_files.write(folder / name, layout, blocks)[0]
    if (first.folder / _INDEX).is_file():
        index = _read_json(first.folder / _INDEX)
        index["metadata"] = (index.get("metadata") or {}) | {"total_size": total}
        index["weight_map"] = {key: file for key, file in index["weight_map"].items() if key in first.kinds}
        _write_json(folder / _INDEX, index)


def _blocks(weighted: _Weighted, key: str) -> Iterator[list[tuple[Tensor, float]]]:
    """One tensor of all models, some rows at a time."""
    shape = weighted[0][0].kinds[key][1]
    try:
        if not shape:
            yield [(checkpoint.tensor(key), weight) for checkpoint, weight in weighted]
            return
        views = [(checkpoint.handles[checkpoint.files[key]].get_slice(key), weight) for checkpoint, weight in weighted]
        step = max(1, _BLOCK // max(math.prod(shape[1:]), 1))
        for start in range(0, shape[0], step):
            yield [(view[start : min(start + step, shape[0])], weight) for view, weight in views]
    except SafetensorError as error:
        raise CheckpointError(f"cannot read tensor {key}: {error}") from None


def _average(block: list[tuple[Tensor, float]], key: str, dtype: torch.dtype | None) -> Tensor:
    (first, weight), *rest = block
    if dtype is None:  # integers, masks
        if any(not torch.equal(first, tensor) for tensor, _ in rest):
            raise CheckpointError(f"{key} is not floating-point, and differs between the models")
        return first
    if not rest and weight == 1.0:
        result = first.to(dtype)
    else:
        total = first.double() * weight
        for tensor, weight in rest:
            total += tensor.double() * weight
        result = total.to(dtype)
    if not tensor_files.is_finite(result):
        whole = all(tensor_files.is_finite(tensor) for tensor, _ in block)
        raise CheckpointError(f"{key} {f'does not fit into {dtype}' if whole else 'holds NaN or infinity'}")
    return result
