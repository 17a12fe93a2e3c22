"""Put a soup on its loaded base, for good or for a while. Every tensor is checked; the base comes back bit for bit."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rsoups.adapters.adapter import BASE_EMBEDDING, EMBEDDINGS, is_copy
from rsoups.adapters.layer_names import PREFIX, as_loaded, current_names
from rsoups.bases.names import check_base
from rsoups.common.errors import AdapterError

if TYPE_CHECKING:
    from rsoups.soups.soup import Soup

_PLAIN = (nn.Linear, Conv1D, nn.Embedding)


# --- methods of Soup -------------------------------------------------------------------------------------------------


def load(soup: Soup, base: PreTrainedModel, *, resize: bool = False, allow_base_mismatch: bool = False) -> PeftModel:
    """Attach the soup to its base for good; `attached` does so for a while.

    Args:
        soup: The soup.
        base: The loaded base. If it is refused, it is as it was.
        resize: Give the base as many tokens as the soup has, if the soup holds the embeddings and the head of all of them.
        allow_base_mismatch: Accept a base of another name than the adapters'.

    Raises:
        AdapterError: `base` already carries an adapter, or lacks a module of the soup, or has more or other-shaped ones;
            or it is not the base that the adapters name.
    """
    _check_plain_model(base)
    before = _Before(base)
    try:
        return _put_on(soup, base, before, resize, allow_base_mismatch)
    except BaseException:
        before.restore()
        raise


@contextmanager
def attached(
    soup: Soup, base: PreTrainedModel, *, resize: bool = False, allow_base_mismatch: bool = False
) -> Iterator[PeftModel]:
    """A context in which the soup is on its base. The base comes back exactly as it was, however the context ends.

    Args:
        soup, base, resize, allow_base_mismatch: As `load`.

    Raises:
        AdapterError: As `load`; and within the context, where PEFT would merge the soup into the base.
    """
    _check_plain_model(base)
    before = _Before(base)
    try:
        model = _put_on(soup, base, before, resize, allow_base_mismatch)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge = _refuse_merging  # type: ignore[method-assign]
        yield model
    finally:
        before.restore()


def _refuse_merging(*_: Any, **__: Any) -> None:
    raise AdapterError(
        "the base is to come back as it was, and merging would write into its weights: use Soup.merge, or Soup.load"
    )


def _check_plain_model(base: Any) -> None:
    if isinstance(base, PeftModel) or getattr(base, "_hf_peft_config_loaded", False):
        raise AdapterError("the base already carries an adapter; load the soup on the plain model")


# --- a base as it was ------------------------------------------------------------------------------------------------


class _Before:
    """A model as it is now: modules, parameters, buffers, hooks, settings. `restore` puts back the same objects.

    Quantized layers are left alone: they pack their weights anew when they are first used, and nothing is written into them.
    """

    def __init__(self, model: PreTrainedModel):
        packed = {m for m in model.modules() if any(not p.is_floating_point() for p in m.parameters(recurse=False))}
        modules = [module for module in model.modules() if module not in packed]
        configs = [c for m in modules if isinstance(c := getattr(m, "config", None), PreTrainedConfig)]
        if hasattr(model, "config"):
            configs.append(model.config.get_text_config())
        self._objects = [(each, _contents(each)) for each in [*modules, *{id(c): c for c in configs}.values()]]
        self._tensors = [(tensor, tensor.data, tensor.requires_grad) for tensor in model.parameters()]
        self._values: list[tuple[Tensor, Tensor]] = []

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of those of the model's parameters that are among these tensors, which are written into."""
        places = {tensor.data_ptr() for tensor in tensors}
        own = [tensor.data for tensor, _, _ in self._tensors if tensor.data_ptr() in places]
        self._values += [(data, data.clone()) for data in own]

    def restore(self) -> None:
        """Put everything back."""
        for each, contents in self._objects:
            vars(each).clear()
            for name, (value, inner) in contents.items():
                if inner is not None:  # the same dictionary again: handles of hooks refer to it
                    value.clear()
                    value.update(inner)
                vars(each)[name] = value
        for tensor, data, trainable in self._tensors:
            if tensor.is_floating_point():
                tensor.data = data
                tensor.requires_grad_(trainable)
        for data, values in self._values:
            data.copy_(values)


def _contents(each: Any) -> dict[str, tuple[Any, Any]]:
    """The attributes of an object, dictionaries and sets with copies of what they hold."""
    mutable = (dict, OrderedDict, set)
    return {name: (value, copy(value) if type(value) in mutable else None) for name, value in vars(each).items()}


# --- attaching -------------------------------------------------------------------------------------------------------


def _put_on(soup: Soup, base: PreTrainedModel, before: _Before, resize: bool, allow_base_mismatch: bool) -> PeftModel:
    """Attach, and check that every tensor arrives: PEFT only warns where a base is deeper or a module is missing."""
    check_base(soup.named_configs, base, allow_base_mismatch)
    _fit_vocabulary(soup, base, resize)
    names = current_names(base, soup.state_dict)
    # As PEFT has them once it has converted them for this base: named, and fused, as its layers are.
    _, state = as_loaded(base, soup.config, {new: soup.state_dict[name] for new, name in names.items()})
    model = _with_fresh_adapter(soup, base)

    saved = soup.config.modules_to_save or ()
    with_embeddings = any(
        key.endswith(BASE_EMBEDDING) or (key.endswith(EMBEDDINGS) and key.split(".")[-2] not in saved) for key in state
    )
    wanted = _state_of(model, with_embeddings, state)
    _check_fit(state, wanted)
    before.keep(wanted.values())  # biases, and whole tables of tokens, are written where the base has them

    set_peft_model_state_dict(model, dict(state))
    for key, loaded in _state_of(model, with_embeddings, state).items():
        if not torch.equal(loaded.cpu(), state[key].to(loaded.dtype)):
            raise AdapterError(f"PEFT did not load tensor {key} as it is in the soup")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train(base.training)  # PEFT makes layers in training mode, whatever the base's is
    return model


