"""Changes of layers with λ as an input: B·(λ·A·x), with λ of each row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rsoups.adapters.adapter import Adapter
from rsoups.common.errors import AdapterError, LambdasError
from rsoups.soups.attach import output_scale

# Layers that read one input in the usual architectures: their A are one matmul. Where they read several, `Mix` notices.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(eq=False)
class Inputs:
    """The part that layers of one input share: the A of every adapter, one below the other.

    Attributes:
        A: (Σr, in); of an embedding (vocabulary, Σr).
        ranks: Rank of each adapter, for each layer; 0 if the adapter has none there.
        embedding: Whether the layers are embeddings, so that x are token ids.
    """

    A: Tensor
    ranks: tuple[tuple[int, ...], ...]
    embedding: bool

    def __call__(self, x: Tensor) -> Tensor:
        """A·x, (..., Σr)."""
        if self.embedding:
            return nn.functional.embedding(x, self.A)
        return nn.functional.linear(x if x.dtype == self.A.dtype else x.to(self.A.dtype), self.A)


class Mix:
    """λ of a call, and results that its layers share.

    Attributes:
        lambdas: (B, N) or (1, N), float32.
    """

    def __init__(self, lambdas: Tensor):
        self.lambdas = lambdas
        self._columns: dict[tuple[Any, ...], Tensor] = {}
        self._last: tuple[Inputs, Tensor, Tensor] | None = None

    def low(self, inputs: Inputs, x: Tensor) -> Tensor:
        """λ·A·x, (..., Σr)."""
        # q_proj, k_proj and v_proj are called one after the other with the same tensor object: the first computes this for
        # all three. Identity is enough, and costs nothing: `_last` holds x, so that no other tensor can take its place in
        # memory; and a layer that reads another tensor after all computes its own.
        if self._last is None or self._last[0] is not inputs or self._last[1] is not x:
            low = inputs(x)
            self._last = inputs, x, low * self.columns(inputs, low)
        return self._last[2]

    def columns(self, inputs: Inputs, like: Tensor) -> Tensor:
        """λi once for each row of adapter i's A: (rows, 1, Σr), or (1, 1, Σr) for one λ of all rows."""
        # By the ranks, not by the layers: most layers of a model share them.
        key = inputs.ranks, like.shape[0], like.dim(), like.dtype, like.device
        if key not in self._columns:
            adapters = [i for ranks in inputs.ranks for i, rank in enumerate(ranks) for _ in range(rank)]
            rows = self.rows(like.shape[0])[:, adapters].to(like.device, like.dtype)
            self._columns[key] = rows if like.dim() == 2 else rows.unsqueeze(1)
        return self._columns[key]

    def rows(self, rows: int) -> Tensor:
        """λ of each row of a batch. Generation repeats a prompt's row for several sequences or beams."""
        if len(self.lambdas) in (1, rows):
            return self.lambdas
        if rows % len(self.lambdas):
            raise LambdasError(f"{len(self.lambdas)} rows of λ for a batch of {rows}: one for all, or one for each row")
        return self.lambdas.repeat_interleave(rows // len(self.lambdas), dim=0)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch."""
        if len(self.lambdas) > 1:
            self.lambdas = self.lambdas[rows.to(self.lambdas.device)]
            self._columns, self._last = {}, None


@dataclass(eq=False)
class Change:
    """The change that a soup adds to one layer.

    Attributes:
        path: Name of the layer in the base.
        inputs: A of this layer and of those that read the same input; this layer's are rows `start` to `stop`.
        ranks: Rank of each adapter.
        B: (Σr, out), transposed, with the adapters' scalings.
        bias: (N, out), scaled too, or None.
        output_scale: Factor that the layer multiplies its output by, for some embeddings.
        averages: Whether the method is ``factors``: Σ λi·Ai first, then each Bi of it.
    """

    path: str
    inputs: Inputs
    start: int
    stop: int
    ranks: tuple[int, ...]
    B: Tensor
    bias: Tensor | None
    output_scale: float
    averages: bool

    def __post_init__(self) -> None:
        scaled = self.B if self.output_scale == 1 else self.B * self.output_scale
        self._scaled_B = scaled

    def add_to(self, output: Tensor, x: Tensor, mix: Mix) -> Tensor:
        """The layer's output with the change of its input, in place if nothing needs the old one."""
        if x.dim() == 2 and len(mix.lambdas) > 1 and not self.inputs.embedding:
            raise LambdasError(f"layer {self.path} does not keep the rows of a batch apart: use one λ for all of them")
        low = mix.low(self.inputs, x)[..., self.start : self.stop]
        if self.averages:
            count = len(self.ranks)
            low = low.unflatten(-1, (count, -1)).sum(-2).repeat(*[1] * (low.dim() - 1), count)
            low = low * mix.columns(self.inputs, low)[..., self.start : self.stop]

        if self.bias is not None:
            bias = mix.rows(x.shape[0]).to(self.bias.device, self.bias.dtype) @ self.bias
            output = output + (bias if output.dim() == 2 else bias.unsqueeze(1)).to(output.dtype)
        if output.dtype != low.dtype:
            return output + (low @ self._scaled_B).to(output.dtype)
        flat = output.flatten(0, -2), low.flatten(0, -2), self._scaled_B
        if torch.is_grad_enabled() or not output.is_contiguous():
            return torch.addmm(*flat).view_as(output)
        flat[0].addmm_(*flat[1:])  # a view of the output, which the layer has just made
        return output

    def merged(self, layer: Any, row: Tensor) -> dict[str, Tensor]:
        """The layer's parameters at one λ. Sums are in float32, rounded once."""
        weight = layer.weight
        columns = row.repeat_interleave(torch.tensor(self.ranks)).to(weight.device)[:, None]
        A = self.inputs.A.T if self.inputs.embedding else self.inputs.A[self.start : self.stop]
        A = A.float() * columns
        if self.averages:
            A = A.unflatten(0, (len(self.ranks), -1)).sum(0).repeat(len(self.ranks), 1) * columns
        delta = self.B.float().T @ A  # (out, in)
        if isinstance(layer, (Conv1D, nn.Embedding)):
            delta = delta.T

        parameters = {"weight": (weight.float() + delta).to(weight.dtype)}
        if self.bias is not None:
            bias = row.to(self.bias.device) @ self.bias.float()
            if layer.bias is not None:
                bias = bias + layer.bias.float()
            parameters["bias"] = bias.to(weight.dtype)
        return parameters


def changes_of(model: PreTrainedModel, adapters: Sequence[Adapter], averages: bool) -> list[Change]:
    """Return the changes of all adapted layers, in the base's precision.

    Args:
        model: The base.
        adapters: The ingredients, in λ's order.
        averages: As of `Change`.

    Raises:
        AdapterError: The base lacks a layer, or has one of another shape or of a kind that no change can be added to.
    """
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.modules))
    for path in paths:
        output_scale(layer_at(model, path), path, model)
        _check_shape(layer_at(model, path), path, adapters)
    return [change for group in _of_one_input(paths) for change in _stacked(model, adapters, group, averages)]


