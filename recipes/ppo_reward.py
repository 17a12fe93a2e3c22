"""Fine-tune one LoRA adapter by PPO against one reward: an ingredient of a soup.

    accelerate launch recipes/ppo_reward.py                                    # embedded policy, first embedded reward
    accelerate launch recipes/ppo_reward.py --reward coverage --output_dir runs/coverage
    accelerate launch recipes/ppo_reward.py --reward naturalness coverage --reward_weights .5 .5      # MORL
    accelerate launch recipes/ppo_reward.py --config recipes/configs/llama7b-assistant.yaml --reward deberta-v3-large-v2

With neither `--config` nor `--model_name_or_path`, recipes/configs/embedded.yaml applies. Flags override the file.

What the paper's code does differently: it trains with TRL's PPO of early 2023 and a second script for each task; its
assistant prompts reach the rewards with an empty question (here the question always does). All runs of one soup start
from one adapter: the one in `--adapter_name_or_path`, or a fresh one drawn from `adapter_init_seed`, not from the
run's own seed.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser, get_quantization_config

from rsoups import PPOConfig, PPOTrainer, load_reward
from rsoups._resources import load_rows, resolve
from rsoups.scoring import reward_function
from rsoups.tasks import TASKS

EMBEDDED = Path(__file__).parent / "configs" / "embedded.yaml"


@dataclass
class ScriptArguments:
    reward: list[str] = field(
        default_factory=lambda: ["naturalness"],
        metadata={"help": "Reward cards by name or path; several with --reward_weights are MORL."},
    )
    task: str = field(default="concepts", metadata={"help": "Task that writes the prompts.", "choices": sorted(TASKS)})
    dataset: str | None = field(
        default=None, metadata={"help": "JSONL file, folder or Hub id; the task's own if unset."}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter to train on (and the KL reference); a fresh LoRA if unset."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoint in output_dir, if there is one."}
    )
    reward_device: str | None = field(default=None, metadata={"help": "Device of the rewards; the policy's if unset."})


def parse(argv: list[str] | None = None) -> tuple[ScriptArguments, PPOConfig, ModelConfig]:
    argv = sys.argv[1:] if argv is None else argv
    if not {"--config", "--model_name_or_path"} & set(argv):
        argv = ["--config", str(EMBEDDED), *argv]
    script, training, model = TrlParser((ScriptArguments, PPOConfig, ModelConfig)).parse_args_and_config(argv)
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = "runs/ppo-" + "-".join(Path(name).stem for name in script.reward)
    return script, training, model


def policy(script: ScriptArguments, model: ModelConfig) -> tuple:
    """The base with either a fresh LoRA's config, or an existing adapter to train on."""
    base = AutoModelForCausalLM.from_pretrained(
        resolve(model.model_name_or_path),
        revision=model.model_revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        quantization_config=get_quantization_config(model),
    )
    if script.adapter_name_or_path:
        return PeftModel.from_pretrained(base, resolve(script.adapter_name_or_path), is_trainable=True), None
    return base, LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules or "all-linear",
        use_rslora=model.use_rslora,
    )


def main(script: ScriptArguments, training: PPOConfig, model: ModelConfig) -> None:
    task = TASKS[script.task]
    prompts = [row["prompt"] for row in load_rows(task, script.dataset, "train")]
    device = script.reward_device or str(training.device)
    rewards = [reward_function(load_reward(name, device), task.cut) for name in script.reward]
    tokenizer = AutoTokenizer.from_pretrained(
        resolve(model.model_name_or_path), revision=model.model_revision, padding_side="left"
    )
    actor, lora = policy(script, model)
    trainer = PPOTrainer(
        model=actor,
        reward_funcs=rewards,
        args=training,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        peft_config=lora,
    )
    # The adapter names its base as the user did, not by a path of this machine.
    trainer.model.peft_config["default"].base_model_name_or_path = model.model_name_or_path
    trainer.model.peft_config["default"].revision = model.model_revision
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or script.resume)
    trainer.save_model()
    trainer.save_state()  # the log of the run beside the adapter
    trainer.accelerator.print(f"adapter: {training.output_dir}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(*parse())
