"""The manifest of an RL run: what the adapter was made from, how, by which rewards, on which prompts, with what result."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

from trl import GRPOConfig, ModelConfig, RLOOConfig

from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.convert import conversion_of, convert
from rsoups.adapters.lineage import fingerprint, settings_of, write_manifest
from rsoups.common.assets import resolve
from rsoups.common.files import hub_commit
from rsoups.common.pickles import holds_only_pickles
from rsoups.data.datasets import LAST_TENTH, is_table
from rsoups.data.training_data import prompt_marks
from rsoups.rewards.load import models_of
from rsoups.training.run_arguments import RunArguments


def convert_pickles(run: RunArguments, model: ModelConfig) -> None:
    """Convert the run's models that exist as pickles only. Every reader then finds the conversion in the cache."""
    sources = [(model.model_name_or_path, model.model_revision), (run.adapter_name_or_path, None)]
    for reward in run.reward:
        sources += models_of(reward)
    for source, revision in sources:
        if source and holds_only_pickles(resolve(source), revision):
            convert(f"{resolve(source)}@{revision}" if revision else resolve(source))


def write_run_manifest(
    run: RunArguments,
    training: GRPOConfig | RLOOConfig,
    model: ModelConfig,
    trainer: Any,
    rewards: list,
    results: dict[str, Any],
    prompts: list,
    held_out: list,
) -> None:
    """Write lineage.json beside the adapter.

    Args:
        run, training, model: Arguments of the run.
        trainer: Trainer after the training.
        rewards: Loaded rewards.
        results: Figures on held-out prompts.
        prompts: Train prompts without the prefixes of responses.
        held_out: Held-out prompts.
    """
    task = run.find_task()
    start = read_adapter(resolve(run.adapter_name_or_path)) if run.adapter_name_or_path else None
    name = str(model.model_name_or_path)
    base = {"model": name, "revision": hub_commit(name, model.model_revision)}

    weights = training.reward_weights or [1.0] * len(rewards)
    cards = [_card_of(reward) | {"weight": weight} for reward, weight in zip(rewards, weights, strict=True)]

    prompts = trainer.train_dataset["prompt"]
    rule = LAST_TENTH if is_table(task, run.dataset) else "the test split"
    data: dict[str, Any] = {"dataset": run.dataset or task.dataset, "split": "train", "task": run.task}
    data |= {"held_out": {"rule": rule, **fingerprint(held_out)}, "prompt_marks": prompt_marks(prompts)}
    data |= {"template": run.template or prompts[0]} | fingerprint(prompts)

    write_manifest(
        str(training.output_dir),
        run.algorithm,
        base=_with_conversion(base, name, model.model_revision),
        recipe="recipes/ppo_reward.py",
        config=settings_of(run, training, model) | {"steps": trainer.state.global_step},
        data=data,
        parent=(str(run.adapter_name_or_path), start.revision, start.sha256) if start else None,
        rewards=cards,
        seed=training.seed,
        results=results,
    )


def _card_of(reward: Any) -> dict[str, Any]:
    card = getattr(reward, "card", None)
    if card is None or not is_dataclass(card):
        return {"name": reward.name}
    fields = asdict(card)  # type: ignore[arg-type]
    return _with_conversion(fields, fields.get("model"), fields.get("revision"))


def _with_conversion(entry: dict[str, Any], source: str | None, revision: str | None) -> dict[str, Any]:
    """A manifest's entry, with the hashes of the source's pickle and of its conversion if it was converted."""
    conversion = conversion_of(resolve(source), revision) if source else None
    return entry | {"conversion": conversion} if conversion else entry
