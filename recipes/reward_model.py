"""Train a reward model on preference pairs: a sequence classifier with one logit, by TRL's RewardTrainer.

    accelerate launch recipes/reward_model.py --model_name_or_path BASE --dataset pairs.jsonl --output_dir runs/reward
    accelerate launch recipes/reward_model.py --config recipes/configs/embedded-coverage.yaml

Rows are `prompt, chosen, rejected`, texts or messages; of messages, chosen and rejected may also begin with the prompt. The
model reads tokenizer(question, response), the question taken out of the prompt as it is when the reward is used later, so
that training and scoring see the same input. The loss is Bradley-Terry's (Ouyang et al. 2022, eq. 1). Ends with the pairwise
accuracy on `--eval_dataset`. With `--use_peft` an adapter is written, which is a reward as a whole model is: `rsoups score
--reward runs/reward ...`.
"""

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer, TrlParser, get_peft_config

from rsoups.common.assets import resolve
from rsoups.common.errors import in_one_line
from rsoups.common.files import read_jsonl
from rsoups.data.prompts import pair_of
from rsoups.rewards.inputs import encode_pairs


@dataclass
class ScriptArguments:
    dataset: str = field(metadata={"help": "JSONL file of rows prompt, chosen, rejected."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out pairs, in the same form."})


def tokenized(rows: list[dict], tokenizer, max_length: int) -> Dataset:
    questions, *sides = zip(*map(pair_of, rows), strict=True)
    columns = {}
    for name, responses in zip(("chosen", "rejected"), sides, strict=True):
        encoded = encode_pairs(tokenizer, questions, responses, max_length)
        columns[f"{name}_ids"] = [e["input_ids"] for e in encoded]
    return Dataset.from_dict(columns)


def lora(model: ModelConfig, untrained: list[str]):
    """The adapter's config, which keeps the parameters that the base has not: they are drawn anew for each model."""
    config = get_peft_config(model)
    if config is None:
        return None
    config.task_type = "SEQ_CLS"
    # PEFT keeps the modules `classifier` and `score` by itself.
    others = {name.rpartition(".")[0] for name in untrained if name.partition(".")[0] not in ("classifier", "score")}
    config.modules_to_save = sorted({*(config.modules_to_save or []), *others}) or None
    return config


def main(script: ScriptArguments, training: RewardConfig, model: ModelConfig) -> None:
    name = resolve(model.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model.model_revision)
    # RewardTrainer wants one; pairs end with it already.
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    set_seed(training.seed)  # the head is drawn here
    classifier, found = AutoModelForSequenceClassification.from_pretrained(
        name,
        revision=model.model_revision,
        num_labels=1,
        dtype=getattr(torch, model.dtype or "float32"),
        use_safetensors=True,
        output_loading_info=True,
    )
    max_length = training.max_length or 512
    held_out = None
    if script.eval_dataset:
        held_out = tokenized(read_jsonl(script.eval_dataset), tokenizer, max_length)
    trainer = RewardTrainer(
        model=classifier,
        args=training,
        train_dataset=tokenized(read_jsonl(script.dataset), tokenizer, max_length),
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora(model, sorted(found["missing_keys"])),
    )
    if model.use_peft:  # the adapter names its base as the user did, not by a path of this machine
        # PEFT looks for the base's config under this name, to see whether the vocabulary grew. It did not.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        trainer.model.peft_config["default"].base_model_name_or_path = model.model_name_or_path
        trainer.model.peft_config["default"].revision = model.model_revision
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if held_out is not None:
        metrics = trainer.evaluate()
        if trainer.accelerator.is_main_process:
            (Path(training.output_dir) / "eval_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
        trainer.accelerator.print(f"held-out pairwise accuracy {metrics['eval_accuracy']:.3f} ({len(held_out)} pairs)")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with in_one_line():
        main(*TrlParser((ScriptArguments, RewardConfig, ModelConfig)).parse_args_and_config())
