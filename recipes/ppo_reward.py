"""Fine-tune one LoRA adapter by PPO against one reward: an ingredient of a soup.

    accelerate launch recipes/ppo_reward.py                                    # embedded policy, first embedded reward
    accelerate launch recipes/ppo_reward.py --reward coverage --output_dir runs/coverage
    accelerate launch recipes/ppo_reward.py --reward naturalness coverage --reward_weights .5 .5      # MORL
    accelerate launch --config_file accelerate_config.yaml recipes/ppo_reward.py --convert_pickles \\
        --config recipes/configs/llama7b-assistant.yaml --reward deberta-v3-large-v2                  # the paper's
    accelerate launch recipes/ppo_reward.py --config recipes/configs/embedded-grpo.yaml --algorithm rloo     # or grpo: TRL's

With neither `--config` nor `--model_name_or_path`, recipes/configs/embedded.yaml applies. Flags override the file.

What the paper's code does differently: it trains with TRL's PPO of early 2023 and a second script for each task; its
assistant prompts reach the rewards with an empty question (here the question always does). All runs of one soup start
from one adapter: the one in `--adapter_name_or_path`, or a fresh one drawn from `adapter_init_seed`, not from the
run's own seed.
"""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import set_seed
from transformers.utils import is_torch_bf16_gpu_available
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RLOOConfig,
    RLOOTrainer,
    TrlParser,
    get_quantization_config,
)
from trl.trainer.utils import use_adapter

from rsoups import PPOConfig, PPOTrainer, load_reward
from rsoups.adapters.adapter import read_adapter
from rsoups.adapters.convert import conversion_of, convert
from rsoups.adapters.filenames import MANIFEST_FILE
from rsoups.adapters.lineage import fingerprint, settings_of, write_manifest
from rsoups.bases.load import base_config, load_base, load_tokenizer
from rsoups.bases.names import check_base
from rsoups.common.assets import need, resolve
from rsoups.common.errors import OutputError, SettingsError, in_one_line
from rsoups.common.files import hub_commit
from rsoups.common.pickles import holds_only_pickles
from rsoups.data.datasets import LAST_TENTH, is_table, train_and_held_out
from rsoups.data.prompts import fit_prompts, with_prefixes
from rsoups.data.tasks import TASKS, Task, columns_of, find_task
from rsoups.data.training_data import prompt_marks
from rsoups.generation.decoding import encode
from rsoups.generation.settings import sample_purely
from rsoups.hub.push import push_adapter
from rsoups.hub.upload import reserve
from rsoups.rewards.functions import check_columns, columns_read
from rsoups.rewards.load import models_of
from rsoups.training.checkpoints import last_checkpoint
from rsoups.training.ppo import reset_adapter
from rsoups.training.run_plan import GB, run_plan
from rsoups.training.trl_rewards import PLACE, reward_function

ASKED = "prompt without prefix"  # column: a prompt without the words of a reference that --prefix_tokens puts after it
# A soup does not care how its ingredients were trained: same cards, tasks, adapters and outputs for each.
ALGORITHMS = {"ppo": (PPOConfig, PPOTrainer), "grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
EMBEDDED = Path(__file__).parent / "configs" / "embedded.yaml"


@dataclass
class ScriptArguments:
    reward: list[str] = field(
        default_factory=lambda: ["naturalness"],
        metadata={
            "help": "Reward cards by name or path. Several are MORL, each with a number in --reward_weights (all 1 if unset): "
            "the score is the sum of weight * reward, divided by the sum of |weight|. A negative weight pays for less."
        },
    )
    task: str = field(
        default="concepts",
        metadata={
            "help": "Task that writes the prompts; custom: of a dataset's own.",
            "choices": [*sorted(TASKS), "custom"],
        },
    )
    template: str | None = field(
        default=None,
        metadata={"help": "Of a custom task's prompts, such as 'Summarize: {article}'; its column prompt if unset."},
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "File (its last tenth is held out), folder or Hub id; the task's own if unset."},
    )
    algorithm: str = field(
        default="ppo", metadata={"help": "Whose settings, and which trainer.", "choices": sorted(ALGORITHMS)}
    )
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Adapter to train on (and the KL reference); a fresh LoRA if unset."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoint in output_dir, if there is one."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace what another run left in output_dir: its adapter and its checkpoints."},
    )
    long_prompts: str = field(
        default="refuse",
        metadata={"help": "Prompts that leave no room in the context: refuse, or drop.", "choices": ["refuse", "drop"]},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; what the context leaves beside a response if unset."}
    )
    prefix_tokens: list[int] | None = field(
        default=None,
        metadata={"help": "Two numbers: begin responses with so many tokens of a reference, as the paper does (2 8)."},
    )
    eval_prompts: int = field(
        default=64, metadata={"help": "Held-out prompts of the summary at the end, before and after training; 0: none."}
    )
    reward_device: str | None = field(default=None, metadata={"help": "Device of the rewards; the policy's if unset."})
    allow_base_mismatch: bool = field(
        default=False,
        metadata={"help": "Train an adapter that names another base: the same weights under another name."},
    )
    convert_pickles: bool = field(
        default=False,
        metadata={
            "help": "Convert an adapter, a base or a reward model that is published as a pickle only, once, into the cache "
            "(rsoups convert). On the command line only, not in a config file."
        },
    )


