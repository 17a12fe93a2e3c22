"""Estimate a PPO run before it starts: sizes, steps, and the memory of a process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import nn

from rsoups.training.ppo_config import PPOConfig

# Bytes that autograd keeps of one token in one layer of LLaMA-7b's shape: measured under bf16 autocast with LoRA on q, k, v
# and o (benchmarks/activation_memory.py). Other shapes are scaled by their width.
_KEPT, _KEPT_OF_CHECKPOINTED = 172_000, 8_000
_WIDTH = 4096 + 11008
_CUDA = 1.0  # GB that CUDA takes for itself
GB = 1e9


def run_plan(model: nn.Module, rewards: list[Any], args: PPOConfig, prompts: int, longest: int, device: str) -> str:
    """Three lines: the rollout, the run, and the memory of one process.

    Args:
        model: The PEFT model.
        rewards: Loaded rewards.
        args: The run's settings.
        prompts: Number of train prompts.
        longest: Tokens of the longest prompt.
        device: Device of the rewards.
    """
    per_rollout = args.num_iterations * args.shares.steps
    rollouts = prompts * int(args.num_generations or 1) // args.shares.rollout
    steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * rollouts * per_rollout)
    lines = [
        f"rollout  {args.shares}, gone through {args.num_iterations} times: {per_rollout} optimizer steps",
        f"run      {prompts} prompts, {-(-steps // per_rollout)} rollouts, {steps} optimizer steps",
    ]
    on_gpu = args.device.type == "cuda"
    parts = memory(model, rewards if torch.device(device).type == args.device.type else [], args, longest, on_gpu)
    if parts:
        shown = ", ".join(f"{name} {size:.1f}" if size >= 0.05 else f"{name} <0.1" for name, size in parts.items())
        where = "on each GPU" if on_gpu else "in each process"
        lines.append(f"memory   about {sum(parts.values()):.1f} GB {where}, worked out: {shown}")
    return "\n".join(lines)


def memory(
    model: nn.Module, rewards: list[Any], args: PPOConfig, longest: int, on_gpu: bool = True
) -> dict[str, float]:
    """Memory of one process in GB, by its use; empty if the base's config lacks its shape.

    The base is counted as it is stored (8 bit, bf16, ...). A trained number of the adapter takes 16 bytes: float32, its
    gradient and Adam's two moments. Generation and update alternate, so only the larger one counts.

    Args:
        model: PEFT model. Its weights may be on the meta device.
        rewards: Loaded rewards on the same device.
        args: The run's settings.
        longest: Tokens of the longest prompt.
        on_gpu: Add the memory that CUDA takes for itself.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if not layers or not width:
        return {}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    bytes_each = 2 if args.bf16 or args.fp16 else 4

    tokens = longest + int(args.max_completion_length or 0)
    at_once = args.shares.rollout // args.shares.processes
    at_once = min(at_once, args.local_rollout_forward_batch_size or at_once)
    generation = at_once * tokens * 2 * layers * kv_heads * head * bytes_each
    activations = _KEPT * (width + (getattr(config, "intermediate_size", None) or 4 * width)) / _WIDTH * bytes_each / 2
    checkpointed = _KEPT_OF_CHECKPOINTED * width / 4096 * bytes_each / 2
    of_a_token = layers * checkpointed + activations if args.activation_checkpointing else layers * activations
    update = args.shares.per_device * tokens * of_a_token

    parts = {
        "base": sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad),
        "adapter": 16 * trained,
        "rewards": sum(p.numel() * p.element_size() for m in _models(rewards) for p in m.parameters()),
    }
    if generation >= update:
        parts[f"generation from {at_once} prompts ({tokens} tokens each)"] = generation
    else:
        parts[f"update of {args.shares.per_device} responses ({tokens} tokens each)"] = int(update)
    return {name: size / GB for name, size in parts.items()} | ({"CUDA": _CUDA} if on_gpu else {})


def settle_checkpointing(args: PPOConfig, model: nn.Module, rewards: list[Any], longest: int) -> None:
    """Keep all activations where half of the memory holds them, unless the user has decided; recomputing them takes time.

    Args:
        args: The run's settings; `activation_checkpointing` is changed.
        model, rewards, longest: As for `memory`.
    """
    if not args.checkpointing_unset:
        return
    on_gpu = args.device.type == "cuda"
    args.activation_checkpointing = args.gradient_checkpointing = False
    parts = memory(model, rewards, args, longest, on_gpu)
    if on_gpu:
        available = torch.cuda.get_device_properties(args.device).total_memory
    else:  # the processes of a machine share it
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        available = psutil.virtual_memory().total // processes
    if not parts or sum(parts.values()) * GB > available / 2:
        args.activation_checkpointing = args.gradient_checkpointing = True


def _models(rewards: list[Any]) -> Iterator[nn.Module]:
    """Networks of rewards, and of the members of averages."""
    for reward in rewards:
        for value in vars(reward).values() if hasattr(reward, "__dict__") else ():
            if isinstance(value, nn.Module):
                yield value
        yield from _models(getattr(reward, "members", []))
