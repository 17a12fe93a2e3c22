"""Fine-tune one LoRA adapter by PPO against one reward: an ingredient of a soup.

    accelerate launch recipes/ppo_reward.py                                    # embedded policy, first embedded reward
    accelerate launch recipes/ppo_reward.py --reward coverage --output_dir runs/coverage
    accelerate launch recipes/ppo_reward.py --reward naturalness coverage --reward_weights .5 .5      # MORL
    accelerate launch --config_file accelerate_config.yaml recipes/ppo_reward.py --convert_pickles \\
        --config recipes/configs/llama7b-assistant.yaml --reward deberta-v3-large-v2                  # the paper's
    accelerate launch recipes/ppo_reward.py --config recipes/configs/embedded-grpo.yaml --algorithm rloo     # or grpo: TRL's

From an installed package: `accelerate launch -m rsoups.recipes.ppo_reward --config llama7b-assistant ...`. Without --config
and --model_name_or_path, recipes/configs/embedded.yaml applies. Flags override the file.

How this differs from the paper's code: that trains with TRL's PPO of early 2023, and has a second script for each task. Its
assistant prompts reach the rewards with an empty question; here the question is always there. All runs of one soup start from
one adapter: the one in `--adapter_name_or_path`, or a fresh one drawn from `adapter_init_seed`, not from the run's own seed.
"""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig
from trl.trainer.utils import use_adapter

from rsoups import PPOTrainer, load_reward
from rsoups.adapters.filenames import MANIFEST_FILE
from rsoups.bases.load import base_config, load_tokenizer
from rsoups.common.assets import need
from rsoups.common.errors import OutputError, in_one_line
from rsoups.common.files import writing
from rsoups.generation.decoding import encode
from rsoups.generation.settings import sample_purely
from rsoups.hub.push import push
from rsoups.hub.upload import reserve
from rsoups.training.callbacks import launcher_callbacks
from rsoups.training.checkpoints import last_checkpoint
from rsoups.training.policy import load_policy, name_base, reset_adapter
from rsoups.training.ppo_config import PPOConfig
from rsoups.training.run_arguments import ALGORITHMS, RunArguments, parse
from rsoups.training.run_data import RunData, run_data
from rsoups.training.run_lineage import convert_pickles, write_run_manifest
from rsoups.training.run_plan import GB, run_plan, settle_checkpointing
from rsoups.training.trl_rewards import check_weights, reward_function


def main(run: RunArguments, training: GRPOConfig | RLOOConfig, model: ModelConfig) -> None:
    clear_folder(run, training)
    # The adapter is pushed whole and alone, in the end, not by transformers. Its repository is created now, since the token
    # may be invalid.
    pushes, training.push_to_hub = training.push_to_hub and training.process_index == 0, False
    assert training.output_dir is not None  # TrainingArguments has set its default
    options: dict[str, Any] = {"private": training.hub_private_repo, "token": training.hub_token}
    repository = reserve(training.hub_model_id or Path(training.output_dir).name, **options) if pushes else None

    trainer, rewards, data = prepare(run, training, model)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or run.resume or None)
    if trainer.state.global_step < trainer.state.max_steps:
        sys.exit(130)  # Ctrl-C: there is a checkpoint, and no adapter yet
    with writing(training.output_dir):
        trainer.save_model()
        trainer.save_state()  # the log of the run beside the adapter
    if training.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / GB
        trainer.accelerator.print(f"memory   {peak:.1f} GB at most were allocated on this GPU")

    results = summary(trainer) if data.held_out else {}
    if trainer.accelerator.is_main_process:
        write_run_manifest(run, training, model, trainer, rewards, results, data.unprefixed, data.held_out_prompts)
    trainer.accelerator.print(f"adapter: {training.output_dir}")
    if repository:
        print(push(training.output_dir, repository, **options))


def clear_folder(run: RunArguments, training: GRPOConfig | RLOOConfig) -> None:
    """Refuse a folder with a finished or an interrupted run, unless this run resumes or replaces it."""
    folder = Path(str(training.output_dir))
    finished, checkpoint = (folder / MANIFEST_FILE).is_file(), last_checkpoint(folder)
    resumes = run.resume or training.resume_from_checkpoint
    if run.overwrite_output_dir and not resumes:
        with training.main_process_first(desc="removal of another run"):
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            for path in folder.glob("checkpoint-*"):
                shutil.rmtree(path, ignore_errors=True)
        return
    if finished and not (resumes and checkpoint):
        raise OutputError(
            f"{folder} holds a finished run{' without checkpoints' if resumes else ''}: choose another --output_dir, or pass "
            "--overwrite_output_dir true"
        )
    if checkpoint and not resumes:
        raise OutputError(
            f"{folder} holds an interrupted run ({checkpoint.name}): pass --resume to continue it, or "
            "--overwrite_output_dir true"
        )