def _with_fresh_adapter(soup: Soup, base: PreTrainedModel) -> PeftModel:
    config = deepcopy(soup.config)
    config.base_model_name_or_path = None  # PEFT puts this base's in, and warns where there was another
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`lora_bias=True` was passed")  # about PEFT's merging, which is not used
            model = get_peft_model(base, config)
    except ValueError as error:
        raise AdapterError(f"the soup does not fit this base: {error}") from None
    finally:
        if getattr(base, "peft_config", None) is not None:
            del base.peft_config  # PEFT leaves it behind and would warn at the next load
    model.peft_config["default"].base_model_name_or_path = soup.config.base_model_name_or_path
    return model


def _state_of(model: PeftModel, with_embeddings: bool, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT saves them, each once, without the base's own ones that the soup leaves as they are."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=with_embeddings)
    ours = (".bias", BASE_EMBEDDING)
    own = {key for key in tensors if key.endswith(ours) and ".lora_" not in key and key not in state}
    return {key: tensor for key, tensor in tensors.items() if key not in own and not is_copy(key, tensors)}


def _check_fit(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if absent := sorted(state.keys() - wanted.keys()):
        raise AdapterError(f"the base has no module for {len(absent)} tensor(s) of the soup, the first is {absent[0]}")
    if extra := sorted(wanted.keys() - state.keys()):
        raise AdapterError(
            f"the base has {len(extra)} targeted module(s) more than the soup, the first is {extra[0]}: is it deeper?"
        )
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            raise AdapterError(
                f"tensor {key} is {tuple(state[key].shape)} in the soup, the base needs {tuple(tensor.shape)}"
            )


# --- new tokens ------------------------------------------------------------------------------------------------------


def _fit_vocabulary(soup: Soup, base: PreTrainedModel, resize: bool) -> None:
    """Give the base as many tokens as a soup that holds the embeddings and the head of all of them.

    Raises:
        AdapterError: The numbers differ, and `resize` is False; or the soup holds only one of the two tables of tokens, so
            that the new rows of the other one are not known.
    """
    try:
        layers: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # no model of texts
        return
    paths = {id(module): path for path, module in base.named_modules()}
    tables = {f"{PREFIX}{paths.get(id(layer))}.weight": layer.weight for layer in layers if layer is not None}
    whole = {key.replace(BASE_EMBEDDING, ".weight"): tensor for key, tensor in soup.state_dict.items()}
    held = [key for key in tables if key in whole]
    unlike = [key for key in held if len(whole[key]) != len(tables[key])]
    if not unlike:
        return

    size, own = tuple(whole[unlike[0]].shape), tuple(next(iter(tables.values())).shape)
    if not resize or len(held) < len(tables):
        remedy = "pass resize=True, or resize" if len(held) == len(tables) else "resize"
        raise AdapterError(
            f"tensor {unlike[0]} is {size} in the soup, the base needs {own}: the vocabularies differ. Where tokens were "
            f"added for the training, {remedy} the base as it was then: base.resize_token_embeddings({size[0]})"
        )
    base.resize_token_embeddings(size[0], mean_resizing=False)


# --- kinds of layers -------------------------------------------------------------------------------------------------


def output_scale(layer: nn.Module, path: str, model: nn.Module) -> float:
    """The factor that a layer multiplies its output by: 1, except for the embeddings of Gemma, BART and the like.

    Raises:
        AdapterError: A layer that is neither linear nor an embedding, or that does more with its weight.
    """
    if not isinstance(layer, _PLAIN):
        raise AdapterError(f"{path} is a {type(layer).__name__}: a live soup covers linear layers and embeddings")
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
        raise AdapterError(
            f"{path} is read inside torch's MultiheadAttention, where no change can be added to its output"
        )
    scale = float(getattr(layer, "embed_scale", 1.0)) if isinstance(layer, nn.Embedding) else 1.0
    if type(layer).forward not in {kind.forward for kind in _PLAIN} and not _is_linear(layer, scale):
        raise AdapterError(
            f"{path} is a {type(layer).__name__}, which does more with its weight than to multiply: no change can be added "
            "to its output or merged into its weight. Train an adapter without this module"
        )
    return scale


@torch.no_grad()
def _is_linear(layer: Any, scale: float) -> bool:
    """Whether a layer with a forward of its own is its weight times its input (times `scale`), tried with one input."""
    weight = layer.weight
    if not weight.is_floating_point() or weight.is_meta or weight.dim() != 2:
        return True  # packed into 8 or 4 bit, or kept elsewhere: the quantizers' layers are linear
    if isinstance(layer, nn.Embedding):
        x = torch.arange(min(4, len(weight)), device=weight.device)[None]
        expected = weight[x] * scale
    else:
        x = torch.randn(1, 2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        x = x.to(weight.device, weight.dtype)
        expected = nn.functional.linear(x, weight, layer.bias)
    try:
        output = layer(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    tolerance = 1e-2 if weight.dtype.itemsize == 2 else 1e-4
    largest = float(expected.abs().max()) or 1.0
    return float((output.float() - expected.float()).abs().max()) <= tolerance * largest
