"""Load base models, by folder, Hub id or embedded name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rsoups.common.assets import need, resolve
from rsoups.common.errors import CheckpointError, HubError, RsoupsError


def base_config(name: str, **options: Any) -> Any:
    """A base's config; errors as of `load_base`."""
    from transformers import AutoConfig

    with _base_of(name):
        return AutoConfig.from_pretrained(resolve(name), **{"trust_remote_code": False, **options})


def load_base(name: str, **options: Any) -> Any:
    """A causal language model by folder, Hub id or ``rsoups/...``.

    Args:
        name: Folder, Hub id or ``rsoups/...`` of the base.
        options: For transformers: revision, dtype, ...; with ``trust_remote_code=True`` Python code that comes with it runs.

    Raises:
        CheckpointError: It cannot be loaded: there is none, it holds a pickle only, or it asks for code of its own.
    """
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": False, **options}
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


def from_safetensors(load: Callable[..., Any], source: str, **options: Any) -> Any:
    """A model by transformers' own `load`; where it holds only pickles, its conversion in the cache, if there is one.

    Raises:
        OSError: It cannot be loaded.
    """
    from rsoups.common.pickles import converted

    try:
        return load(source, use_safetensors=True, **options)
    except OSError:
        copy = converted(source, options.pop("revision", None))
        if copy is None:
            raise
        return load(str(copy), use_safetensors=True, **options)


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
            f"{name!r} brings Python code of its own; read it, and allow it with trust_remote_code (in Python: =True)"
        ) from None


def why_not(source: str, revision: str | None = None) -> str | None:
    """Return the remedy for a model that holds only pickles; None if it failed to load for another reason."""
    from rsoups.common.pickles import holds_only_pickles, remedy

    try:
        return remedy(source, revision) if holds_only_pickles(source, revision) else None
    except (CheckpointError, HubError):
        return None
