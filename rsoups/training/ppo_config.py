"""PPO's settings, and how a rollout is divided among processes, minibatches and micro-batches."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from rsoups.common.assets import need
from rsoups.common.errors import SettingsError

# The paper's batch is 128 and its mini-batch 4, for LLaMA-7b; recipes/configs/llama7b-*.yaml say so.
_ROLLOUT, _MINI_BATCH = 128, 32
_HARMLESS = {
    "cache_implementation",
    "cache_config",
    "use_cache",
    "disable_compile",
    "compile_config",
    "prefill_chunk_size",
}
# Environment variables in which launchers (torch, accelerate, MPI) set the number of processes, in accelerate's order.
_WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]


def has_bf16() -> bool:
    """Whether this machine's GPU, or without one its CPU, has instructions that multiply matrices in bfloat16."""
    if torch.accelerator.is_available():
        return bool(is_torch_bf16_gpu_available())
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class Shares:
    """The division of a rollout. Every number counts responses, except `processes`, `accumulation` and `steps`.

    Attributes:
        rollout: Responses of one rollout, over all processes.
        mini_batch: Responses that one optimizer step sees, over all processes.
        processes: Number of processes.
        per_device: Rows of one forward and backward pass on one process.
        accumulation: Passes of one process in one optimizer step.
        steps: Optimizer steps of one pass over the rollout.
    """

    rollout: int
    mini_batch: int
    processes: int
    per_device: int
    accumulation: int
    steps: int

    @property
    def turns(self) -> int:
        """Number of groups of processes that take turns, one group for each step; 1 if every process works in every step."""
        return max(1, self.processes // self.mini_batch)

    def __str__(self) -> str:
        each = (
            f"{self.per_device} on each process" if self.turns == 1 else f"one on each of {self.mini_batch} processes"
        )
        passes = f", in {self.accumulation} passes" if self.accumulation > 1 else ""
        waiting = ""
        if self.turns > 1:
            waiting = (
                f"; {self.processes - self.mini_batch} of {self.processes} processes wait in each optimizer step: "
                f"--mini_batch_size {self.processes} would use them all"
            )
        if self.processes == 1:
            return f"{self.rollout} responses, minibatches of {self.mini_batch}{passes}"
        return (
            f"{self.rollout} responses ({self.rollout // self.processes} on each of {self.processes} processes), "
            f"minibatches of {self.mini_batch} ({each}{passes}){waiting}"
        )


def divide(
    rollout: int, mini_batch: int, processes: int, per_device: int | None = None, accumulation: int | None = None
) -> Shares:
    """Divide a rollout so that its size and its minibatches are the same on any number of processes.

    Args:
        rollout: Responses of one rollout, over all processes.
        mini_batch: Responses that one optimizer step sees, over all processes. Where there are more processes than that,
            they take turns, `mini_batch` of them in each step.
        processes: Number of processes.
        per_device: Rows of one forward pass on one process; as many as the minibatch has if None.
        accumulation: Forward passes of one process in an optimizer step; as many as `per_device` needs if None.

    Raises:
        SettingsError: The numbers do not divide.
    """

    def refuse(reason: str, remedy: str) -> SettingsError:
        return SettingsError(
            f"a rollout of {rollout} responses (generation_batch_size) in minibatches of {mini_batch} (mini_batch_size) "
            f"cannot be divided among {processes} process{'es' * (processes > 1)}: {reason}. {remedy}"
        )

    if min(rollout, mini_batch, per_device or 1, accumulation or 1) < 1:
        raise refuse("every size must be at least 1", "Raise the size that is not.")
    if rollout < 2:
        raise refuse("the advantages of a single response cannot be whitened", "Raise generation_batch_size.")
    if rollout % mini_batch:
        raise refuse(f"{rollout} is no multiple of {mini_batch}", "Change one of the two sizes.")
    if rollout % processes:
        raise refuse(f"{rollout} is no multiple of {processes}", "Change generation_batch_size, or num_processes.")

    steps = rollout // mini_batch
    if processes > mini_batch:
        if processes % mini_batch:
            raise refuse(
                f"{processes} is no multiple of {mini_batch}", f"Pass --mini_batch_size {processes}, for example."
            )
        if (per_device or 1) > 1 or (accumulation or 1) > 1:
            raise refuse(
                "a process has one response of a minibatch at most",
                "Leave out per_device_train_batch_size and gradient_accumulation_steps.",
            )
        return Shares(rollout, mini_batch, processes, 1, 1, steps)

    if mini_batch % processes:
        raise refuse(
            f"{mini_batch} is no multiple of {processes}",
            f"Pass --mini_batch_size {processes * -(-mini_batch // processes)}.",
        )
    share = mini_batch // processes
    rows = per_device or share // (accumulation or 1)
    if not rows or share % rows or (accumulation or share // rows) * rows != share:
        passes = f" x {accumulation} (gradient_accumulation_steps)" if accumulation else ""
        raise refuse(
            f"each process has {share} responses of a minibatch, and {rows} (per_device_train_batch_size){passes} do not "
            "make that up",
            "Leave per_device_train_batch_size and gradient_accumulation_steps out, or let their product be that share.",
        )
    return Shares(rollout, mini_batch, processes, rows, share // rows, steps)


@dataclass
class PPOConfig(GRPOConfig):
    """TRL's GRPOConfig with PPO's own settings.

    The defaults are those of the paper's LLaMA experiments (Ramé et al. 2023), but for the learning rate and the minibatch
    (1.41e-5 and 4 there): with these a small base did not learn in 13 rollouts, with ours it does (docs/EXPERIMENTS.md).

    A rollout is ``generation_batch_size`` responses over all processes. PPO goes through it ``num_iterations`` times, in
    minibatches of ``mini_batch_size`` responses over all processes, one optimizer step for each: the same on any number of
    processes. ``per_device_train_batch_size`` only bounds the rows of one forward pass, where memory is short.

    TRL's settings of the sizes work too: ``per_device_train_batch_size`` and ``gradient_accumulation_steps`` without
    ``mini_batch_size``, and ``steps_per_generation`` instead of ``generation_batch_size``, make both sizes grow with the
    number of processes. GRPO's own settings of groups, advantages and losses have no effect; ``beta`` is set from
    ``kl_coef``.
    """

    learning_rate: float = field(
        default=3e-4, metadata={"help": "The initial learning rate for AdamW; the paper has 1.41e-5 for LLaMA-7b."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    reward_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weight μ of each reward, all 1 if unset: the score is the sum of μ * reward, divided by the sum of |μ|. "
            "A negative weight pays for less of its reward."
        },
    )
    num_generations: int | None = field(default=1, metadata={"help": "Responses per prompt in a rollout."})
    generation_batch_size: int | None = field(
        default=None,
        metadata={"help": f"Responses of a rollout over all processes; {_ROLLOUT} unless steps_per_generation is set."},
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Responses that one optimizer step sees, over all processes; "
            f"{_MINI_BATCH} unless per_device_train_batch_size is set (the paper has 4)."
        },
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Rows of one forward and backward pass on a process; its share of a minibatch if unset."},
    )
    gradient_accumulation_steps: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Forward and backward passes in an optimizer step; as many as fill the minibatch if unset."},
    )
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs: passes over each rollout."})
    max_completion_length: int | None = field(default=32, metadata={"help": "Longest response, in tokens."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "No dropout, so that rollout, reference and update see one policy."}
    )
    kl_coef: float = field(default=0.2, metadata={"help": "Initial coefficient of the KL penalty per token."})
    kl_target: float | None = field(
        default=6.0, metadata={"help": "KL in nats per response that kl_coef adapts to; none keeps kl_coef fixed."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which kl_coef adapts."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of GAE."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip of the value around the rollout's value."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    kl_limit: float | None = field(
        default=100.0,
        metadata={"help": "KL in nats per response: warn above half of it, stop above it; none never stops."},
    )
    min_distinct: float = field(
        default=0.0, metadata={"help": "Stop if a smaller share of a rollout's responses differ; 0 only warns."}
    )
    min_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Draw each response's length limit between this and max_completion_length, as the paper does."
        },
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Penalty, subtracted from the score of a response without an end token."}
    )
    local_rollout_forward_batch_size: int | None = field(
        default=None, metadata={"help": "Responses generated at one time on a process; the whole rollout if unset."}
    )
    rollout_server: str | None = field(
        default=None,
        metadata={
            "help": "URL of a running vLLM server of the base, which generates the rollouts. It is handed the adapter alone."
        },
    )
    adapter_init_seed: int = field(
        default=0,
        metadata={"help": "Seed of a fresh adapter's weights, the same for all runs that will share a soup."},
    )

    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Compute in bfloat16 by autocast; adapter, values and log-probabilities stay float32. If unset, so where "
            "the GPU, or without one the CPU, has instructions for it."
        },
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Old name of activation_checkpointing."}
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass instead of keeping them: less memory, a fifth more time. If "
            "unset, recipes keep them where half of the memory holds them by an estimate, and PPOTrainer recomputes them."
        },
    )

    checkpointing_unset: bool = field(init=False, repr=False)  # whether the user left activation_checkpointing open
    shares: Shares = field(init=False, repr=False)  # the division of a rollout that follows from the sizes above

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_bf16()
            self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # transformers asks for it
        self.checkpointing_unset = self.activation_checkpointing is None and self.gradient_checkpointing is None
        if self.checkpointing_unset:
            self.activation_checkpointing = True
        self._check()
        responses = self.num_generations
        self.shares = self._divide(get_int_from_env(_WORLD_SIZES, 1))
        self.mini_batch_size = self.shares.mini_batch
        self.per_device_train_batch_size = self.shares.per_device
        self.gradient_accumulation_steps = self.shares.accumulation
        self.generation_batch_size, self.steps_per_generation = self.shares.rollout, None
        # TRL refuses one response per prompt: GRPO's baseline is the mean of a prompt's responses. PPO's baseline is the
        # critic, so one is enough. During TRL's own __post_init__ the whole rollout therefore counts as one group, which
        # always passes TRL's checks (at least two responses, groups that fill the rollout); then the number comes back.
        # num_generations_eval is set before, because TRL takes num_generations for it where it is unset.
        if responses == 1:
            self.num_generations_eval = self.num_generations_eval or 1
            self.num_generations = self.generation_batch_size
        # TRL keeps a frozen copy of a continued adapter as the reference only if beta is not 0.
        self.beta = self.kl_coef or 1e-8
        super().__post_init__()
        self.num_generations = responses
        if self.world_size != self.shares.processes:
            raise SettingsError(
                f"the environment announces {self.shares.processes} processes, but {self.world_size} are running: start "
                "the run with accelerate launch or torchrun"
            )
        # TRL counts forward and backward passes of one process as steps.
        self.steps_per_generation = self.shares.steps * self.shares.accumulation

    def _check(self) -> None:
        if self.kl_coef < 0:
            raise SettingsError(f"kl_coef is {self.kl_coef}, must be at least 0")
        if self.min_completion_length and not 1 <= self.min_completion_length <= (self.max_completion_length or 0):
            raise SettingsError(
                f"min_completion_length is {self.min_completion_length}, must be between 1 and max_completion_length "
                f"({self.max_completion_length})"
            )
        changed = {"top_k": self.top_k or 0, "top_p": self.top_p - 1, "min_p": self.min_p or 0}
        changed |= {"repetition_penalty": self.repetition_penalty - 1}
        further = self.generation_kwargs or {}
        if isinstance(further, str):  # from the command line
            further = self.generation_kwargs = _settings_of(further)
        changed |= {name: True for name in further if name not in _HARMLESS}
        if named := [name for name, value in changed.items() if value]:
            raise SettingsError(
                f"{', '.join(named)}: PPO samples from the whole softmax at a temperature, because its log-probabilities "
                "are computed so. Leave out what changes the sampling (top_k 0, top_p 1, repetition_penalty 1)"
            )
        if self.temperature <= 0:
            raise SettingsError(f"temperature is {self.temperature}, must be above 0")
        if self.use_transformers_continuous_batching and (self.bf16 or self.fp16):
            raise SettingsError(
                "use_transformers_continuous_batching casts the adapter to 16 bit in TRL: leave one of them out"
            )

        self._check_vllm()

    def _check_vllm(self) -> None:
        """Refuse contradictory ways to generate, and packages that are missing."""
        ways = ["rollout_server", "use_vllm", "use_transformers_continuous_batching"]
        if len(chosen := [name for name in ways if getattr(self, name)]) > 1:
            raise SettingsError(f"{' and '.join(chosen)} both generate the rollouts: leave one of them out")
        if self.rollout_server:
            need("openai", "server")
        if self.use_vllm and find_spec("vllm") is None:
            raise SettingsError(
                "use_vllm is TRL's vLLM mode, which needs the package vllm in this environment, also where a server generates; "
                "it is not installed. rollout_server takes a vLLM server from an environment of its own"
            )

    def _divide(self, processes: int) -> Shares:
        """The division of a rollout by the settings, TRL's or ours."""
        rows, passes, steps = (
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
            self.steps_per_generation,
        )
        if steps is not None and self.generation_batch_size is not None:
            raise SettingsError(
                f"generation_batch_size ({self.generation_batch_size}) and steps_per_generation ({steps}) both set "
                "the size of a rollout: leave one of them out"
            )
        if steps is not None and self.mini_batch_size is not None and rows is None:
            raise SettingsError(
                "steps_per_generation counts passes of per_device_train_batch_size rows, but that is not set: set "
                "generation_batch_size instead"
            )

        mini_batch = self.mini_batch_size
        if mini_batch is None:
            mini_batch = rows * (passes or 1) * processes if rows is not None else _MINI_BATCH
        rollout = self.generation_batch_size
        if rollout is None:
            rollout = _ROLLOUT if steps is None else (rows or _MINI_BATCH) * steps * processes
        return divide(rollout, mini_batch, processes, rows, passes)


def _settings_of(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise SettingsError(f'generation_kwargs are {text!r}, must be a JSON object such as {{"use_cache": true}}')
    return settings