def prepare(
    run: RunArguments, training: GRPOConfig | RLOOConfig, model: ModelConfig
) -> tuple[GRPOTrainer, list, RunData]:
    """Load rewards, prompts and policy: what is cheap and may fail comes first."""
    if model.load_in_8bit or model.load_in_4bit:
        need("bitsandbytes", "quantized")
    check_weights(training.reward_weights, len(run.reward))
    if run.convert_pickles:
        with training.main_process_first(desc="conversion"):
            convert_pickles(run, model)
    # bitsandbytes warns of CPU kernels that only 4-bit bases miss, and at each matrix product that 8 bit computes in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT looks for the base's config under its published name, to see whether the vocabulary grew. It did not.
    warnings.filterwarnings("ignore", message="Could not find a config file in")

    name, trusted = str(model.model_name_or_path), training.trust_remote_code
    source = {"revision": model.model_revision, "trust_remote_code": trusted}
    context = base_config(name, **source).get_text_config().max_position_embeddings
    tokenizer = load_tokenizer(name, padding_side="left", **source)
    device = run.reward_device or str(training.device)
    rewards = [load_reward(card, device, trust_remote_code=trusted) for card in run.reward]

    room = context - training.max_completion_length
    room = min(room, run.max_prompt_length or room)
    data = run_data(run, training, tokenizer, room, rewards)

    adapter = run.adapter_name_or_path
    options = {"allow_base_mismatch": run.allow_base_mismatch, "trust_remote_code": trusted}
    policy, lora = load_policy(model, adapter, **options)
    _, trainer_class = ALGORITHMS[run.algorithm]
    if trainer_class is not PPOTrainer:  # PPOTrainer does so itself
        ignored = sample_purely(policy.get_base_model() if isinstance(policy, PeftModel) else policy)
        print(f"not inherited from the base's generation_config: {', '.join(ignored) or 'nothing to leave out'}")
    trainer = trainer_class(
        model=policy,
        reward_funcs=[reward_function(reward, run.find_task().cut, tokenizer, data.columns) for reward in rewards],
        args=training,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=launcher_callbacks(),
    )
    if lora is not None:
        reset_adapter(trainer.model, getattr(training, "adapter_init_seed", 0))
    name_base(trainer.model, model)

    if trainer_class is PPOTrainer:
        # Each algorithm has its trainer and its settings.
        assert isinstance(training, PPOConfig) and isinstance(trainer, PPOTrainer)
        template = training.chat_template_kwargs
        assert not isinstance(template, str)  # TRL has parsed it
        longest = max(len(encode(tokenizer, prompt, template)) for prompt in data.prompts)
        if not trainer.sharded:  # the estimate counts whole weights
            settle_checkpointing(training, trainer.model, rewards, longest)
        trainer.accelerator.print(run_plan(trainer.model, rewards, training, len(data.prompts), longest, device))
    else:
        # TRL's weights are not divided by Σ |μ|: the same flags would have another scale against the KL penalty.
        trainer.reward_weights = trainer.reward_weights / trainer.reward_weights.abs().sum()
    return trainer, rewards, data


def summary(trainer: GRPOTrainer) -> dict[str, Any]:
    """Reward, KL and length on held-out prompts, before and after, from one seed; prints a few responses of each."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    logs: Any = trainer._logs  # queues, which TRL's hints call collections
    start = "ref" if "ref" in policy.peft_config else None  # the frozen copy of a continued adapter, or the base alone
    rows, texts = {}, {}
    for name in ("before", "after"):
        set_seed(trainer.args.seed)
        for log in ("prompt", "completion"):
            logs[log].clear()
        if name == "before":
            with use_adapter(policy, start):
                metrics = trainer.evaluate()
        else:
            metrics = trainer.evaluate()
        keys = ("reward", "kl", "entropy", "completions/mean_length")
        rows[name] = {key: metrics[f"eval_{key}"] for key in keys if f"eval_{key}" in metrics}
        texts[name] = [str(text).strip() for text in list(logs["completion"])[:3]]

    trainer.save_metrics("held_out", rows)
    say = trainer.accelerator.print
    assert isinstance(trainer.eval_dataset, Sized)  # without held-out prompts there is no summary
    count = len(trainer.eval_dataset)
    say(f"\nOn {count} held-out prompts:")
    for key in rows["after"]:
        say(f"  {key:24}{rows['before'][key]:8.3f} -> {rows['after'][key]:.3f}")
    for prompt, before, after in zip(logs["prompt"], texts["before"], texts["after"], strict=False):
        say(f"  {prompt}\n    before: {before}\n    after:  {after}")
    return rows | {"prompts": count}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with in_one_line():
        main(*parse(doc=__doc__))