def parse(argv: list[str] | None = None) -> tuple[ScriptArguments, GRPOConfig | RLOOConfig, ModelConfig]:
    argv = sys.argv[1:] if argv is None else argv
    if not {"--config", "--model_name_or_path"} & set(argv):
        argv = ["--config", str(EMBEDDED), *argv]
    # The algorithm decides which settings there are, so it is looked up before the rest is parsed.
    flags = dict(zip(argv, argv[1:], strict=False))
    file = yaml.safe_load(Path(flags["--config"]).read_text("utf-8")) if "--config" in flags else {}
    if "convert_pickles" in file:
        raise SystemExit("convert_pickles: pass --convert_pickles on the command line; a config file cannot allow it")
    chosen = {flag.split("=")[0].removeprefix("--") for flag in argv} | set(file)
    if not is_torch_bf16_gpu_available() and not chosen & {"bf16", "fp16", "use_cpu"}:
        argv = [*argv, "--bf16", "false"]  # TRL's default is true, which transformers refuses without such a GPU
    name = flags.get("--algorithm", file.get("algorithm", "ppo"))
    settings, _ = ALGORITHMS.get(name, ALGORITHMS["ppo"])  # an unknown one is refused by the parser, by its choices
    script, training, model = TrlParser((ScriptArguments, settings, ModelConfig)).parse_args_and_config(argv)
    if script.prefix_tokens and (
        len(script.prefix_tokens) != 2 or not 0 <= script.prefix_tokens[0] <= script.prefix_tokens[1]
    ):
        raise SystemExit(f"--prefix_tokens takes two numbers, the smaller first; got {script.prefix_tokens}")
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = f"runs/{name}-" + "-".join(Path(name).stem for name in script.reward)
    return script, training, model


def clear_folder(script: ScriptArguments, training: GRPOConfig | RLOOConfig) -> None:
    """Refuse a folder in which a run finished, or was interrupted, unless it is gone on with or may be replaced."""
    folder = Path(str(training.output_dir))
    finished, checkpoint = (folder / MANIFEST_FILE).is_file(), last_checkpoint(folder)
    resumes = script.resume or training.resume_from_checkpoint
    if script.overwrite_output_dir and not resumes:
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
            f"{folder} holds an interrupted run ({checkpoint.name}): pass --resume to go on with it, or "
            "--overwrite_output_dir true"
        )


def task_of(script: ScriptArguments) -> Task:
    return find_task(script.task, script.dataset, script.template)


def prompts(
    script: ScriptArguments, training: GRPOConfig | RLOOConfig, tokenizer: Any, room: int, kept: Collection[str] = ()
) -> list[dict[str, list]]:
    """What to train on and what is held out: columns of prompts, as the policy reads them and no longer than `room` tokens,
    of their references, where the data has any, and of what else is `kept` for the rewards."""
    found = []
    splits = train_and_held_out(task_of(script), script.dataset, script.eval_prompts, kept)
    for split, rows in zip(("train", "held-out"), splits, strict=True):
        if script.prefix_tokens:
            ids = partial(tokenizer.encode, add_special_tokens=False)
            begun = with_prefixes(rows, ids, tokenizer.decode, *script.prefix_tokens, seed=training.seed)
            rows = [row | {"prompt": prompt, ASKED: row["prompt"]} for row, prompt in zip(rows, begun, strict=True)]
        lengths = [len(encode(tokenizer, row["prompt"], training.chat_template_kwargs)) for row in rows]
        fitting = fit_prompts(rows, lengths, room, script.long_prompts) if rows else []
        if len(fitting) < len(rows):
            print(f"{len(rows) - len(fitting)} of {len(rows)} {split} prompts dropped: longer than {room} tokens")
        found.append(columns_of(fitting))
    return found


