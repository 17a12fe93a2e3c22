"""Write an adapter as every version of vLLM takes it: factors only, one rank and one scaling for all modules."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from rsoups.adapters.adapter import Adapter
from rsoups.adapters.config import for_inference
from rsoups.adapters.filenames import WEIGHTS_FILE
from rsoups.common.errors import AdapterError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's --max-lora-rank can be


def served_rank(adapter: Adapter) -> int:
    """The rank with which an adapter is served: the next one in `RANKS` after its largest.

    Raises:
        AdapterError: It has a larger rank than any server takes, or other parameters than plain factors.
    """
    trained = [name for name in adapter.full if name not in adapter.copies]
    trained += [module.bias for module in adapter.modules.values() if module.bias is not None]
    if trained:
        raise AdapterError(
            f"{adapter.source}: vLLM loads LoRA factors, but not {trained[0]}, which was trained beside them: serve a "
            "whole model (rsoups merge), or generate without a server"
        )
    largest = max(module.rank for module in adapter.modules.values())
    if largest > RANKS[-1]:
        raise AdapterError(
            f"{adapter.source} has rank {largest}, and vLLM takes {RANKS[-1]} at most: for a soup, take method svd, which "
            "keeps the rank of its ingredients"
        )
    return next(rank for rank in RANKS if rank >= largest)


def write_served(adapter: Adapter, folder: Path) -> int:
    """Write an adapter for a server: the same Δ, with factors padded by zeros to one rank, and one scaling.

    vLLM has one --max-lora-rank, and its older versions read neither rank_pattern nor alpha_pattern.

    Args:
        adapter: Adapter of any ranks and scalings.
        folder: Folder to create.

    Returns:
        The rank.

    Raises:
        AdapterError: As `served_rank`.
    """
    rank = served_rank(adapter)
    scalings = {module.scaling for module in adapter.modules.values()}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0

    tensors: dict[str, Tensor] = {}
    for module in adapter.modules.values():
        a, b = adapter.tensor(module.A), adapter.tensor(module.B)
        if module.scaling != scaling:
            b = b.float() * module.scaling
        tensors[module.A] = _padded(a, 0, (module.experts, module.rank), 1, rank)
        tensors[module.B] = _padded(b, 1, (module.rank, module.experts), 0, rank)

    config = for_inference(adapter.settings)
    alpha = scaling * rank
    config.r, config.lora_alpha = rank, round(alpha) if alpha == round(alpha) else alpha
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    config.save(folder)
    return rank


def _padded(factor: Tensor, dim: int, sizes: tuple[int, int], at: int, rank: int) -> Tensor:
    """A factor with zeros up to a rank.

    Args:
        factor: Tensor whose dimension `dim` holds experts and ranks.
        dim: 0 for A, 1 for B.
        sizes: How that dimension divides into experts and ranks, in their order.
        at: Place of the rank among the two.
        rank: Rank of the result.
    """
    split = factor.unflatten(dim, sizes).movedim(dim + at, -1)
    full = pad(split, (0, rank - sizes[at])).movedim(-1, dim + at)
    return full.flatten(dim, dim + 1).contiguous()
