"""Train a reward model on preference pairs: a sequence classifier with one logit, by TRL's RewardTrainer.

    accelerate launch recipes/reward_model.py --model_name_or_path BASE --dataset pairs.jsonl --output_dir runs/reward
    accelerate launch recipes/reward_model.py --config recipes/configs/embedded-coverage.yaml

From an installed package: `accelerate launch -m rsoups.recipes.reward_model ...`, or `rsoups reward-model ...` on one process.

How this differs from the paper: that downloads its reward models; this trains one. Rows are `prompt, chosen, rejected`, texts
or messages; in messages, chosen and rejected may also begin with the prompt. The model reads tokenizer(question, response),
with the question taken out of the prompt as it is when the reward is used later, so that training and scoring see the same
input. The loss is Bradley-Terry's (Ouyang et al. 2022, eq. 1). At the end it measures the pairwise accuracy on
`--eval_dataset`. With `--use_peft` it writes an adapter, which is a reward just as a whole model is: `rsoups score --reward
runs/reward ...`.
"""

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config

from rsoups.bases.load import dtype_of, load_tokenizer
from rsoups.common.assets import resolve
from rsoups.common.errors import in_one_line
from rsoups.common.files import read_jsonl, writing
from rsoups.data.prompts import pair_of
from rsoups.rewards.inputs import encode_pairs
from rsoups.training.callbacks import launcher_callbacks
from rsoups.training.flags import FlagParser
from rsoups.training.policy import name_base


@dataclass
class ScriptArguments:
    dataset: str = field(metadata={"help": "File of JSON lines with the columns prompt, chosen, rejected."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out pairs in a file of the same form."})


def tokenized(rows: list[dict], tokenizer: Any, max_length: int) -> Dataset:
    """One example per pair: `chosen_ids` and `rejected_ids`."""
    questions, *sides = zip(*map(pair_of, rows), strict=True)
    columns = {}
    for name, responses in zip(("chosen", "rejected"), sides, strict=True):
        encoded = encode_pairs(tokenizer, questions, responses, max_length)
        columns[f"{name}_ids"] = [e["input_ids"] for e in encoded]
    return Dataset.from_dict(columns)


def lora(model: ModelConfig, untrained: list[str]) -> LoraConfig | None:
    """The adapter's config. It saves the parameters that the base lacks, which are drawn anew for each model.

    Args:
        model: Settings of the adapter; without `use_peft` there is none.
        untrained: Names of the parameters that the base lacks.
    """
    config = get_peft_config(model)
    if config is None:
        return None
    assert isinstance(config, LoraConfig)  # TRL makes no other
    config.task_type = "SEQ_CLS"
    # PEFT keeps the modules `classifier` and `score` by itself.
    others = {name.rpartition(".")[0] for name in untrained if name.partition(".")[0] not in ("classifier", "score")}
    config.modules_to_save = sorted({*(config.modules_to_save or []), *others}) or None
    return config


def main(script: ScriptArguments, training: RewardConfig, model: ModelConfig) -> None:
    name = str(model.model_name_or_path)
    tokenizer = load_tokenizer(name, revision=model.model_revision)
    # RewardTrainer needs an end token. The pairs end with the separator already.
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    set_seed(training.seed)  # the head is drawn here
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        resolve(name),
        revision=model.model_revision,
        num_labels=1,
        dtype=dtype_of(name, model.dtype),
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
        peft_config=lora(model, sorted(info["missing_keys"])),
        callbacks=launcher_callbacks(),
    )
    if model.use_peft:
        # PEFT looks for the base's config under this name, to see whether the vocabulary grew. It did not.
        warnings.filterwarnings("ignore", message="Could not find a config file in")
        name_base(trainer.model, model)
    with writing(str(training.output_dir)):
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
    if held_out is not None:
        metrics = trainer.evaluate()
        if trainer.accelerator.is_main_process:
            assert training.output_dir is not None  # TrainingArguments has set its default
            (Path(training.output_dir) / "eval_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
        trainer.accelerator.print(f"held-out pairwise accuracy {metrics['eval_accuracy']:.3f} ({len(held_out)} pairs)")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with in_one_line():
        example = "--base user/base --dataset pairs.jsonl --eval-dataset held-out.jsonl --out runs/reward"
        main(*FlagParser((ScriptArguments, RewardConfig, ModelConfig), __doc__, example).read())