def datasets_of(train: dict[str, list], held_out: dict[str, list]) -> list[Dataset | None]:
    """Datasets of prompts and their places: Arrow would change the values of other columns, which rewards get by place."""
    first, found = 0, []
    for columns in (train, held_out):
        asked = columns.get("prompt", [])
        found.append(
            Dataset.from_dict({"prompt": asked, PLACE: [*range(first, first + len(asked))]}) if asked else None
        )
        first += len(asked)
    return found


def convert_pickles(script: ScriptArguments, model: ModelConfig) -> None:
    """Convert what this run needs and the Hub (or a folder) holds as a pickle only; every reader then finds it in the cache."""
    sources = [(model.model_name_or_path, model.model_revision), (script.adapter_name_or_path, None)]
    for name in script.reward:
        sources += models_of(name)
    for source, revision in sources:
        if source and holds_only_pickles(resolve(source), revision):
            convert(f"{resolve(source)}@{revision}" if revision else resolve(source))


def with_conversion(entry: dict[str, Any], source: str | None, revision: str | None) -> dict[str, Any]:
    """A lineage entry, with the hashes of the pickle and of its conversion where there is one."""
    found = conversion_of(resolve(source), revision) if source else None
    return entry | ({"conversion": found} if found else {})


def policy(script: ScriptArguments, model: ModelConfig, trusted: bool = False) -> tuple:
    """The base with either a fresh LoRA's config, or an existing adapter to train on."""
    base = load_base(
        model.model_name_or_path,
        trust_remote_code=trusted,
        revision=model.model_revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        quantization_config=get_quantization_config(model),
    )
    if script.adapter_name_or_path:
        # PEFT would open a pickle; and what no soup can hold is better known before the training.
        start = read_adapter(resolve(script.adapter_name_or_path))
        named = [(script.adapter_name_or_path, start.config)]
        check_base(named, model.model_name_or_path, script.allow_base_mismatch, model.model_revision)
        return PeftModel.from_pretrained(base, start.folder, is_trainable=True, config=start.config), None
    return base, LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules or "all-linear",
        use_rslora=model.use_rslora,
    )


def write_lineage(
    script: ScriptArguments,
    training: GRPOConfig | RLOOConfig,
    model: ModelConfig,
    trainer: GRPOTrainer,
    rewards: list,
    results: dict[str, Any],
    asked: list,
    held_out: list,
) -> None:
    """lineage.json beside the adapter: what it was made from, how, by which rewards, on which prompts, to what effect."""
    start = read_adapter(resolve(script.adapter_name_or_path)) if script.adapter_name_or_path else None
    weights = training.reward_weights or [1.0] * len(rewards)
    cards = [asdict(card) if is_dataclass(card := getattr(r, "card", None)) else {"name": r.name} for r in rewards]
    cards = [with_conversion(card, card.get("model"), card.get("revision")) for card in cards]
    base = {"model": model.model_name_or_path, "revision": hub_commit(model.model_name_or_path, model.model_revision)}
    data = {"dataset": script.dataset or task_of(script).dataset, "split": "train", "task": script.task}
    rule = LAST_TENTH if is_table(task_of(script), script.dataset) else "the test split"
    prompt = trainer.train_dataset["prompt"]
    data |= {"held_out": {"rule": rule, **fingerprint(held_out)}, "prompt_marks": prompt_marks(asked)}
    write_manifest(
        training.output_dir,
        script.algorithm,
        base=with_conversion(base, model.model_name_or_path, model.model_revision),
        recipe="recipes/ppo_reward.py",
        config=settings_of(script, training, model) | {"steps": trainer.state.global_step},
        data=data | {"template": script.template or prompt[0]} | fingerprint(prompt),
        parent=(script.adapter_name_or_path, start.revision, start.sha256) if start else None,
        rewards=[card | {"weight": weight} for card, weight in zip(cards, weights, strict=True)],
        seed=training.seed,
        results=results,
    )


