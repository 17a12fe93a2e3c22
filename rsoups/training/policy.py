"""The policy that a run trains: a base with a fresh LoRA adapter, or with an adapter that exists; its LoRA layers' forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from trl import ModelConfig, get_quantization_config

from rsoups.adapters.adapter import read_adapter
from rsoups.bases.load import base_config, load_base
from rsoups.bases.names import check_base
from rsoups.common.assets import resolve


def load_policy(
    model: ModelConfig,
    adapter: str | None = None,
    *,
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, LoraConfig | None]:
    """Load the base, and the adapter to train on where there is one.

    Args:
        model: Base, its revision, dtype and quantization, and a fresh LoRA's settings. A dtype of None is that of a base which
            is published in bfloat16 (no product then casts its weights anew), and float32 for any other one.
        adapter: Folder or Hub id of an adapter to train on.
        allow_base_mismatch: Accept an adapter that names another base.
        trust_remote_code: Run Python code that comes with the base.

    Returns:
        The base and a fresh LoRA's config; or a PeftModel of the base with the adapter, and None.

    Raises:
        AdapterError: The adapter cannot be read, or is of another base.
    """
    name = str(model.model_name_or_path)
    source: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": model.model_revision}
    dtype: Any = model.dtype
    if dtype is None:
        published = base_config(name, **source).get_text_config().dtype
        dtype = published if published == torch.bfloat16 else torch.float32
    base = load_base(
        name,
        **source,
        dtype=dtype,
        attn_implementation=model.attn_implementation,
        quantization_config=get_quantization_config(model),
    )
    if adapter is None:
        return base, LoraConfig(
            task_type="CAUSAL_LM",
            r=model.lora_r,
            lora_alpha=model.lora_alpha,
            lora_dropout=model.lora_dropout,
            target_modules=model.lora_target_modules or "all-linear",
            use_rslora=model.use_rslora,
        )

    # read_adapter first: PEFT would open a pickle, and train on an adapter that no soup can hold.
    start = read_adapter(resolve(adapter))
    check_base([(adapter, start.config)], model.model_name_or_path, allow_base_mismatch, model.model_revision)
    return PeftModel.from_pretrained(base, str(start.folder), is_trainable=True, config=start.config), None


def name_base(policy: Any, model: ModelConfig) -> None:
    """Let the adapter's config name its base as the user did, not by a path of this machine."""
    config = policy.peft_config["default"]
    config.base_model_name_or_path = model.model_name_or_path
    config.revision = model.model_revision


def reset_adapter(model: PeftModel, seed: int) -> None:
    """Draw a fresh LoRA adapter's weights anew from `seed`: A as PEFT initializes it, B zero.

    Adapters that will share a soup should share their start (Ramé et al. 2023, section 2.2), while each run keeps its
    own seed for data and sampling.
    """
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: torch.manual_seed would seed every GPU's sampling too.
        torch.default_generator.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name in module.active_adapters:
                    _reset(module, name)


def _reset(module: LoraLayer, name: str) -> None:
    """Reset one adapter's factors on the CPU, so that every device starts from the same numbers."""
    factors = [kind[name] for kind in (module.lora_A, module.lora_B) if name in kind]
    parameters = [parameter for factor in factors for parameter in factor.parameters()]
    parameters += [kind[name] for kind in (module.lora_embedding_A, module.lora_embedding_B) if name in kind]

    devices = [parameter.device for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.cpu()
    module.reset_lora_parameters(name, init_lora_weights=True)
    for parameter, device in zip(parameters, devices, strict=True):
        parameter.data = parameter.data.to(device)


def fuse_lora(model: PeftModel) -> None:
    """Let plain LoRA layers compute W x + s B A x with two products and one addition to the first one's result.

    PEFT's own forward makes three more passes over tensors of the layer's output, forward and backward. It stays for whatever
    is not plain: several active adapters, dropout, DoRA, biases, quantized bases, merged or switched-off adapters.
    """
    for module in model.modules():
        if type(module) is LoraLinear and type(module.base_layer) is nn.Linear:
            module.forward = FusedLora(module)  # type: ignore[method-assign]


class FusedLora:
    """The forward of one LoRA layer.

    Attributes:
        in_base: Whether the base layer's weight includes the adapter at the moment.
    """

    def __init__(self, module: Any):
        self.in_base = False
        self._module, self._pefts = module, module.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output (..., out) of `x` (..., in)."""
        module = self._module
        if self.in_base:
            return cast(Tensor, module.base_layer(x))
        name = self.plain_adapter()
        if name is None or args or kwargs:
            return cast(Tensor, self._pefts(x, *args, **kwargs))
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
        if x.dtype != down.dtype and not torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, self._pefts(x))

        result = module.base_layer(x)
        low_rank = nn.functional.linear(x, down).flatten(0, -2)
        return torch.addmm(result.flatten(0, -2), low_rank, up.t(), alpha=module.scaling[name]).view_as(result)

    def plain_adapter(self) -> str | None:
        """Return the only active adapter's name, if the layer adds nothing but its product."""
        module = self._module
        names = [name for name in module.active_adapters if name in module.lora_A]
        if module.disable_adapters or module.merged or len(names) != 1 or names[0] in module.lora_variant:
            return None
        name: str = names[0]
        noisy = module.training and getattr(module.lora_dropout[name], "p", 0)
        return None if noisy or module.lora_B[name].bias is not None else name

    def base_weight(self) -> nn.Parameter:
        """Return the base layer's weight, (out, in)."""
        return cast(nn.Parameter, self._module.base_layer.weight)

    def whole_weight(self, name: str) -> Tensor:
        """Return the base layer's weight with an adapter added, (out, in)."""
        module = self._module
        factors = module.lora_B[name].weight.data, module.lora_A[name].weight.data
        return torch.addmm(self.base_weight().data, *factors, alpha=module.scaling[name])


@contextmanager
def adapter_in_base(model: PeftModel) -> Iterator[None]:
    """A context in which float32 weights of the base include the active adapter: generation then costs what the base's does.

    Needs `fuse_lora`. Other layers stay as they are: in bfloat16 the sum would lose small changes. The weights come back bit by
    bit; meanwhile they exist twice.
    """
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    kept: list[tuple[FusedLora, Tensor]] = []
    try:
        for forward in forwards:
            if not isinstance(forward, FusedLora):
                continue
            weight, name = forward.base_weight(), forward.plain_adapter()
            is_tied = holders[id(weight)] > 1  # embeddings must not get the head's adapter
            if name is None or is_tied or weight.dtype != torch.float32:
                continue
            kept.append((forward, weight.data))
            weight.data = forward.whole_weight(name)
            forward.in_base = True
        yield
    finally:
        for forward, own in kept:
            forward.base_weight().data, forward.in_base = own, False
