"""Tensors of a soup that are made piece by piece, when they are asked for, from the ingredients' files.

So a soup can be saved without being held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rsoups.adapters.adapter import Adapter
from rsoups.adapters.tensor_files import in_blocks, rows_of_pieces


class Part(NamedTuple):
    """A tensor of an ingredient, and what multiplies it."""

    adapter: Adapter
    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Blend:
    """One tensor of a soup, and how it is made.

    Attributes:
        how: `one_below_another`, `side_by_side` or `summed`.
        parts: Tensors of the ingredients.
        shape, dtype: Shape and dtype of the result.
        experts: Number of groups of rows; each group holds the rows of all parts for one expert.
    """

    how: Callable[[Blend], Iterator[Tensor]]
    parts: list[Part]
    shape: tuple[int, ...]
    dtype: torch.dtype
    experts: int = 1

    @property
    def bound(self) -> float:
        """A bound on the magnitudes in it, but for rounding."""
        return math.fsum(abs(part.factor) * part.adapter.largest for part in self.parts)

    def pieces(self) -> Iterator[Tensor]:
        """The tensor, some rows at a time. Products and sums are in float64, rounded once."""
        return self.how(self)

    def tensor(self) -> Tensor:
        """The whole tensor."""
        whole = torch.empty(math.prod(self.shape), dtype=self.dtype)
        at = 0
        for piece in self.pieces():
            whole[at : at + piece.numel()].copy_(piece.reshape(-1))
            at += piece.numel()
        return whole.view(self.shape)


def pieces_of(tensor: Blend | Tensor) -> Iterable[Tensor]:
    """The tensor, some rows at a time."""
    return tensor.pieces() if isinstance(tensor, Blend) else (tensor,)


def one_below_another(blend: Blend) -> Iterator[Tensor]:
    """Rows of all parts, expert by expert; the factors are 1."""
    for expert in range(blend.experts):
        for part in blend.parts:
            if blend.experts == 1:
                pieces = part.adapter.pieces(part.name)
            else:
                rank = part.adapter.layout[part.name].shape[0] // blend.experts
                pieces = iter([part.adapter.rows(part.name, expert * rank, (expert + 1) * rank)])
            for piece in pieces:
                yield piece if piece.dtype == blend.dtype else _computed(blend, [piece], lambda block: block)


def side_by_side(blend: Blend) -> Iterator[Tensor]:
    """Columns of all parts, times their factors."""
    widths = [part.adapter.layout[part.name].shape[1] for part in blend.parts]
    rows = rows_of_pieces((blend.shape[0], sum(widths)))
    for pieces in zip(*(part.adapter.pieces(part.name, rows) for part in blend.parts), strict=True):
        out = torch.empty(len(pieces[0]), sum(widths), *blend.shape[2:], dtype=blend.dtype)
        for columns, piece, part in zip(out.split(widths, dim=1), pieces, blend.parts, strict=True):
            for target, block in in_blocks(columns, piece):
                target.copy_(_times(block, part.factor))
        yield out


def summed(blend: Blend) -> Iterator[Tensor]:
    """The sum of all parts times their factors; 0 where there are none."""
    if not blend.parts:
        yield torch.zeros(blend.shape, dtype=blend.dtype)
        return

    def total(*blocks: Tensor) -> Tensor:
        result = _times(blocks[0], blend.parts[0].factor)
        for block, part in zip(blocks[1:], blend.parts[1:], strict=True):
            result.add_(block.double(), alpha=part.factor)
        return result

    for pieces in zip(*(part.adapter.pieces(part.name) for part in blend.parts), strict=True):
        yield _computed(blend, pieces, total)


def _computed(blend: Blend, pieces: Sequence[Tensor], function: Callable[..., Tensor]) -> Tensor:
    """A piece of a blend, from the same pieces of its parts."""
    out = torch.empty(pieces[0].shape, dtype=blend.dtype)
    for target, *blocks in in_blocks(out, *pieces):
        target.copy_(function(*blocks))
    return out


def _times(block: Tensor, factor: float) -> Tensor:
    return block.to(torch.float64, copy=True).mul_(factor)
