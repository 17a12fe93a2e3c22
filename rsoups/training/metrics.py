"""PPO's metrics: sums over all processes, the figures of a rollout, and the limits that stop a run."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rsoups.common.errors import TrainingError
from rsoups.training.ppo_config import PPOConfig

_COLLAPSED = 0.05  # share of distinct responses below which a run warns

logger = logging.getLogger(__name__)


class Processes:
    """Sums and lists over all processes of a run.

    Args:
        accelerator: Accelerator of the trainer.
    """

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def sum(self, value: Tensor) -> Tensor:
        return self._accelerator.reduce(value, reduction="sum")

    def rows(self, values: Any, training: bool) -> list:
        """Join each process's list or (B,) tensor, a value for each response.

        Args:
            values: Values of this process, one for each response.
            training: False in an evaluation, where accelerate fills up the last batch with rows that do not count.
        """
        is_list = isinstance(values, list)
        if training:
            return gather_object(values) if is_list else self._accelerator.gather(values).tolist()
        joined = self._accelerator.gather_for_metrics(values, use_gather_object=is_list)
        return joined if isinstance(joined, list) else joined.tolist()

    def token_means(self, mask: Tensor, *values: Tensor) -> list[float]:
        """Mean of each tensor over the real tokens of all processes.

        Args:
            mask: 1 = real token, (B, T).
            values: One tensor or more, each (B, T).
        """
        sums = [(value.double() * mask).sum() for value in (torch.ones_like(values[0]), *values)]
        count, *totals = self.sum(torch.stack(sums)).tolist()
        return [total / max(count, 1) for total in totals]


def rollout_metrics(
    processes: Processes, batch: dict[str, Tensor], ref_logps: Tensor, scores: Tensor, responses: list, training: bool
) -> dict[str, list[float]]:
    """The figures of a rollout over all processes, by the names that `PPOTrainer` documents.

    Args:
        batch: Rollout with `completion_mask`, `old_logps`, `old_values` and `returns`, each (B, T).
        ref_logps: Log-probabilities under the reference, (B, T).
        scores: Weighted score of each response, (B,).
        responses: Texts.
        training: False in an evaluation.
    """
    mask, logps = batch["completion_mask"], batch["old_logps"]
    returns, errors = batch["returns"], batch["returns"] - batch["old_values"]

    kls = processes.rows(((logps - ref_logps) * mask).sum(dim=1), training)
    (entropy,) = processes.token_means(mask, -logps)
    mean, square, error, squared_error = processes.token_means(mask, returns, returns**2, errors, errors**2)
    texts = processes.rows(responses, training)
    return {
        "reward": processes.rows(scores, training),
        "kl": kls,
        "entropy": [entropy],
        "explained_variance": [1 - (squared_error - error**2) / max(square - mean**2, 1e-8)],
        "distinct": [len(set(map(str, texts))) / len(texts)],
    }


def reward_metrics(name: str, scores: list[float]) -> dict[str, list[float]]:
    """A reward's scores, and the share of responses that it abstains from (NaN), where there are any."""
    answered = [score for score in scores if not math.isnan(score)]
    metrics = {f"rewards/{name}": answered} if answered else {}
    if len(answered) < len(scores):
        metrics[f"abstained/{name}"] = [1 - len(answered) / len(scores)]
    return metrics


def take_pending(trainer: Any, count: int) -> tuple[dict[str, list], dict[str, float]]:
    """Empty the buffers that rewards filled through TRL's `log_extra` and `log_metric`, over all processes.

    A reward may log on one process only. So all processes first agree on the names, in one order: each name is a
    collective operation, which all of them must take part in.

    Args:
        trainer: PPOTrainer; its `_pending_extra_logs` and `_pending_metrics` are emptied.
        count: Responses of this process.

    Returns:
        Columns of the table of responses, and means of the metrics.
    """
    columns, means = {}, {}
    for name in sorted(set(gather_object(list(trainer._pending_extra_logs)))):
        columns[name] = gather_object(trainer._pending_extra_logs.get(name, [None] * count))
    for name in sorted(set(gather_object(list(trainer._pending_metrics)))):
        values = trainer._pending_metrics.get(name, [])
        pair = torch.tensor([sum(values), len(values)], dtype=torch.float64, device=trainer.accelerator.device)
        total, number = trainer.accelerator.reduce(pair, reduction="sum").tolist()
        means[name] = total / number

    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()
    return columns, means


def add_metrics(into: defaultdict[str, list], metrics: dict[str, list[float]]) -> None:
    """Append values to TRL's lists, whose means TRL logs."""
    for name, values in metrics.items():
        into[name] += values


def check_progress(args: PPOConfig, kl: float, distinct: float) -> None:
    """Warn of a policy that diverges or collapses, and stop it at the limits of the config.

    Args:
        args: Settings; `kl_limit` and `min_distinct` are the limits.
        kl: KL to the reference, nats per response.
        distinct: Share of the responses that differ.

    Raises:
        TrainingError: A limit is passed.
    """
    limit = args.kl_limit
    remedy = "raise kl_coef, lower learning_rate, or normalize the reward; earlier checkpoints are valid"
    if limit is not None and kl > limit:
        raise TrainingError(f"KL is {kl:.1f} nats per response, above kl_limit {limit:g}: {remedy}")
    if distinct < args.min_distinct:
        raise TrainingError(f"{distinct:.0%} of the responses differ, below min_distinct: {remedy}")
    if limit is not None and kl > limit / 2:
        logger.warning("KL is %.1f nats per response and stops the run at %g: %s", kl, limit, remedy)
    if distinct < _COLLAPSED:
        logger.warning("only %.0f%% of the responses differ: %s", 100 * distinct, remedy)
