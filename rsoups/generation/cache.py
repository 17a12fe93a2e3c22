"""Keys and values with room for the tokens to come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def reserve(cache: DynamicCache, tokens: int) -> None:
    """Let a plain cache take so many more tokens without a copy of those that it holds."""
    cache.layers = [_Reserved(layer, tokens) for layer in cache.layers]


class _Reserved(DynamicLayer):
    """A layer's keys and values at the beginning of larger tensors, to which tokens are added in place.

    `DynamicLayer` copies everything for each new token. Of a batch that no processor's cache holds, the copies take longer than
    the attention itself.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, room: int):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._hold(layer.keys, layer.values, room)

    def _hold(self, keys: Tensor, values: Tensor, room: int) -> None:
        self._room = room
        self._whole = [_with_room(tensor, room) for tensor in (keys, values)]
        self._show(keys.shape[-2])

    def _show(self, length: int) -> None:
        self.keys, self.values = (whole[:, :, :length] for whole in self._whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, H, T, d) of T tokens, and return all."""
        held, new = self.keys.shape[-2], key_states.shape[-2]
        if new > self._room:
            self._hold(self.keys, self.values, new)
        for whole, states in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, held : held + new] = states
        self._room -= new
        self._show(held + new)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._whole = [whole[indices] for whole in self._whole]
        self._show(self.keys.shape[-2])


def _with_room(tensor: Tensor, room: int) -> Tensor:
    """A tensor (B, H, T, d) as the first T tokens of one for T + room."""
    rows, heads, length, size = tensor.shape
    whole = torch.empty(rows, heads, length + room, size, dtype=tensor.dtype, device=tensor.device)
    whole[:, :, :length] = tensor
    return whole
