"""PPO on TRL's online loop: GRPOTrainer generates, scores, buffers and resumes; here are the critic and the losses.

The critic is a linear value head on the policy's own backbone: one forward gives log-probabilities and values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad, use_adapter

from rsoups import rl_math
from rsoups.scoring import check_scores

_VALUE_HEAD = "value_head.safetensors"
_STATE = "ppo_state.json"
_CHUNK = 4_096  # response tokens whose logits exist at one time


@dataclass
class PPOConfig(GRPOConfig):
    """TRL's GRPOConfig with PPO's own settings; the defaults are the paper's (Ramé et al. 2023, LLaMA experiments).

    A rollout is ``per_device_train_batch_size * steps_per_generation`` responses on each process. It is gone through
    ``num_iterations`` times, ``per_device_train_batch_size * gradient_accumulation_steps`` of them for each step of the
    optimizer. GRPO's own settings of groups, advantages and losses have no effect; ``beta`` is set from ``kl_coef``.
    """

    learning_rate: float = field(default=1.41e-5, metadata={"help": "The initial learning rate for AdamW."})
    num_generations: int | None = field(default=1, metadata={"help": "Responses per prompt in a rollout."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs: passes over each rollout."})
    max_completion_length: int | None = field(default=32, metadata={"help": "Longest response, in tokens."})
    kl_coef: float = field(default=0.2, metadata={"help": "Initial coefficient of the KL penalty per token."})
    kl_target: float | None = field(
        default=6.0, metadata={"help": "KL to hold, nats per response, by adapting kl_coef; none keeps kl_coef fixed."}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes over which kl_coef adapts."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of GAE."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip of the value around the rollout's value."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    adapter_init_seed: int = field(
        default=0,
        metadata={"help": "Seed of a fresh adapter's weights, the same for all runs that will share a soup."},
    )

    def __post_init__(self) -> None:
        responses = self.num_generations
        # TRL refuses one response per prompt, which only GRPO's group baseline needs more of. Its check that groups
        # fill the rollout holds for any number of responses once a process's whole rollout counts as one group.
        if responses == 1:
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            self.num_generations = self.generation_batch_size or self.per_device_train_batch_size * steps
            if self.num_generations < 2:
                raise ValueError(
                    "a rollout of one response has no advantages to whiten: raise per_device_train_batch_size"
                )
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef is {self.kl_coef}, must be at least 0")
        self.beta = self.kl_coef or 1e-8  # not 0: makes TRL keep the reference of a continued adapter
        super().__post_init__()
        self.num_generations = responses


class PPOTrainer(GRPOTrainer):
    """Proximal policy optimisation of a LoRA adapter against one reward, or a weighted sum of several (MORL).

    Takes GRPOTrainer's arguments. The reference is the base with the adapter off where `peft_config` makes a fresh
    adapter, and a frozen copy of the adapter where `model` is a PeftModel that is trained on (the paper's Alpaca case).

    Metrics, each a mean over the rollout: ``reward`` (weighted score), ``kl`` (k1 estimate, nats per response),
    ``entropy`` (-log p of the sampled tokens, nats per token), ``kl_coef``, ``policy_loss``, ``value_loss``,
    ``explained_variance`` (of the returns by the rollout's values), ``clip_fraction``.
    """

    _tag_names = ["trl", "ppo", "rsoups"]
    _name = "PPO"
    args: PPOConfig
    model: Any
    _logs: dict[str, Any]

    def __init__(self, model: Any, reward_funcs: Any, args: PPOConfig, **kwargs: Any):
        super().__init__(model, reward_funcs, args, **kwargs)
        if not isinstance(self.model, PeftModel):
            raise ValueError("PPOTrainer trains a LoRA adapter: pass a peft_config, or a PeftModel to train on")
        causal_lm: Any = self.model.get_base_model()
        if kwargs.get("peft_config") is not None:
            reset_adapter(self.model, args.adapter_init_seed)
        # On the base, where the adapter's own files never include it; checkpoints hold it beside them.
        causal_lm.value_head = nn.Linear(causal_lm.config.get_text_config().hidden_size, 1, device=self.model.device)
        nn.init.zeros_(causal_lm.value_head.weight)
        nn.init.zeros_(causal_lm.value_head.bias)
        add_actor_critic_forward(causal_lm, self.temperature)
        self.kl_controller = rl_math.KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(PPOProgress())

    # --- rollout -----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A rollout: generate, score, estimate advantages. See `_rollout_tensors` for what it holds."""
        mode = "train" if self.model.training else "eval"
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, response_ids, _, responses, *_ = self._generate(prompts)
        batch = self._rollout_tensors(prompt_ids, response_ids)
        mask = batch["completion_mask"]

        chunk = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        checkpointing: Any = self.args.activation_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            logps, values = self._actor_critic(self.model, batch, chunk)
            policy = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                ref_logps, _ = self._actor_critic(self.model, batch, chunk)

        scores = self._scores(inputs, prompts, responses, response_ids)
        rewards = rl_math.kl_penalised_rewards(scores, logps, ref_logps, mask, self.kl_controller.coef)
        advantages, returns = rl_math.gae(rewards, values, mask, self.args.gamma, self.args.lam)
        batch["advantages"] = rl_math.masked_whiten(advantages, mask, self._sum_over_processes)
        batch |= {"old_logps": logps, "old_values": values, "returns": returns}
        tokens = self._sum_over_processes(mask.sum().float())
        batch["num_items_in_batch"] = tokens
        self._log_rollout(mode, prompts, responses, scores, batch, ref_logps)
        return batch

    def _rollout_tensors(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> dict[str, Tensor]:
        """Padded ids and masks: prompts (B, P) to the left, responses (B, T) to the right; masks are 1 on real tokens."""
        out = {}
        for name, side, rows in (("prompt", "left", prompt_ids), ("completion", "right", response_ids)):
            ids = [torch.tensor(row, dtype=torch.long) for row in rows]
            padded = pad(ids, padding_value=self._tokenizer.pad_token_id, padding_side=side)
            mask = pad([torch.ones_like(row) for row in ids], padding_value=0, padding_side=side)
            out[f"{name}_ids"] = padded.to(self.accelerator.device)
            out[f"{name}_mask"] = mask.to(self.accelerator.device)
        return out

    def _actor_critic(
        self, model: nn.Module, batch: dict[str, Tensor], chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the response tokens and values of the states before them, both (B, T)."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        length = batch["completion_ids"].shape[1]
        outputs = []
        for rows, attention in zip(ids.split(chunk or len(ids)), mask.split(chunk or len(ids)), strict=True):
            with self.accelerator.autocast():
                outputs.append(model(input_ids=rows, attention_mask=attention, response_length=length))
        return torch.cat([o[0] for o in outputs]), torch.cat([o[1] for o in outputs])

    def _scores(self, inputs: list, prompts: list, responses: list, response_ids: list) -> Tensor:
        """Weighted score of each of this process's responses, (B,). Refuses scores that are not finite."""
        by_reward = self._calculate_rewards(inputs, prompts, responses, response_ids)  # gathered: (B * processes, R)
        start = self.accelerator.process_index * len(prompts)
        local = by_reward[start : start + len(prompts)]
        for i, name in enumerate(self.reward_func_names):
            check_scores(name, local[:, i].tolist(), prompts, responses)
            self._metrics["train" if self.model.training else "eval"][f"rewards/{name}"].append(
                by_reward[:, i].mean().item()
            )
            self._logs["rewards"][name].extend(by_reward[:, i].tolist())
        weights = self.reward_weights.to(local.device)
        return (local * weights).sum(dim=1) / weights.sum()  # MORL as in the paper: Σ μ_i R_i / Σ μ_i

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="sum")

    def _log_rollout(
        self, mode: str, prompts: list, responses: list, scores: Tensor, batch: dict[str, Tensor], ref_logps: Tensor
    ) -> None:
        """Record the rollout's metrics, and adapt the KL coefficient."""
        mask, logps = batch["completion_mask"], batch["old_logps"]
        kl = self.accelerator.gather(((logps - ref_logps) * mask).sum(dim=1)).mean().item()
        metrics = self._metrics[mode]
        metrics["reward"].append(self.accelerator.gather(scores).mean().item())
        metrics["kl"].append(kl)
        metrics["entropy"].append(rl_math.masked_mean(-logps, mask).item())
        metrics["kl_coef"].append(self.kl_controller.coef)
        metrics["explained_variance"].append(explained_variance(batch["old_values"], batch["returns"], mask))
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(responses)
        self._logs["advantages"].extend((batch["advantages"] * mask).sum(dim=1).tolist())
        if mode == "train":
            self.kl_controller.update(kl, len(prompts) * self.accelerator.num_processes)

    # --- update ------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Clipped policy loss + vf_coef * clipped value loss, a mean over the tokens that one optimizer step sees."""
        mask = inputs["completion_mask"]
        logps, values = self._actor_critic(model, inputs)
        policy, clipped = rl_math.policy_loss(logps, inputs["old_logps"], inputs["advantages"], self.args.cliprange)
        value = rl_math.value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        mode = "train" if self.model.training else "eval"
        for name, tokens in (("policy_loss", policy), ("value_loss", value), ("clip_fraction", clipped.float())):
            self._metrics[mode][name].append(rl_math.masked_mean(tokens.detach(), mask).item())
        # The rollout's tokens, scaled to one optimizer step's share: each token weighs the same in every minibatch and
        # on every process (DDP averages gradients over processes, hence the division by their number).
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return ((policy + self.args.vf_coef * value) * mask).sum() / tokens

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            head = self.accelerator.unwrap_model(self.model).get_base_model().value_head
            save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, folder / _VALUE_HEAD)
            (folder / _STATE).write_text(json.dumps({"kl_coef": self.kl_controller.coef}))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        head = self.accelerator.unwrap_model(model or self.model).get_base_model().value_head
        head.load_state_dict(load_file(folder / _VALUE_HEAD))
        self.kl_controller.coef = json.loads((folder / _STATE).read_text())["kl_coef"]


class PPOProgress(ProgressCallback):
    """The progress bar with the last rollout's reward and KL beside it, instead of a printed dictionary at each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {key: logs[key] for key in ("reward", "kl", "value_loss") if logs and key in logs}
            self.training_bar.set_postfix({key: f"{value:.2f}" for key, value in shown.items()})


def reset_adapter(model: PeftModel, seed: int) -> None:
    """Draw a fresh LoRA adapter's weights anew from `seed`: A as PEFT initialises it, B zero.

    Adapters that will share a soup should share their start (Ramé et al. 2023, section 2.2), while each run keeps its
    own seed for data and sampling.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name in module.active_adapters:
                    module.reset_lora_parameters(name, init_lora_weights=True)


def add_actor_critic_forward(causal_lm: Any, temperature: float) -> None:
    """Let ``causal_lm(..., response_length=T)`` return ``(log-probabilities, values)``, each (B, T) float32.

    Both belong to the last T tokens of `input_ids`; masked tokens get 0. The LM head runs on real response tokens only,
    in chunks whose logits are recomputed in the backward pass, so the whole batch's logits never exist. Inside
    ``forward`` so that DDP, FSDP and autocast see one ordinary call. Any other call is untouched.

    Raises:
        ValueError: A model that transforms its logits after the head, which this forward does not know.
    """
    text_config = causal_lm.config.get_text_config()
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if getattr(text_config, key, None) not in (None, 1, 1.0):
            raise ValueError(f"PPOTrainer does not support {key} in the base's config ({type(causal_lm).__name__})")
    original = causal_lm.forward

    def forward(*args: Any, response_length: int | None = None, **kwargs: Any) -> Any:
        if response_length is None:
            return original(*args, **kwargs)
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        hidden = causal_lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states = hidden[:, -response_length - 1 : -1]  # the state before each response token
        real = mask[:, -response_length:].bool()
        values = causal_lm.value_head(states.float()).squeeze(-1) * real
        head = causal_lm.get_output_embeddings()
        picked = _token_logps(head, states[real], ids[:, -response_length:][real], temperature)
        return torch.zeros_like(values).masked_scatter(real, picked), values

    # generate() validates its arguments against this signature
    forward.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
    causal_lm.forward = forward


def _token_logps(head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log p(token | state) of each of n tokens, float32 (n,), from states (n, hidden)."""

    def chunk(part: Tensor, targets: Tensor) -> Tensor:
        logits = head(part).float() / temperature
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)

    pieces = list(zip(states.split(_CHUNK), tokens.split(_CHUNK), strict=True))
    if len(pieces) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk, *piece, use_reentrant=False) for piece in pieces])
    return torch.cat([chunk(*piece) for piece in pieces])


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over real tokens; 0 is no better than a constant."""
    real = mask.bool()
    spread = returns[real].var(correction=0)
    return (1 - (returns[real] - values[real]).var(correction=0) / spread.clamp(min=1e-8)).item()