def summary(trainer: GRPOTrainer) -> dict[str, Any]:
    """Reward, KL and length on held-out prompts, before and after, from one seed; a few responses of each are shown."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    start = "ref" if "ref" in policy.peft_config else None  # a continued adapter's, or the base's
    rows, texts = {}, {}
    for name in ("before", "after"):
        set_seed(trainer.args.seed)
        for log in ("prompt", "completion"):
            trainer._logs[log].clear()
        if name == "before":
            with use_adapter(policy, start):
                metrics = trainer.evaluate()
        else:
            metrics = trainer.evaluate()
        keys = ("reward", "kl", "entropy", "completions/mean_length")
        rows[name] = {key: metrics[f"eval_{key}"] for key in keys if f"eval_{key}" in metrics}
        texts[name] = [str(text).strip() for text in list(trainer._logs["completion"])[:3]]
    trainer.save_metrics("held_out", rows)
    trainer.accelerator.print(f"\nOn {len(trainer.eval_dataset)} held-out prompts:")
    for key in rows["after"]:
        trainer.accelerator.print(f"  {key:24}{rows['before'][key]:8.3f} -> {rows['after'][key]:.3f}")
    for prompt, before, after in zip(trainer._logs["prompt"], texts["before"], texts["after"], strict=False):
        trainer.accelerator.print(f"  {prompt}\n    before: {before}\n    after:  {after}")
    return rows | {"prompts": len(trainer.eval_dataset)}


def main(script: ScriptArguments, training: GRPOConfig | RLOOConfig, model: ModelConfig) -> None:
    clear_folder(script, training)
    if model.load_in_8bit or model.load_in_4bit:
        need("bitsandbytes", "quantized")
    # The adapter is pushed whole and alone, in the end; its repository is asked for now, since a token may be no good.
    hub, training.push_to_hub = training.push_to_hub and training.process_index == 0, False
    options = {"private": training.hub_private_repo, "token": training.hub_token}
    repository = reserve(training.hub_model_id or Path(training.output_dir).name, **options) if hub else None
    if script.convert_pickles:
        with training.main_process_first(desc="conversion"):
            convert_pickles(script, model)
    # It tells of CPU kernels that only 4-bit bases miss, and at each matrix product that 8 bit computes in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT looks for the base's config under its published name, to see whether the vocabulary grew. It did not.
    warnings.filterwarnings("ignore", message="Could not find a config file in")
    device, trusted = script.reward_device or str(training.device), training.trust_remote_code
    of_base = {"revision": model.model_revision, "trust_remote_code": trusted}
    context = base_config(model.model_name_or_path, **of_base)
    tokenizer = load_tokenizer(model.model_name_or_path, padding_side="left", **of_base)
    rewards = [load_reward(name, device, trust_remote_code=trusted) for name in script.reward]
    room = context.get_text_config().max_position_embeddings - training.max_completion_length
    room = min(room, script.max_prompt_length or room)
    train, held_out = prompts(script, training, tokenizer, room, columns_read(rewards))
    for columns in filter(None, (train, held_out)):
        check_columns(rewards, columns)
    asked = train.pop(ASKED, train["prompt"])
    train_dataset, eval_dataset = datasets_of(train, held_out)
    nothing = [None] * len(held_out.get("prompt", []))
    columns = {name: [*train[name], *held_out.get(name, nothing)] for name in train if name != "prompt"}
    actor, lora = policy(script, model, trusted)
    _, kind = ALGORITHMS[script.algorithm]
    weights = training.reward_weights
    if weights is not None and not any(weights):
        raise SettingsError(f"reward_weights are {weights}: one at least must not be 0")
    if kind is not PPOTrainer:  # which does so itself
        left_out = sample_purely(actor.get_base_model() if isinstance(actor, PeftModel) else actor)
        print(f"not inherited from the base's generation_config: {', '.join(left_out) or 'nothing to leave out'}")
    trainer = kind(
        model=actor,
        reward_funcs=[reward_function(reward, task_of(script).cut, tokenizer, columns) for reward in rewards],
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    # TRL's own do not divide by Σ |μ|, and the same flags would have another scale against the KL penalty.
    if kind is not PPOTrainer:
        trainer.reward_weights = trainer.reward_weights / trainer.reward_weights.abs().sum()
    if lora is not None:
        reset_adapter(trainer.model, getattr(training, "adapter_init_seed", 0))
    # The adapter names its base as the user did, not by a path of this machine.
    trainer.model.peft_config["default"].base_model_name_or_path = model.model_name_or_path
    trainer.model.peft_config["default"].revision = model.model_revision
    if isinstance(trainer, PPOTrainer):
        longest = max(len(encode(tokenizer, prompt, training.chat_template_kwargs)) for prompt in train["prompt"])
        trainer.accelerator.print(run_plan(trainer.model, rewards, training, len(train["prompt"]), longest, device))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or script.resume or None)
    if trainer.state.global_step < trainer.state.max_steps:
        sys.exit(130)  # Ctrl-C: there is a checkpoint, and no adapter yet
    trainer.save_model()
    trainer.save_state()  # the log of the run beside the adapter
    if training.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / GB
        trainer.accelerator.print(f"memory   {peak:.1f} GB at most were allocated on this GPU")
    results = summary(trainer) if held_out else {}
    if trainer.accelerator.is_main_process:
        write_lineage(script, training, model, trainer, rewards, results, asked, held_out.get("prompt", []))
    trainer.accelerator.print(f"adapter: {training.output_dir}")
    if repository:
        print(push_adapter(training.output_dir, repository, **options))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with in_one_line():
        main(*parse())
