"""DeBERTa's relative positions, projected once for a loaded reward, and read only as far as a batch's rows reach.

In every layer of every call, transformers projects all positions (512 of DeBERTa-v3), copies them for each row, and multiplies
each token with all of them; then it picks those that occur. The projections alone take as long as 85 tokens. The weights of a
loaded reward do not change, and rows of T tokens have 2T - 1 distances at most.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DisentangledSelfAttention,
    scaled_size_sqrt,
)


def project_positions_once(model: nn.Module) -> None:
    """Let the attention layers of a DeBERTa-v2 or -v3 keep the projections of their relative positions.

    The model's weights must not change afterwards. Logits are the same up to rounding. Other models are left alone.
    """
    distances = _Distances()
    for module in model.modules():
        if type(module) is DisentangledSelfAttention and module.relative_attention and module.pos_att_type:
            module.disentangled_attention_bias = partial(_bias, module, distances, {})  # type: ignore[method-assign]


class _Distances:
    """Places of a forward's distances among the projected positions, which all layers share."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, dict[int, tuple[Tensor, slice]]] | None = None

    def __call__(self, relative_pos: Tensor, sign: int, span: int) -> tuple[Tensor, slice]:
        """Return places (T, T) within a slice of the 2 * span positions, and the slice.

        Args:
            relative_pos: (1, T, T), the same object for all layers of a forward.
            sign: 1 for a content's distance to positions, -1 for a position's to contents.
            span: Positions on each side.
        """
        last = self._last
        if last is None or last[0] is not relative_pos:
            last = self._last = relative_pos, {}
        if sign not in last[1]:
            places = (sign * relative_pos.reshape(relative_pos.shape[-2:]) + span).clamp(0, 2 * span - 1)
            first, end = int(places.min()), int(places.max()) + 1
            last[1][sign] = places - first, slice(first, end)
        return last[1][sign]


def _bias(
    layer: Any,
    distances: _Distances,
    projected: dict[str, Tensor],
    query_layer: Tensor,
    key_layer: Tensor,
    relative_pos: Tensor,
    rel_embeddings: Tensor,
    scale_factor: int,
) -> Tensor:
    """Return what contents and positions add to the attention's scores, (B·H, T, T), as `disentangled_attention_bias`."""
    heads, span = layer.num_attention_heads, layer.pos_ebd_size

    def positions(projection: nn.Module) -> Tensor:
        return projection(rel_embeddings[: 2 * span]).view(2 * span, heads, -1).permute(1, 2, 0)  # (H, d, 2 * span)

    if not projected:
        own = ("query_proj", "key_proj") if layer.share_att_key else ("pos_query_proj", "pos_key_proj")
        for kind, name in zip(("p2c", "c2p"), own, strict=True):
            if kind in layer.pos_att_type:
                projected[kind] = positions(getattr(layer, name)).contiguous()

    def of_contents(contents: Tensor, kind: str, places: Tensor, part: slice) -> Tensor:
        """Products of contents (B·H, T, d) with the positions at some places, (B, H, T, T)."""
        length, size = contents.shape[1:]
        by_head = contents.view(-1, heads, length, size).transpose(0, 1).reshape(heads, -1, size)
        products = torch.bmm(by_head, projected[kind][:, :, part]).view(heads, -1, length, part.stop - part.start)
        products = products.transpose(0, 1)
        return products.gather(-1, places.expand(*products.shape[:3], -1))

    score: Any = 0
    if "c2p" in projected:
        score = of_contents(query_layer, "c2p", *distances(relative_pos, 1, span))
    if "p2c" in projected:
        score = score + of_contents(key_layer, "p2c", *distances(relative_pos, -1, span)).transpose(-1, -2)
    scale = scaled_size_sqrt(query_layer, scale_factor).to(query_layer.dtype)
    return (score / scale).flatten(0, 1)
