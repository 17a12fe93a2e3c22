"""Command-line arguments of an RL run, beside those of TRL's trainer and of the model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOConfig, RLOOTrainer

from rsoups.common.errors import SettingsError
from rsoups.data.arguments import PromptArguments
from rsoups.training.configs import config_path, given_flags, spelled_out
from rsoups.training.flags import FlagParser, read_config
from rsoups.training.ppo import PPOTrainer
from rsoups.training.ppo_config import PPOConfig

# A soup does not depend on how its ingredients were trained: same cards, tasks, adapters and outputs for each.
ALGORITHMS = {"ppo": (PPOConfig, PPOTrainer), "grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
DEFAULT_CONFIG = "embedded"


@dataclass
class RunArguments(PromptArguments):
    reward: list[str] = field(
        default_factory=lambda: ["naturalness"],
        metadata={
            "help": "Reward cards by name or path. Several are MORL, each with a number in --reward-weights (all 1 if unset): "
            "the score is the sum of weight * reward, divided by the sum of |weight|. A negative weight pays for less."
        },
    )
    algorithm: str = field(
        default="ppo", metadata={"help": "Algorithm: trainer and settings.", "choices": sorted(ALGORITHMS)}
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Adapter to train on, which is also the KL reference; a fresh LoRA if unset."},
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Continue from the newest complete checkpoint in --out, if there is one."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the adapter and the checkpoints of another run in --out."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt in tokens; the context without a response's tokens if unset."},
    )
    prefix_tokens: list[int] | None = field(
        default=None,
        metadata={"help": "Two numbers: start responses with so many tokens of a reference; the paper has 2 8."},
    )
    eval_prompts: int = field(
        default=64,
        metadata={"help": "Held-out prompts of the summary at the end, before and after training; 0 for none."},
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
            "(rsoups convert). Allowed on the command line only, not in a config file."
        },
    )


def parse(
    argv: Sequence[str] | None = None, doc: str | None = None
) -> tuple[RunArguments, GRPOConfig | RLOOConfig, ModelConfig]:
    """Parse a command line; flags override the config file.

    With neither `--config` nor `--model_name_or_path`, recipes/configs/embedded.yaml applies.

    Args:
        argv: Flags; those of this process if None.
        doc: The recipe's docstring, whose first line is the help's.

    Raises:
        SettingsError: A flag or a key of the config file is invalid.
    """
    flags = spelled_out(sys.argv[1:] if argv is None else argv)
    if not {"config", "model_name_or_path"} & given_flags(flags).keys():
        flags = ["--config", str(config_path(DEFAULT_CONFIG)), *flags]
    given = given_flags(flags)
    file = read_config(given.get("config"))
    if "convert_pickles" in file:
        raise SettingsError(
            "convert_pickles: pass --convert_pickles on the command line; a config file cannot allow it"
        )
    # The algorithm decides which settings exist, so it is read before the rest is parsed. The parser refuses unknown ones.
    chosen = {**file, **given}
    name = str(chosen.get("algorithm", "ppo"))
    if name != "ppo" and not is_torch_bf16_gpu_available() and not chosen.keys() & {"bf16", "fp16", "use_cpu"}:
        flags = [*flags, "--bf16", "false"]  # TRL's default is true, which transformers refuses without such a GPU
    settings, _ = ALGORITHMS.get(name, ALGORITHMS["ppo"])
    parser = FlagParser((RunArguments, settings, ModelConfig), doc, "--reward coverage --out runs/coverage")
    run, training, model = parser.read(flags)

    if name == "ppo" and training.bf16 and training.use_cpu and not chosen.keys() & {"bf16", "dtype"}:
        model.dtype = None  # `load_policy` then follows the base

    prefix = run.prefix_tokens
    if prefix and (len(prefix) != 2 or not 0 <= prefix[0] <= prefix[1]):
        raise SettingsError(f"--prefix_tokens takes two numbers, the smaller first; got {prefix}")
    if training.output_dir in (None, "trainer_output"):
        training.output_dir = f"runs/{name}-" + "-".join(Path(reward).stem for reward in run.reward)
    return run, training, model