def _stacked(model: PreTrainedModel, adapters: Sequence[Adapter], paths: list[str], averages: bool) -> list[Change]:
    """The changes of layers that read one input, their A stacked."""
    first: Any = layer_at(model, paths[0])
    dtype = first.weight.dtype if first.weight.dtype.is_floating_point else model.dtype
    to = {"device": first.weight.device, "dtype": dtype}
    modules = {path: [(adapter, adapter.modules.get(path)) for adapter in adapters] for path in paths}
    embedding = any(module.embedding for _, module in modules[paths[0]] if module)

    A = torch.cat([a.tensor(m.A).float() for path in paths for a, m in modules[path] if m])
    ranks = tuple(tuple(module.rank if module else 0 for _, module in modules[path]) for path in paths)
    inputs = Inputs((A.T.contiguous() if embedding else A).to(**to), ranks, embedding)
    stops = list(accumulate(sum(each) for each in ranks))

    changes = []
    for path, stop, own in zip(paths, stops, ranks, strict=True):
        B = torch.cat([a.tensor(m.B).float() * m.scaling for a, m in modules[path] if m], dim=1)
        bias = None
        if any(module and module.bias for _, module in modules[path]):
            none = torch.zeros(len(B))
            rows = [a.tensor(m.bias).float() * m.scaling if m and m.bias else none for a, m in modules[path]]
            bias = torch.stack(rows).to(**to)
        scale = output_scale(layer_at(model, path), path, model)
        changes.append(Change(path, inputs, stop - sum(own), stop, own, B.to(**to).T, bias, scale, averages))
    return changes


def _of_one_input(paths: list[str]) -> list[list[str]]:
    """Layers, grouped by the input that they read as far as their names tell."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        siblings = next((names for names in _SIBLINGS if name in names), name)
        groups.setdefault((parent, siblings), []).append(path)
    return list(groups.values())


def layer_at(model: PreTrainedModel, path: str) -> nn.Module:
    """A layer of the base by its name."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"the base {type(model).__name__} has no layer {path}") from None


def _check_shape(layer: nn.Module, path: str, adapters: Sequence[Adapter]) -> None:
    # Not the shape of the weight, which may be packed into 4 bit.
    if isinstance(layer, nn.Linear):
        shape = layer.out_features, layer.in_features
    elif isinstance(layer, nn.Embedding):
        shape = layer.embedding_dim, layer.num_embeddings
    else:
        weight: Any = layer.weight
        shape = tuple(reversed(weight.shape))
    for adapter in adapters:
        module = adapter.modules.get(path)
        if module is not None and module.shape != shape:
            raise AdapterError(f"{path} is {shape} in the base, and the one of {adapter.source} is {module.shape}")
