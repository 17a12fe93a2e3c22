"""Tensors of a soup that are made one by one, when they are asked for, from the ingredients' files.

So a soup can be saved without being held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rsoups.adapters.adapter import Adapter

_READ = 2**20  # numbers that are read at once
_BLOCK = 2**14  # numbers that are multiplied and summed at once: they stay in the processor's cache


class Part(NamedTuple):
    """A tensor of an ingredient, and the factor that it is multiplied by."""

    adapter: Adapter
    name: str
    factor: float = 1.0

    def tensor(self, rows: slice = slice(None)) -> Tensor:
        """The tensor, or some rows of it."""
        return self.adapter.tensor(self.name, rows)

    def times(self, rows: slice = slice(None)) -> Tensor:
        """The tensor, or some rows of it, times its factor, in float64."""
        return self.tensor(rows).to(torch.float64, copy=True).mul_(self.factor)


@dataclass(frozen=True)
class Blend:
    """One tensor of a soup, and how it is made.

    Attributes:
        how: `one_below_another`, `side_by_side` or `summed`.
        parts: Tensors of the ingredients.
        shape, dtype: Shape and dtype of the soup's tensor.
        experts: Number of groups of rows; each group holds the rows of all parts for one expert.
    """

    how: Callable[[Blend], Tensor]
    parts: list[Part]
    shape: tuple[int, ...]
    dtype: torch.dtype
    experts: int = 1

    @property
    def bound(self) -> float:
        """No magnitude in the tensor is larger, except by rounding."""
        return math.fsum(abs(part.factor) * part.adapter.largest for part in self.parts)

    def tensor(self) -> Tensor:
        """The tensor. Products and sums are in float64, rounded once."""
        return self.how(self)


def tensor_of(tensor: Blend | Tensor) -> Tensor:
    """The tensor itself, whether it is made yet or not."""
    return tensor.tensor() if isinstance(tensor, Blend) else tensor


def one_below_another(blend: Blend) -> Tensor:
    """Rows of all parts, expert by expert; the factors are 1."""
    tensors = [part.tensor().to(blend.dtype) for part in blend.parts]
    if len(tensors) == 1:
        return tensors[0].clone()  # the ingredient may keep its own
    if blend.experts == 1:
        return torch.cat(tensors)
    return torch.cat([tensor.unflatten(0, (blend.experts, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def side_by_side(blend: Blend) -> Tensor:
    """Columns of all parts, times their factors."""
    matrix = torch.empty(blend.shape, dtype=blend.dtype)
    widths = [part.adapter.layout[part.name].shape[1] for part in blend.parts]
    for part, columns in zip(blend.parts, matrix.split(widths, dim=1), strict=True):
        tensor = part.tensor()
        for rows in _rows_of(columns, _BLOCK):
            columns[rows] = tensor[rows].to(torch.float64, copy=True).mul_(part.factor)
    return matrix


def summed(blend: Blend) -> Tensor:
    """The sum of all parts times their factors; 0 if there are none."""
    total = torch.zeros(blend.shape, dtype=blend.dtype)
    if not total.dim():
        return total + sum(part.times() for part in blend.parts)
    # Each read is some megabytes of an ingredient, however large the parameter is.
    for rows in _rows_of(total, _READ) if blend.parts else ():
        piece, tensors = total[rows], [part.tensor(rows) for part in blend.parts]
        for block in _rows_of(piece, _BLOCK):
            values = tensors[0][block].to(torch.float64, copy=True).mul_(blend.parts[0].factor)
            for tensor, part in zip(tensors[1:], blend.parts[1:], strict=True):
                values.add_(tensor[block].double(), alpha=part.factor)
            piece[block] = values
    return total


def _rows_of(tensor: Tensor, numbers: int) -> Iterator[slice]:
    """Slices of a tensor's rows, each of about so many numbers."""
    step = max(1, numbers // max(1, math.prod(tensor.shape[1:])))
    return (slice(start, min(start + step, len(tensor))) for start in range(0, len(tensor), step))
