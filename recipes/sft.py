"""Supervised fine-tuning of a policy on a task's reference responses: the common start of all PPO runs.

    accelerate launch recipes/sft.py --model_name_or_path BASE --task concepts --dataset rows.jsonl --output_dir runs/sft
    accelerate launch recipes/sft.py --config recipes/configs/embedded-sft.yaml

From an installed package: `accelerate launch -m rsoups.recipes.sft ...`, or `rsoups sft ...` on one process.

How this differs from the paper: that starts from a published Alpaca adapter; this makes such a start from any base
(`--use_peft` for an adapter, else full weights). The loss is over the response only. Prompt and response are tokenized apart,
as they are at generation, so that no token ever spans the two.
"""

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from rsoups.adapters.lineage import fingerprint, settings_of, write_manifest
from rsoups.bases.load import load_base, load_tokenizer
from rsoups.common.errors import in_one_line
from rsoups.common.files import hub_commit, writing
from rsoups.data.datasets import is_table, load_rows
from rsoups.data.tasks import TASKS
from rsoups.data.training_data import prompt_marks
from rsoups.training.callbacks import launcher_callbacks
from rsoups.training.flags import FlagParser
from rsoups.training.policy import name_base


@dataclass
class ScriptArguments:
    task: str = field(default="concepts", metadata={"help": "Task that writes the prompts.", "choices": sorted(TASKS)})
    dataset: str | None = field(
        default=None,
        metadata={"help": "File (its last tenth is held out), folder or Hub id; the task's own dataset if unset."},
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out rows: file, folder or Hub id."})


def tokenized(rows: list[dict], tokenizer: Any) -> Dataset:
    """One example per reference: `input_ids`, and `completion_mask` = 1 on the response and its end token."""
    pairs = [(row["prompt"], reference) for row in rows for reference in row["references"]]
    prompts = tokenizer([p for p, _ in pairs])["input_ids"]
    responses = tokenizer([r for _, r in pairs], add_special_tokens=False)["input_ids"]
    responses = [ids + [tokenizer.eos_token_id] for ids in responses]
    return Dataset.from_dict(
        {
            "input_ids": [p + r for p, r in zip(prompts, responses, strict=True)],
            "completion_mask": [[0] * len(p) + [1] * len(r) for p, r in zip(prompts, responses, strict=True)],
        }
    )


class ResponseSFTTrainer(SFTTrainer):
    """SFTTrainer whose LM head sees response positions only, on the CPU too.

    TRL's fused head skips the prompt's positions where it runs on Triton; elsewhere it projects them all to the
    vocabulary and then masks them, about three quarters of a small model's step.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if inputs["input_ids"].device.type != "cpu" or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        causal_lm = self.accelerator.unwrap_model(model)
        causal_lm = causal_lm.get_base_model() if hasattr(causal_lm, "peft_config") else causal_lm
        labels = inputs["labels"][:, 1:]
        scored = labels != -100
        with self.accelerator.autocast():
            hidden = causal_lm.base_model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).last_hidden_state[:, :-1]
            logits = causal_lm.get_output_embeddings()(hidden[scored])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[scored], reduction="sum")
        return loss / (scored.sum() if num_items_in_batch is None else num_items_in_batch)


def main(script: ScriptArguments, training: SFTConfig, model: ModelConfig) -> None:
    task, name = TASKS[script.task], str(model.model_name_or_path)
    tokenizer = load_tokenizer(name, revision=model.model_revision)
    training.completion_only_loss = True
    # PEFT looks for the base's config under its published name, to see whether the vocabulary grew. It did not.
    warnings.filterwarnings("ignore", message="Could not find a config file in")

    held_out = None
    if script.eval_dataset:
        another_file = script.eval_dataset != script.dataset and is_table(task, script.eval_dataset)
        held_out = tokenized(load_rows(task, script.eval_dataset, "all" if another_file else "test"), tokenizer)
    rows = load_rows(task, script.dataset, "train")
    data: dict[str, Any] = {"dataset": script.dataset or task.dataset, "split": "train", "task": script.task}
    data |= fingerprint([row["prompt"], row["references"]] for row in rows)
    data |= {"prompt_marks": prompt_marks(row["prompt"] for row in rows)}

    base = load_base(
        name,
        trust_remote_code=training.trust_remote_code,
        revision=model.model_revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        quantization_config=get_quantization_config(model),
    )
    trainer = ResponseSFTTrainer(
        model=base,
        args=training,
        train_dataset=tokenized(rows, tokenizer),
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        callbacks=launcher_callbacks(),
    )
    if model.use_peft:
        name_base(trainer.model, model)
    with writing(str(training.output_dir)):
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
    if trainer.accelerator.is_main_process:
        assert training.output_dir is not None  # TrainingArguments has set its default
        write_manifest(
            training.output_dir,
            "sft",
            base={"model": name, "revision": hub_commit(name, model.model_revision)},
            recipe="recipes/sft.py",
            config=settings_of(script, training, model) | {"steps": trainer.state.global_step},
            data=data,
            seed=training.seed,
        )
    if held_out is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        trainer.accelerator.print(metrics)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with in_one_line():
        example = "--base user/base --task news --use-peft --out runs/sft"
        main(*FlagParser((ScriptArguments, SFTConfig, ModelConfig), __doc__, example).read())
