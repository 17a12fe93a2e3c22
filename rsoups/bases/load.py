"""Load base models by folder, Hub id or embedded name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rsoups.common.assets import embedded_name, need, resolve
from rsoups.common.errors import CheckpointError, HubError, RsoupsError
from rsoups.common.files import hub_commit


def base_config(name: str, **options: Any) -> Any:
    """Load the config of a base; errors as of `load_base`."""
    from transformers import AutoConfig

    with _base_of(name):
        return AutoConfig.from_pretrained(resolve(name), **{"trust_remote_code": False, **options})


def load_base(name: str, *, dtype: Any = "auto", device: str | None = None, **options: Any) -> Any:
    """Load a causal language model.

    Args:
        name: Folder, Hub id or ``rsoups/...`` of the base.
        dtype: Type of the weights; by default as `dtype_of` says.
        device: Device that the model will run on, for `dtype_of`; the model is not moved there.
        options: Options of transformers, such as revision; with ``trust_remote_code=True`` the base's own Python code runs.

    Raises:
        CheckpointError: There is no such base, it has only pickles, or it requires custom code.
    """
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": False, "dtype": dtype_of(name, dtype, device), **options}
    if getattr(options.get("quantization_config"), "quant_method", None) == "bitsandbytes":
        need("bitsandbytes", "quantized")
    with _base_of(name, options.get("revision")):
        return from_safetensors(AutoModelForCausalLM.from_pretrained, resolve(name), **options)


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a base; errors as of `load_base`."""
    from transformers import AutoTokenizer

    with _base_of(name, options.get("revision")):
        try:
            return AutoTokenizer.from_pretrained(resolve(name), **{"trust_remote_code": False, **options})
        except (ImportError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"{name!r} has no tokenizer that can be loaded ({reason}): save one there with tokenizer.save_pretrained"
            ) from error


def dtype_of(name: str | None, dtype: Any = "auto", device: str | None = None, *, scores: bool = False) -> Any:
    """The type of weights that a model is loaded in: the one rule for all of rsoups.

    A type other than ``auto`` is used as it is. ``auto`` is float32 in three cases, and otherwise the type of the checkpoint:

    - A model that scores, on any device: in half precision its scores depend on the other rows of the batch.
    - An embedded model: its weights are stored in float16 only to make the package small.
    - Any model on the CPU, where half precision is slow and coarse.

    Args:
        name: Folder, Hub id or ``rsoups/...`` of the model; None for one that is made from others.
        dtype: Torch's type or its name; ``auto`` or None to follow the rule.
        device: Device that the model will run on; by default the GPU if there is one.
        scores: Whether the model is a reward.

    Raises:
        CheckpointError: Torch has no type of this name.
    """
    import torch

    if dtype not in ("auto", None):
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if isinstance(dtype, str) and not isinstance(kind, torch.dtype):
            raise CheckpointError(f"dtype is {dtype!r}, must be auto, float32, bfloat16 or float16")
        return kind
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    in_float32 = scores or (name is not None and embedded_name(name)) or torch.device(device).type == "cpu"
    return torch.float32 if in_float32 else "auto"


def from_safetensors(load: Callable[..., Any], source: str, **options: Any) -> Any:
    """Load a model from safetensors. If it has only pickles, its conversion in the cache is loaded.

    Args:
        load: A `from_pretrained` of transformers.
        source: Folder or Hub id.
        options: Options of `load`.

    Raises:
        OSError: The model cannot be loaded.
    """
    from rsoups.common.pickles import converted

    revision = options.get("revision")
    try:
        loaded = load(source, use_safetensors=True, **options)
    except OSError:
        copy = converted(source, options.pop("revision", None))
        if copy is None:
            raise
        return load(str(copy), use_safetensors=True, **options)

    # transformers 5.23 does not note the commit any more. Without it, files beside the weights (`BaseFiles`) would be those of
    # the branch main, whichever revision was loaded. The config does not save this attribute.
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.config._commit_hash = hub_commit(source, revision)
    return loaded


@contextmanager
def _base_of(name: str, revision: str | None = None) -> Iterator[None]:
    try:
        yield
    except RsoupsError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot load {name!r}: {why_not(name, revision) or error}") from error
    except ValueError as error:  # an unknown kind of model, one that no causal language model is made of, no tokenizer
        if "trust_remote_code" not in str(error):
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"cannot load {name!r}: {reason}") from error
        raise CheckpointError(
            f"{name!r} requires custom code: review it, then pass trust_remote_code=True (on the command line "
            "--trust_remote_code)"
        ) from None


def why_not(source: str, revision: str | None = None) -> str | None:
    """Return the remedy for a model that holds only pickles; None if it failed to load for another reason."""
    from rsoups.common.pickles import holds_only_pickles, remedy

    try:
        return remedy(source, revision) if holds_only_pickles(source, revision) else None
    except (CheckpointError, HubError):
        return None
