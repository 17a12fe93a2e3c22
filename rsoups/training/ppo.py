"""PPO on TRL's online loop: GRPOTrainer generates, scores and buffers; the critic and the losses are here.

The critic is a linear value head on the policy's own backbone: one forward gives log-probabilities and values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor, nn
from transformers import ProgressCallback
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad, shuffle_sequence_dict, split_tensor_dict, use_adapter

from rsoups.common.errors import RewardError, SettingsError
from rsoups.generation.decoding import trimmed
from rsoups.generation.sampling import fast_sampling
from rsoups.generation.settings import sample_purely
from rsoups.rewards.interface import check_scores
from rsoups.training import first_step, rl_math
from rsoups.training.actor_critic import ValueHead, add_actor_critic_forward, hide_value_head
from rsoups.training.callbacks import PPOProgress
from rsoups.training.checkpoints import (
    PPOState,
    load_rollout,
    load_state,
    save_rollout,
    save_state,
)
from rsoups.training.metrics import (
    Processes,
    add_metrics,
    check_progress,
    reward_metrics,
    rollout_metrics,
    take_pending,
)
from rsoups.training.policy import fuse_lora, reset_adapter
from rsoups.training.ppo_config import PPOConfig
from rsoups.training.resumable import ResumableTrainer
from rsoups.training.rollouts import decode, decoder_generates
from rsoups.training.trl_rewards import check_weights, named_failures


class PPOTrainer(ResumableTrainer):
    """Proximal policy optimization of a LoRA adapter against one reward, or a weighted sum of several (MORL).

    Takes GRPOTrainer's arguments. With a `peft_config` the adapter is fresh, and the reference is the base without it. If
    `model` is a PeftModel, its adapter is trained on, and the reference is a frozen copy of it (the paper's Alpaca case).

    Metrics are means since the last log, over all processes. Of each rollout: ``reward`` (weighted score of a response,
    penalties of length included, KL not), ``rewards/NAME`` (one reward's score), ``abstained/NAME`` (share of its None,
    which the other means leave out), ``kl`` (k1 estimate to the reference, summed over a response's tokens, in nats),
    ``kl_coef`` (β of the rollout's KL penalty), ``entropy`` (-log p of the sampled tokens, nats per token),
    ``explained_variance`` (of the returns by the rollout's values), ``distinct`` (share of the responses that differ; near
    0 is a collapsed policy, or a reward that asks for one answer), ``completions/...`` (tokens of a response, end token
    included: mean, min, max; ``clipped_ratio`` of them ended at the limit; ``terminated``: of those that ended by
    themselves), ``num_tokens`` (prompts and responses so far). Of each step of the optimizer: ``policy_loss`` and
    ``value_loss`` (means over its response tokens), ``clip_fraction`` (tokens whose ratio was clipped), ``loss``,
    ``grad_norm`` (before clipping), ``learning_rate``, ``step_time`` (seconds).

    Differs by design from TRL 1.12's PPOTrainer, but has the same advantages, returns and losses on the same rollout. The
    critic is a head on the policy, not a second model, and starts at the first rollout's mean score. An episode ends at its end
    token, not one state later. Every token of a rollout has the same weight, whatever its minibatch. Rewards get texts, so any
    tokenizer will do. β adapts. There is no dropout.
    """

    _tag_names = ["trl", "ppo", "rsoups"]
    _name = "PPO"
    args: PPOConfig
    model: Any
    _logs: dict[str, Any]
    _step: int
    _buffered_inputs: Any

    def __init__(self, model: Any, reward_funcs: Any, args: PPOConfig, **kwargs: Any):
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        check_weights(args.reward_weights, len(rewards))
        super().__init__(model, [named_failures(reward) for reward in rewards], args, **kwargs)
        if not isinstance(self.model, PeftModel):
            raise ValueError("PPOTrainer trains a LoRA adapter: pass a peft_config, or a PeftModel to train on")
        self._check_rewards()
        self._processes = Processes(self.accelerator)

        causal_lm: Any = self.model.get_base_model()
        self.not_inherited = sample_purely(causal_lm)
        if args.disable_dropout:
            first_step.silence_noise(self.model)  # TRL disables nn.Dropout only, not dropout called as a function
        if kwargs.get("peft_config") is not None:
            reset_adapter(self.model, args.adapter_init_seed)

        # The head is on the base, so that the adapter's own files never include it; checkpoints hold it beside them.
        causal_lm.value_head = ValueHead(causal_lm.config.get_text_config().hidden_size, self.model.device)
        self.sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        add_actor_critic_forward(causal_lm, self.temperature, self.sharded)
        if not self.sharded:  # sharded weights are gathered where PEFT's forward calls the factors
            fuse_lora(self.model)
        if self.use_vllm:
            hide_value_head(self.vllm_generation)
        self.kl_controller = rl_math.KLController(args.kl_coef, args.kl_target, args.kl_horizon)

        self._checked = False
        self._first_rollout = True
        self.sampler_watch: first_step.Sampler | None = None
        self._ended: list[bool] = []  # whether each response of the last rollout ended by itself
        self._rollout: dict[str, Any] | None = None
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(PPOProgress())

    def _check_rewards(self) -> None:
        names = self.reward_func_names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise SettingsError(
                f"several rewards are called {repeated[0]!r}, and their logs would be mixed: rename one"
            )

    # --- rollout -----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a rollout: generate, score, estimate advantages.

        Returns:
            The tensors of `_rollout_tensors`, and (B, T) `old_logps`, `old_values`, `advantages`, `returns`.
        """
        mode = "train" if self.model.training else "eval"
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, response_ids, _, responses, *_ = self._generate(prompts)
        batch = self._rollout_tensors(prompt_ids, response_ids)
        mask = batch["completion_mask"]

        # Without gradients there is memory for more rows than in the update.
        chunk = max(self.args.per_device_train_batch_size or 1, self.args.per_device_eval_batch_size)
        checkpointing: Any = self.args.activation_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            logps, values = self._actor_critic(self.model, batch, chunk)
            ref_logps = self._reference_logps(batch, chunk)

        scores = self._scores(inputs, prompts, responses, response_ids)
        # The critic starts at the first rollout's mean score: value clipping would let it approach a distant score only
        # slowly, and until then its errors, not the rewards, would decide the advantages.
        if self._first_rollout and mode == "train":
            self._first_rollout = False
            self._value_head.start = self.accelerator.gather(scores).mean().item()
            values = values + self._value_head.start * mask

        rewards = rl_math.kl_penalized_rewards(scores, logps, ref_logps, mask, self.kl_controller.coef)
        advantages, returns = rl_math.gae(rewards, values, mask, self.args.gamma, self.args.lam)
        batch["advantages"] = rl_math.masked_whiten(advantages, mask, self._processes.sum)
        batch |= {"old_logps": logps, "old_values": values, "returns": returns}
        # TRL's key. TRL's helpers neither shuffle nor split a tensor without dimensions, so every minibatch has it whole.
        batch["num_items_in_batch"] = self._processes.sum(mask.sum().float())
        self._log_rollout(mode, prompts, responses, scores, batch, ref_logps)
        return batch

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """TRL's dataloader, whose batches are a process's prompts of one rollout."""
        if kwargs.get("is_training"):
            # Equal to TRL's number, unless processes take turns: then a pass over the rollout has more steps than rows.
            batch_size = int(self.args.generation_batch_size or 0) // self.accelerator.num_processes
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """This process's rows of the next pass, of a new rollout if the last one is used up.

        Each PPO epoch shuffles the rollout into new minibatches, as TRL 1.12 does.
        """
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        if not self._checked:
            self._checked = True
            passed = first_step.check_first_step(self, [row["prompt"] for row in generation_batch])
            self.accelerator.print(f"checked  {passed}")

        # `_step` counts passes of this process. An epoch over the rollout is `passes` of them.
        passes = int(self.args.steps_per_generation or 1)
        if self._rollout is None or self._step % (passes * self.num_iterations) == 0:
            self._rollout, self._buffered_inputs = self._generate_and_score_completions(generation_batch), None
        if self._buffered_inputs is None or self._step % passes == 0:
            rollout: Any = shuffle_sequence_dict(self._rollout)  # type: ignore[arg-type]
            self._rollout, self._buffered_inputs = rollout, self._rows_of_passes(rollout)
        return self._buffered_inputs[self._step % passes]

    def _reference_logps(self, batch: dict[str, Tensor], chunk: int | None = None) -> Tensor:
        """Log-probabilities under the reference, (B, T): the frozen adapter TRL calls "ref", or no adapter at all."""
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return self._actor_critic(self.model, batch, chunk)[0]

    def _rows_of_passes(self, rollout: dict[str, Any]) -> list[dict[str, Any]]:
        """A process's rows of each pass.

        Where processes take turns, a process has no part in most optimizer steps, but its gradients are reduced in all of
        them. Its rows of those steps are real rows with an empty mask: they add nothing to loss and gradients.
        """
        shares = self.args.shares
        rows: list[dict[str, Any]] = split_tensor_dict(rollout, len(rollout["prompt_ids"]) // shares.per_device)
        if shares.turns == 1:
            return rows
        empty = [row | {"completion_mask": torch.zeros_like(row["completion_mask"])} for row in rows]
        turn = self.accelerator.process_index % shares.turns
        return [(rows if step % shares.turns == turn else empty)[step // shares.turns] for step in range(shares.steps)]

    @property
    def _value_head(self) -> ValueHead:
        return self.accelerator.unwrap_model(self.model).get_base_model().value_head

    def _tokenize_prompts(self, prompts: list) -> tuple:
        ids, *others = super()._tokenize_prompts(prompts)
        return [trimmed(self._tokenizer, *pair) for pair in zip(prompts, ids, strict=True)], *others

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Responses' tokens, generated in groups of `local_rollout_forward_batch_size` prompts of similar length."""
        whole = self.use_vllm or self.sampler_watch is not None
        size = len(prompt_ids) if whole else self.args.local_rollout_forward_batch_size or len(prompt_ids)
        order = list(range(len(prompt_ids)))
        if size < len(prompt_ids):
            order.sort(key=lambda i: len(prompt_ids[i]))  # less padding

        by_decoder = decoder_generates(self) and not any(args[:2])  # no images, nor other inputs beside the tokens
        responses: list[list[int]] = [[] for _ in prompt_ids]
        with fast_sampling(self.accelerator.device, self.sampler_watch):
            for start in range(0, len(order), size):
                group = order[start : start + size]
                ids = [prompt_ids[i] for i in group]
                generated = decode(self, ids) if by_decoder else super()._generate_single_turn(ids, *args, **kwargs)[0]
                for i, response in zip(group, generated, strict=True):
                    responses[i] = response

        self._ended = [bool(ids) and ids[-1] in self.eos_token_ids for ids in responses]
        shortest = self.args.min_completion_length
        if shortest is not None:
            limits = torch.randint(shortest, int(self.args.max_completion_length or 0) + 1, (len(responses),)).tolist()
            responses = [ids[:limit] for ids, limit in zip(responses, limits, strict=True)]
        # None: the sampler's log-probabilities are not used. The policy's own forward gives the old ones.
        return responses, None

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
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        columns = [batch[name].split(chunk or len(batch["prompt_ids"])) for name in names]
        outputs = []
        for prompts, prompt_mask, responses, response_mask in zip(*columns, strict=True):
            # Leave out the padding that only longer rows of the rollout need.
            first = prompts.shape[1] - int(prompt_mask.sum(dim=1).max())
            length = max(1, int(response_mask.sum(dim=1).max()))
            ids = torch.cat([prompts[:, first:], responses[:, :length]], dim=1)
            mask = torch.cat([prompt_mask[:, first:], response_mask[:, :length]], dim=1)
            with self.accelerator.autocast():
                pair = model(input_ids=ids, attention_mask=mask, response_length=length)
            outputs.append([nn.functional.pad(values, (0, responses.shape[1] - length)) for values in pair])

        logps, values = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        return logps, values

    def _scores(self, inputs: list, prompts: list, responses: list, response_ids: list) -> Tensor:
        """Weighted score of each of this process's responses, (B,). Refuses scores that are not finite."""
        by_reward = self._calculate_rewards(inputs, prompts, responses, response_ids)  # gathered: (B * processes, R)
        start = self.accelerator.process_index * len(prompts)
        local = by_reward[start : start + len(prompts)]
        for i, name in enumerate(self.reward_func_names):
            # TRL turns a function's None (no opinion) into NaN. A NaN of its own, `named_failures` has already refused.
            abstains = not isinstance(self.reward_funcs[i], nn.Module)
            values = [None if abstains and math.isnan(value) else value for value in local[:, i].tolist()]
            check_scores(name, values, prompts, responses)
            in_all_processes = self._processes.rows(local[:, i], self.model.training)
            mode = "train" if self.model.training else "eval"
            add_metrics(self._metrics[mode], reward_metrics(name, in_all_processes))
            self._logs["rewards"][name].extend(by_reward[:, i].tolist())

        scores = rl_math.weighted_scores(local, self.reward_weights.to(local.device))
        unscored = scores.isnan()
        if unscored.any():
            at = int(unscored.nonzero()[0, 0])
            raise RewardError(
                f"none of the rewards {self.reward_func_names} has an opinion (all are None) on the response {responses[at]!r} "
                f"to {prompts[at]!r}: leave such prompts out, or add a reward that scores every response"
            )
        if self.args.missing_eos_penalty is not None:
            # Only responses that reached the longest limit: `_ended` is from before the cut at a drawn, shorter one.
            endless = [not ended for ended in self._ended]
            scores = scores - self.args.missing_eos_penalty * torch.tensor(endless, device=scores.device)
        return scores

    def _log_rollout(
        self, mode: str, prompts: list, responses: list, scores: Tensor, batch: dict[str, Tensor], ref_logps: Tensor
    ) -> None:
        """Record the rollout's metrics, adapt the KL coefficient, and stop a run that diverges."""
        training = mode == "train"
        metrics = rollout_metrics(self._processes, batch, ref_logps, scores, responses, training)
        add_metrics(self._metrics[mode], metrics | {"kl_coef": [self.kl_controller.coef]})

        # TRL's table of responses: those of all processes, in the order of their rewards.
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(responses))
        advantages = (batch["advantages"] * batch["completion_mask"]).sum(dim=1)
        self._logs["advantages"].extend(self.accelerator.gather(advantages).tolist())
        columns, means = take_pending(self, len(prompts))
        for name, values in columns.items():
            self._logs["extra"][name].extend(values)
        add_metrics(self._metrics[mode], {name: [mean] for name, mean in means.items()})

        if training:
            episodes = len(metrics["kl"])
            kl = sum(metrics["kl"]) / episodes
            self.kl_controller.update(kl, episodes)
            check_progress(self.args, kl, metrics["distinct"][0])

    # --- update ------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Clipped policy loss + vf_coef * clipped value loss, a mean over the tokens that one optimizer step sees."""
        mask = inputs["completion_mask"]
        logps, values = self._actor_critic(model, inputs)
        policy, clipped = rl_math.policy_loss(logps, inputs["old_logps"], inputs["advantages"], self.args.cliprange)
        value = rl_math.value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)

        mode = "train" if self.model.training else "eval"
        means = self._processes.token_means(mask, policy.detach(), value.detach(), clipped.float())
        for name, mean in zip(("policy_loss", "value_loss", "clip_fraction"), means, strict=True):
            self._metrics[mode][name].append(mean)

        # The rollout's tokens, scaled to one optimizer step's share: each token weighs the same in every minibatch and
        # on every process (DDP averages gradients over processes, hence the division by their number).
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return ((policy + self.args.vf_coef * value) * mask).sum() / tokens

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def _save_rollout(self, folder: Path) -> None:
        """The critic, the KL controller, and this process's rows of the rollout in progress."""
        save_rollout(folder, self._rollout, self.accelerator.process_index)
        if self.args.should_save:
            head = self._value_head
            state = PPOState(self.kl_controller.coef, self._step, head.start, self.accelerator.num_processes)
            save_state(folder, state, head.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        state, value_head = load_state(folder, self.accelerator.num_processes)
        self._value_head.load_state_dict(value_head)
        self._value_head.start, self._first_rollout = state.value_start, False
        self.kl_controller.coef, self._step = state.kl_coef, state.step

        # safetensors loads to no device called "cpu:0", which is the device of a CPU process among several.
        rollout = load_rollout(folder, self.accelerator.process_index)
        self._rollout = rollout and {name: value.to(self.accelerator.device) for name, value in rollout.items()}
        # The rows are in the order of the epoch in progress; the minibatches of later epochs follow from them.
        self._buffered_inputs = self._rows_of_passes(self._rollout) if self._rollout else None
