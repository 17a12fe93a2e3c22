"""Checks before the first step of PPO: the policy that samples, is scored and is trained must be one and the same.

Sampling goes through `Decoder` or transformers' `generate`, the update through `PPOTrainer`'s own forward. Where the two
differ, by dropout, a setting of the base's generation_config, or a head that changes its logits, PPO silently optimizes
another policy than the one that writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsoups.common.errors import TrainingError
from rsoups.training import rl_math

_TOKENS = 8  # of each of the two responses that the checks look at
# Attributes of modules and configs that are a probability of noise in training mode.
_NOISE = ("drop", "jitter")
# Largest mean difference of log-probabilities, in nats per token, that rounding explains.
_ROUNDING, _ROUNDING_OF_HALF = 1e-3, 0.1


def check_first_step(trainer: Any, prompts: list) -> str:
    """Refuse a run that would optimize another policy than the one that writes.

    Generates a few tokens for the first two prompts. All random number generators are left as they were.

    Args:
        trainer: PPOTrainer.
        prompts: Prompts of the first rollout.

    Returns:
        One line that says what was checked.

    Raises:
        TrainingError: Two forwards differ, the sampler has other log-probabilities, or the policy is not its reference.
    """
    args = trainer.args
    with same_random_numbers(), torch.no_grad():
        prompt_ids, responses, sampler = _first_tokens(trainer, prompts[:2])
        batch = trainer._rollout_tensors(prompt_ids, responses)
        logps = trainer._actor_critic(trainer.model, batch)[0]
        if args.disable_dropout:
            check_no_noise(trainer.model, lambda: trainer._actor_critic(trainer.model, batch)[0])
        ref_logps = trainer._reference_logps(batch)

    passed = []
    half = args.bf16 or args.fp16 or logps.dtype != torch.float32 or trainer.model.dtype != torch.float32
    sampled = sampler.of(responses) if sampler else []
    if sampled:
        difference = check_sampler(sampled, list(logps), half)
        passed.append(f"log p of sampler and update agree (to {difference:.0e} nats)")
    if trainer.rollout_server:
        passed.append(f"log p of server and trainer agree (to {trainer.rollout_server.difference:.0e} nats)")
    if trainer.state.global_step == 0 and args.disable_dropout:
        kl = float(rl_math.masked_mean(logps - ref_logps, batch["completion_mask"]))
        check_references(kl, "the base" if "ref" not in trainer.model.peft_config else "the adapter's start")
        passed += ["KL to the reference is 0", "no dropout"]
    if trainer.not_inherited:
        passed.append(f"not inherited from the base's generation_config: {', '.join(trainer.not_inherited)}")
    return "; ".join(passed)


def _first_tokens(trainer: Any, prompts: list) -> tuple[list, list, Sampler | None]:
    """Prompts' tokens, the first tokens of their responses, and who watched the sampling.

    Sampling can be watched where `generate` does it: neither in vLLM nor in continuous batching. A rollout server's
    log-probabilities are compared in each rollout.
    """
    config: Any = getattr(trainer, "generation_config", None)
    elsewhere = trainer.use_vllm or trainer.rollout_server or trainer.args.use_transformers_continuous_batching
    watched = config is not None and not elsewhere
    sampler = Sampler() if watched else None
    limit = config.max_new_tokens if watched else None

    trainer.sampler_watch = sampler
    try:
        if watched:
            config.max_new_tokens = min(int(limit or 1), _TOKENS)
        prompt_ids = trainer._tokenize_prompts(prompts)[0]
        responses, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    finally:
        trainer.sampler_watch = None
        if watched:
            config.max_new_tokens = limit
    return prompt_ids, [ids[:_TOKENS] for ids in responses], sampler


def silence_noise(model: nn.Module) -> None:
    """Set every dropout, layer dropout and router jitter of a model to 0, whether a module or a config holds it.

    Some models read the probability from their config at each forward, and call dropout as a function.
    """
    modules: list[Any] = list(model.modules())
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    for config in list(configs.values()):
        configs |= {id(part): part for part in vars(config).values() if hasattr(part, "to_dict")}
    for holder in [*modules, *configs.values()]:
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and value > 0 and any(word in name.lower() for word in _NOISE):
                setattr(holder, name, 0.0)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """A context that leaves all random number generators as they were before it."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def check_no_noise(model: nn.Module, forward: Callable[[], Tensor]) -> None:
    """Compare two forwards in training mode.

    Args:
        model: Model whose modules are searched for the source of the difference.
        forward: Computes one forward.

    Raises:
        TrainingError: They differ; the error names the first module that does.
    """
    first, second = forward(), forward()
    if float((first - second).abs().max()) <= _ROUNDING:
        return
    module = _first_to_differ(model, forward)
    raise TrainingError(
        f"two forwards of one batch in training mode differ by up to {float((first - second).abs().max()):.3g} nats per token; "
        f"the first module to differ is {module}: switch its dropout or noise off in the base's config (rollout and update "
        "must see one policy), or pass --disable_dropout false to train with it"
    )


