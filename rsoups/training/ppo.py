"""PPO on TRL's online loop: GRPOTrainer generates, scores, buffers and resumes; here are the critic and the losses.

The critic is a linear value head on the policy's own backbone: one forward gives log-probabilities and values.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler, pad, shuffle_sequence_dict, split_tensor_dict, use_adapter

from rsoups.common.errors import DatasetError, OutputError, RewardError, SettingsError, TrainingError
from rsoups.common.files import only_run_in
from rsoups.generation.decoding import trimmed
from rsoups.generation.sampling import fast_sampling
from rsoups.generation.settings import sample_purely
from rsoups.rewards.interface import check_scores
from rsoups.training import first_step, rl_math
from rsoups.training.actor_critic import ValueHead, add_actor_critic_forward
from rsoups.training.callbacks import Interrupt, PPOProgress
from rsoups.training.checkpoints import finish_checkpoint, last_checkpoint
from rsoups.training.ppo_config import PPOConfig
from rsoups.training.trl_rewards import named_failures

_VALUE_HEAD = "value_head.safetensors"
_STATE = "ppo_state.json"
_PARTIAL = ".partial"  # where a checkpoint is written
_ROLLOUT = "rollout-{}.safetensors"  # one for each process
_PROBED_TOKENS = 8  # of each of two responses that are looked at before the first step
_COLLAPSED = 0.05  # share of distinct responses below which a warning is due

logger = logging.getLogger(__name__)


class PPOTrainer(GRPOTrainer):
    """Proximal policy optimization of a LoRA adapter against one reward, or a weighted sum of several (MORL).

    Takes GRPOTrainer's arguments. The reference is the base with the adapter off where `peft_config` makes a fresh
    adapter, and a frozen copy of the adapter where `model` is a PeftModel that is trained on (the paper's Alpaca case).

    Metrics are means since the last log, over all processes. Of each rollout: ``reward`` (weighted score of a response,
    penalties of length included, KL not), ``rewards/NAME`` (one reward's score), ``abstained/NAME`` (share of its None,
    which the other means leave out), ``kl`` (k1 estimate to the reference, summed over a response's tokens, in nats),
    ``kl_coef`` (β that the rollout was penalized with), ``entropy`` (-log p of the sampled tokens, nats per token),
    ``explained_variance`` (of the returns by the rollout's values), ``distinct`` (share of the responses that differ; near
    0 is a collapsed policy, or a reward that asks for one answer), ``completions/...`` (tokens of a response, end token
    included: mean, min, max; ``clipped_ratio`` of them ended at the limit; ``terminated``: of those that ended by
    themselves), ``num_tokens`` (prompts and responses so far). Of each step of the optimizer: ``policy_loss`` and
    ``value_loss`` (means over its response tokens), ``clip_fraction`` (tokens whose ratio was clipped), ``loss``,
    ``grad_norm`` (before clipping), ``learning_rate``, ``step_time`` (seconds).

    Differs by design from TRL 1.12's PPOTrainer, whose advantages, returns and losses it has on the same rollout: the critic
    is a head on the policy, not a second model, and starts at the first rollout's mean score; an episode ends at its end
    token, not a state later; every token of a rollout weighs the same, in whatever minibatch it is; responses are scored as
    texts, by any tokenizer; β adapts; no dropout.
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
        super().__init__(model, [named_failures(reward) for reward in rewards], args, **kwargs)
        if not isinstance(self.model, PeftModel):
            raise ValueError("PPOTrainer trains a LoRA adapter: pass a peft_config, or a PeftModel to train on")
        self._check_rewards()
        causal_lm: Any = self.model.get_base_model()
        self._not_inherited = sample_purely(causal_lm)
        if args.disable_dropout:
            first_step.silence_noise(self.model)  # TRL switches nn.Dropout off and leaves dropout in functions on
        if kwargs.get("peft_config") is not None:
            reset_adapter(self.model, args.adapter_init_seed)
        # On the base, where the adapter's own files never include it; checkpoints hold it beside them.
        causal_lm.value_head = ValueHead(causal_lm.config.get_text_config().hidden_size, self.model.device)
        self._first_rollout = True
        add_actor_critic_forward(causal_lm, self.temperature)
        if self.use_vllm:
            hide_value_head(self.vllm_generation)
        self._saving = False
        self._checked = False
        self._watch: first_step.Sampler | None = None
        self._ended: list[bool] = []  # whether each response of the last rollout ended by itself
        self._rollout: dict[str, Any] | None = None
        self.kl_controller = rl_math.KLController(args.kl_coef, args.kl_target, args.kl_horizon)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(PPOProgress())

    def _check_rewards(self) -> None:
        names = self.reward_func_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SettingsError(f"several rewards are called {twice[0]!r}, and their logs would be mixed: rename one")
        weights = self.reward_weights.tolist()
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise SettingsError(f"reward_weights are {weights}: they must be finite, and one at least must not be 0")

    # --- rollout -----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A rollout: generate, score, estimate advantages. See `_rollout_tensors` for what it holds."""
        mode = "train" if self.model.training else "eval"
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, response_ids, _, responses, *_ = self._generate(prompts)
        batch = self._rollout_tensors(prompt_ids, response_ids)
        mask = batch["completion_mask"]

        # Without gradients there is room for more rows than the update has at one time.
        chunk = max(self.args.per_device_train_batch_size or 1, self.args.per_device_eval_batch_size)
        checkpointing: Any = self.args.activation_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing):
            logps, values = self._actor_critic(self.model, batch, chunk)
            ref_logps = self._reference_logps(batch, chunk)

        scores = self._scores(inputs, prompts, responses, response_ids)
        if self._first_rollout and mode == "train":
            self._first_rollout = False
            self._value_head.start = self.accelerator.gather(scores).mean().item()
            values = values + self._value_head.start * mask
        rewards = rl_math.kl_penalized_rewards(scores, logps, ref_logps, mask, self.kl_controller.coef)
        advantages, returns = rl_math.gae(rewards, values, mask, self.args.gamma, self.args.lam)
        batch["advantages"] = rl_math.masked_whiten(advantages, mask, self._sum_over_processes)
        batch |= {"old_logps": logps, "old_values": values, "returns": returns}
        tokens = self._sum_over_processes(mask.sum().float())
        batch["num_items_in_batch"] = tokens
        self._log_rollout(mode, prompts, responses, scores, batch, ref_logps)
        return batch

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        """TRL's dataloader, whose batches are a process's prompts of one rollout."""
        if kwargs.get("is_training"):
            # TRL's number, unless processes take turns and a pass over the rollout has more steps than rows.
            batch_size = int(self.args.generation_batch_size or 0) // self.accelerator.num_processes
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """This process's rows of the next pass: of a new rollout where the last one was gone through.

        Each PPO epoch draws the minibatches of the rollout anew, as TRL 1.12 does.
        """
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        if not self._checked:
            self._checked = True
            self._check_first_step([row["prompt"] for row in generation_batch])
        passes = int(self.args.steps_per_generation or 1)
        if self._rollout is None or self._step % (passes * self.num_iterations) == 0:
            self._rollout, self._buffered_inputs = self._generate_and_score_completions(generation_batch), None
        if self._buffered_inputs is None or self._step % passes == 0:
            rollout: Any = shuffle_sequence_dict(self._rollout)  # type: ignore[arg-type]
            self._rollout, self._buffered_inputs = rollout, self._rows_of_passes(rollout)
        return self._buffered_inputs[self._step % passes]

    def _check_first_step(self, prompts: list) -> None:
        """Refuse a run that would optimize another policy than the one that writes; one line where all is well.

        Looks at the first two prompts, and leaves all random numbers as they were.

        Raises:
            TrainingError: Two forwards differ, the sampler has other log-probabilities, or the policy is not its reference.
        """
        config: Any = getattr(self, "generation_config", None)
        prompts = prompts[:2]
        watches = config is not None and not (self.use_vllm or self.args.use_transformers_continuous_batching)
        sampler = self._watch = first_step.Sampler() if watches else None
        limit = config.max_new_tokens if watches else None
        with first_step.same_random_numbers(), torch.no_grad():
            try:
                if watches:
                    config.max_new_tokens = min(int(limit or 1), _PROBED_TOKENS)
                prompt_ids = self._tokenize_prompts(prompts)[0]
                responses, _ = self._generate_single_turn(prompt_ids, None, {}, 1)
            finally:
                self._watch = None
                if watches:
                    config.max_new_tokens = limit
            responses = [ids[:_PROBED_TOKENS] for ids in responses]
            batch = self._rollout_tensors(prompt_ids, responses)
            logps = self._actor_critic(self.model, batch)[0]
            if self.args.disable_dropout:
                first_step.check_no_noise(self.model, lambda: self._actor_critic(self.model, batch)[0])
            ref_logps = self._reference_logps(batch)

        told = []
        half = self.args.bf16 or self.args.fp16 or logps.dtype != torch.float32 or self.model.dtype != torch.float32
        sampled = sampler.of(responses) if sampler else []
        if sampled:
            apart = first_step.check_sampler(sampled, list(logps), half)
            told.append(f"log p of sampler and update agree (to {apart:.0e} nats)")
        if self.state.global_step == 0 and self.args.disable_dropout:
            kl = float(
                ((logps - ref_logps) * batch["completion_mask"]).sum() / batch["completion_mask"].sum().clamp(min=1)
            )
            first_step.check_references(
                kl, "the base" if "ref" not in self.model.peft_config else "the adapter's start"
            )
            told += ["KL to the reference is 0", "no dropout"]
        if self._not_inherited:
            told.append(f"not inherited from the base's generation_config: {', '.join(self._not_inherited)}")
        self.accelerator.print(f"checked  {'; '.join(told)}")

    def _reference_logps(self, batch: dict[str, Tensor], chunk: int | None = None) -> Tensor:
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return self._actor_critic(self.model, batch, chunk)[0]

    def _rows_of_passes(self, rollout: dict[str, Any]) -> list[dict[str, Any]]:
        """A process's rows of each pass. Where processes take turns, its rows of the other steps have no tokens."""
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
        at_once = self.use_vllm or self._watch is not None
        size = len(prompt_ids) if at_once else self.args.local_rollout_forward_batch_size or len(prompt_ids)
        # Prompts of one length together, where they are not all generated from at one time: less padding.
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i])) if size < len(prompt_ids) else None
        queue = prompt_ids if order is None else [prompt_ids[i] for i in order]
        responses: list[list[int]] = []
        with fast_sampling(self.accelerator.device, self._watch):
            for start in range(0, len(queue), size):
                responses += super()._generate_single_turn(queue[start : start + size], *args, **kwargs)[0]
        if order is not None:
            responses = [ids for _, ids in sorted(zip(order, responses, strict=True), key=lambda pair: pair[0])]
        self._ended = [bool(ids) and ids[-1] in self.eos_token_ids for ids in responses]
        if (shortest := self.args.min_completion_length) is not None:
            limits = torch.randint(shortest, int(self.args.max_completion_length or 0) + 1, (len(responses),)).tolist()
            responses = [ids[:limit] for ids, limit in zip(responses, limits, strict=True)]
        return responses, None  # vLLM's log-probabilities are not used: the policy's own forward gives the old ones

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
        parts = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        outputs = []
        for rows in zip(*(batch[name].split(chunk or len(batch["prompt_ids"])) for name in parts), strict=True):
            asked, asked_mask, said, said_mask = rows
            # Without the columns that only longer rows of the rollout need.
            before, length = int(asked_mask.sum(dim=1).max()), max(1, int(said_mask.sum(dim=1).max()))
            ids = torch.cat([asked[:, asked.shape[1] - before :], said[:, :length]], dim=1)
            mask = torch.cat([asked_mask[:, asked.shape[1] - before :], said_mask[:, :length]], dim=1)
            with self.accelerator.autocast():
                pair = model(input_ids=ids, attention_mask=mask, response_length=length)
            outputs.append([nn.functional.pad(values, (0, said.shape[1] - length)) for values in pair])
        logps, values = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        return logps, values

    def _scores(self, inputs: list, prompts: list, responses: list, response_ids: list) -> Tensor:
        """Weighted score of each of this process's responses, (B,). Refuses scores that are not finite."""
        by_reward = self._calculate_rewards(inputs, prompts, responses, response_ids)  # gathered: (B * processes, R)
        start = self.accelerator.process_index * len(prompts)
        local = by_reward[start : start + len(prompts)]
        for i, name in enumerate(self.reward_func_names):
            # TRL writes a function's None, no opinion, as NaN; NaN itself `named_failures` has refused.
            abstains = not isinstance(self.reward_funcs[i], nn.Module)
            values = [None if abstains and math.isnan(value) else value for value in local[:, i].tolist()]
            check_scores(name, values, prompts, responses)
            self._log_reward(name, self._of_all(local[:, i]))
            self._logs["rewards"][name].extend(by_reward[:, i].tolist())
        scores = rl_math.weighted_scores(local, self.reward_weights.to(local.device))
        if (unscored := scores.isnan()).any():
            at = int(unscored.nonzero()[0, 0])
            raise RewardError(
                f"none of the rewards {self.reward_func_names} has an opinion (all are None) on the response {responses[at]!r} "
                f"to {prompts[at]!r}: leave such prompts out, or add a reward that scores every response"
            )
        if self.args.missing_eos_penalty is not None:
            # Of responses that would have ended but for their own limit, drawn below the longest, none is punished.
            endless = [not ended for ended in self._ended]
            scores = scores - self.args.missing_eos_penalty * torch.tensor(endless, device=scores.device)
        return scores

    def _log_reward(self, name: str, values: list[float]) -> None:
        """A reward's scores, and the share of responses on which it has no opinion, where there are any."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        answered = [value for value in values if not math.isnan(value)]
        if answered:
            metrics[f"rewards/{name}"] += answered
        if len(answered) < len(values):
            metrics[f"abstained/{name}"].append(1 - len(answered) / len(values))

    def _of_all(self, values: Any) -> list:
        """What each response of all processes has; in an evaluation without those that only fill up its last batch."""
        if self.model.training:
            return gather_object(values) if isinstance(values, list) else self.accelerator.gather(values).tolist()
        found = self.accelerator.gather_for_metrics(values, use_gather_object=isinstance(values, list))
        return found if isinstance(found, list) else found.tolist()

    def _sum_over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, reduction="sum")

    def _token_means(self, mask: Tensor, *values: Tensor) -> list[float]:
        """Mean of each of some (B, T) over the real tokens of all processes."""
        sums = [(value.double() * mask).sum() for value in (torch.ones_like(values[0]), *values)]
        count, *totals = self._sum_over_processes(torch.stack(sums)).tolist()
        return [total / max(count, 1) for total in totals]

    def _log_rollout(
        self, mode: str, prompts: list, responses: list, scores: Tensor, batch: dict[str, Tensor], ref_logps: Tensor
    ) -> None:
        """Record the rollout's metrics, and adapt the KL coefficient."""
        mask, logps = batch["completion_mask"], batch["old_logps"]
        kls = self._of_all(((logps - ref_logps) * mask).sum(dim=1))
        kl = sum(kls) / len(kls)
        metrics = self._metrics[mode]
        metrics["reward"] += self._of_all(scores)
        metrics["kl"] += kls
        metrics["entropy"].append(self._token_means(mask, -logps)[0])
        metrics["kl_coef"].append(self.kl_controller.coef)
        returns, errors = batch["returns"], batch["returns"] - batch["old_values"]
        mean, square, error, squared_error = self._token_means(mask, returns, returns**2, errors, errors**2)
        metrics["explained_variance"].append(1 - (squared_error - error**2) / max(square - mean**2, 1e-8))
        # Of all processes, in the order of their rewards.
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(responses))
        self._logs["advantages"].extend(self.accelerator.gather((batch["advantages"] * mask).sum(dim=1)).tolist())
        self._flush_pending(mode, len(prompts))
        every = self._of_all(responses)
        metrics["distinct"].append(len(set(map(str, every))) / len(every))
        if mode == "train":
            self.kl_controller.update(kl, len(every))
            self._stop_in_vain(kl, metrics["distinct"][-1])

    def _flush_pending(self, mode: str, count: int) -> None:
        """What rewards told TRL's `log_metric` and `log_extra`, of all processes, in one order on all of them."""
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [None] * count)
            self._logs["extra"][column].extend(gather_object(values))
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            told = torch.tensor([sum(values), len(values)], dtype=torch.float64, device=self.accelerator.device)
            total, number = self._sum_over_processes(told).tolist()
            self._metrics[mode][name].append(total / number)
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()

    def _stop_in_vain(self, kl: float, distinct: float) -> None:
        """Warn of a policy that runs away or collapses, and stop it at the limits of the config."""
        limit = self.args.kl_limit
        remedy = "raise kl_coef, lower learning_rate, or normalize the reward; checkpoints from before are good"
        if limit is not None and kl > limit:
            raise TrainingError(f"KL is {kl:.1f} nats per response, above kl_limit {limit:g}: {remedy}")
        if distinct < self.args.min_distinct:
            raise TrainingError(f"{distinct:.0%} of the responses differ, below min_distinct: {remedy}")
        if limit is not None and kl > limit / 2:
            logger.warning("KL is %.1f nats per response and stops the run at %g: %s", kl, limit, remedy)
        if distinct < _COLLAPSED:
            logger.warning("only %.0f%% of the responses differ: %s", 100 * distinct, remedy)

    # --- update ------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Clipped policy loss + vf_coef * clipped value loss, a mean over the tokens that one optimizer step sees."""
        mask = inputs["completion_mask"]
        logps, values = self._actor_critic(model, inputs)
        policy, clipped = rl_math.policy_loss(logps, inputs["old_logps"], inputs["advantages"], self.args.cliprange)
        value = rl_math.value_loss(values, inputs["old_values"], inputs["returns"], self.args.cliprange_value)
        mode = "train" if self.model.training else "eval"
        means = self._token_means(mask, policy.detach(), value.detach(), clipped.float())
        for name, mean in zip(("policy_loss", "value_loss", "clip_fraction"), means, strict=True):
            self._metrics[mode][name].append(mean)
        # The rollout's tokens, scaled to one optimizer step's share: each token weighs the same in every minibatch and
        # on every process (DDP averages gradients over processes, hence the division by their number).
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        if mode == "train":
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return ((policy + self.args.vf_coef * value) * mask).sum() / tokens

    # --- the run, and its checkpoints -----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; True goes on from the newest complete checkpoint in `output_dir`, or begins where there is none.

        On the CPU a resumed run ends with the adapter of an uninterrupted one, bit for bit, wherever it was cut.

        Raises:
            DatasetError: Fewer prompts than one rollout takes.
            OutputError: Another run is training into `output_dir`, or a checkpoint cannot be written.
            TrainingError: The run would go on in vain.
        """
        self._check_prompts(self.train_dataset)
        folder = str(self.args.output_dir)
        checkpoint: Any = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = last_checkpoint(folder)
        with only_run_in(folder) if self.args.should_save else nullcontext(), self._interruptible():
            return super().train(checkpoint and str(checkpoint), trial, ignore_keys_for_eval)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; in the middle of a training the random numbers of the training go on as if it had not been."""
        if not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        with first_step.same_random_numbers():
            return super().evaluate(*args, **kwargs)

    def _check_prompts(self, dataset: Any) -> None:
        needed = int(self.args.generation_batch_size or 0) // int(self.num_generations or 1)
        if hasattr(dataset, "__len__") and len(dataset) < needed:
            raise DatasetError(
                f"{len(dataset)} prompts are fewer than one rollout of {needed} needs: add some, or lower "
                "generation_batch_size"
            )

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C saves a checkpoint after the step and stops; the second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        interrupt = Interrupt(self.accelerator)
        self.add_callback(interrupt)
        before = signal.signal(signal.SIGINT, interrupt.handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self.remove_callback(interrupt)
        if interrupt.asked:
            self.accelerator.print(f"stopped at step {self.state.global_step}; resume_from_checkpoint=True goes on")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A step with such a gradient would make every weight NaN. (fp16's scaler skips these steps itself.)
        if not self.args.fp16 and not math.isfinite(norm):
            raise TrainingError(
                f"the gradient is {float(norm)} at step {self.state.global_step + 1}: the step is not taken, and "
                "checkpoints before it are good; lower learning_rate, or normalize the reward"
            )
        return norm

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's sampler draws each epoch from the last one's state, which a resumed run has not got."""
        s: Any = super()._get_train_sampler(dataset)
        return EpochSampler(s.data_source, s.mini_repeat_count, s.batch_size, s.repeat_count, s.shuffle, s.seed)

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / _PARTIAL) if self._saving else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """TRL's and Trainer's files and ours, written elsewhere and renamed when all processes are done."""
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._save_rollout(run / _PARTIAL / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish_checkpoint(run / _PARTIAL / name, run / name)
                best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best) if best.is_dir() else None
                rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint)
        except OSError as error:
            raise OutputError(f"cannot write {run / name}: {error.strerror or error}; earlier ones are good") from error
        finally:
            self._saving = False
            if self.args.should_save:
                shutil.rmtree(run / _PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save_rollout(self, folder: Path) -> None:
        """The critic, the KL controller, and this process's rows of the rollout that is being gone through."""
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in (self._rollout or {}).items()},
            folder / _ROLLOUT.format(self.accelerator.process_index),
        )
        if self.args.should_save:
            head = {key: value.detach().cpu().contiguous() for key, value in self._value_head.state_dict().items()}
            save_file(head, folder / _VALUE_HEAD)
            state = {"kl_coef": self.kl_controller.coef, "step": self._step, "value_start": self._value_head.start}
            state["processes"] = self.accelerator.num_processes
            (folder / _STATE).write_text(json.dumps(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        self._value_head.load_state_dict(load_file(folder / _VALUE_HEAD))
        state = json.loads((folder / _STATE).read_text())
        self.kl_controller.coef, self._step = state["kl_coef"], state["step"]
        self._value_head.start, self._first_rollout = state["value_start"], False
        now = self.accelerator.num_processes
        if (before := state.get("processes", now)) != now:
            raise SettingsError(
                f"{folder} was written by {before} processes, each with its part of a rollout, and {now} would go on: resume "
                f"with --num_processes {before}"
            )
        # safetensors takes no device "cpu:0", which is what a process of several on a CPU has.
        rollout = load_file(folder / _ROLLOUT.format(self.accelerator.process_index))
        self._rollout = {key: value.to(self.accelerator.device) for key, value in rollout.items()} or None
        # The rows are as the epoch in progress has them, and its later minibatches follow from that.
        self._buffered_inputs = self._rows_of_passes(self._rollout) if self._rollout else None


class EpochSampler(RepeatSampler):
    """TRL's RepeatSampler, with an order for each epoch that depends on the seed and the epoch only."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


def hide_value_head(generation: Any) -> None:
    """Leave the critic out of the weights that TRL's `VLLMGeneration` hands to vLLM, which knows no such parameter."""
    every = generation._iter_named_params
    generation._iter_named_params = lambda: (pair for pair in every() if not pair[0].startswith("value_head."))


def reset_adapter(model: PeftModel, seed: int) -> None:
    """Draw a fresh LoRA adapter's weights anew from `seed`: A as PEFT initializes it, B zero.

    Adapters that will share a soup should share their start (Ramé et al. 2023, section 2.2), while each run keeps its
    own seed for data and sampling.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed
        )  # the CPU's alone: torch.manual_seed would seed every GPU's sampling too
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name in module.active_adapters:
                    _reset(module, name)


def _reset(module: LoraLayer, name: str) -> None:
    """Reset one adapter's factors on the CPU, so that every device starts from the same numbers."""
    factors = [kind[name] for kind in (module.lora_A, module.lora_B) if name in kind]
    parameters = [parameter for factor in factors for parameter in factor.parameters()]
    parameters += [kind[name] for kind in (module.lora_embedding_A, module.lora_embedding_B) if name in kind]
    devices = [parameter.device for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.cpu()
    module.reset_lora_parameters(name, init_lora_weights=True)
    for parameter, device in zip(parameters, devices, strict=True):
        parameter.data = parameter.data.to(device)