def _first_to_differ(model: nn.Module, forward: Callable[[], Tensor]) -> str:
    """Name and class of the first module whose output differs between two forwards although its input does not."""
    runs: list[list[tuple[str, list[Tensor], list[Tensor]]]] = []

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value.detach().float().clone()]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        return [tensor for part in parts for tensor in tensors(part)]

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: Any, kwargs: Any, output: Any) -> None:
            runs[-1].append((f"{name} ({type(module).__name__})", tensors([*arguments, kwargs]), tensors(output)))

        return record

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        for _ in range(2):
            runs.append([])
            forward()
    finally:
        for handle in handles:
            handle.remove()

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    for (name, inputs, outputs), (_, other_inputs, other_outputs) in zip(*runs, strict=False):
        if same(inputs, other_inputs) and not same(outputs, other_outputs):
            return name
    return "unknown (no module differs on equal inputs)"


class Sampler:
    """Records the draws of `generate` or `Decoder`: each token, and its log p under the distribution that it was drawn from.

    Attributes:
        logps: Log-probabilities, one (B,) for each drawn token.
        tokens: Token ids, one (B,) for each drawn token.
    """

    def __init__(self) -> None:
        self.logps: list[Tensor] = []
        self.tokens: list[Tensor] = []

    def __call__(self, probabilities: Tensor, drawn: Tensor) -> None:
        weights = probabilities.double()
        self.add(drawn[:, 0], (weights.gather(-1, drawn) / weights.sum(-1, keepdim=True)).log()[:, 0])

    def add(self, tokens: Tensor, logps: Tensor) -> None:
        """Record the drawn tokens (B,) and their log-probabilities (B,)."""
        self.logps.append(logps.cpu())
        self.tokens.append(tokens.cpu())

    def of(self, responses: list[list[int]]) -> list[Tensor]:
        """Log p of the drawn tokens of each response; none if the draws are not the beginnings of the responses."""
        if not self.tokens:
            return []
        tokens, logps = torch.stack(self.tokens, 1), torch.stack(self.logps, 1)
        rows = []
        for row, response in enumerate(responses):
            length = min(len(response), tokens.shape[1])
            if tokens[row, :length].tolist() != response[:length]:
                return []
            rows.append(logps[row, :length])
        return rows


def check_sampler(sampled: list[Tensor], scored: list[Tensor], half: bool) -> float:
    """Compare log p of the sampled tokens by the sampler and by the trainer's forward.

    Args:
        sampled, scored: Log p of each response's tokens, by the sampler and by the trainer.
        half: Whether the model computes in 16 or fewer bits.

    Returns:
        The mean difference, in nats per token.

    Raises:
        TrainingError: They differ by more than rounding does.
    """
    differences = torch.cat([a - b[: len(a)].cpu() for a, b in zip(sampled, scored, strict=True)]).abs()
    mean = float(differences.nan_to_num(posinf=1e3).mean())
    if mean > (_ROUNDING_OF_HALF if half else _ROUNDING):
        raise TrainingError(
            f"the log-probabilities of sampled tokens differ by {mean:.3g} nats per token between generation and PPO's own "
            "forward: a setting of generation, or the model's own code, changes what is sampled. PPO would optimize another "
            "policy than the one that writes; please report the base's class and config"
        )
    return mean


def check_references(kl: float, reference: str) -> None:
    """Refuse a policy that differs from its reference before any step.

    Args:
        kl: Mean KL, nats per token.
        reference: Name of the reference, for the error.

    Raises:
        TrainingError: KL is not 0.
    """
    if abs(kl) > _ROUNDING:
        raise TrainingError(
            f"before the first step the policy is {kl:.3g} nats per token from its reference ({reference}): a fresh adapter "
            "must change nothing. Look for modules that are trained beside the LoRA, or for dropout"
        )
