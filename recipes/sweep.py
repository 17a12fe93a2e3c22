"""Sweep λ between adapters: one base, N ingredients, every reward at every λ; then the front and its report.

    python recipes/sweep.py --adapters naturalness=runs/ppo-naturalness coverage=runs/ppo-coverage \\
        --reward naturalness coverage --held_out_reward rating --morl "MORL 0.5/0.5=runs/ppo-morl" --output_dir runs/sweep
    accelerate launch recipes/sweep.py ...                    # processes and GPUs share the work
    rsoups sweep ...                                          # the same script, from an installed package

Writes records.jsonl, front.png, report.html and report.md to `--output_dir`. A second run, with any number of processes,
continues an interrupted one after its records.

As in the paper: 11 λ from 0 to 1, sampled responses. How this differs from it: the base is loaded once, all λ share its
batches, all models share the same random numbers, and every figure has an interval.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rsoups import load_reward, simplex, sweep, write_report
from rsoups.common.assets import named_sources
from rsoups.common.errors import in_one_line
from rsoups.common.files import read_jsonl
from rsoups.data.arguments import PromptArguments
from rsoups.data.datasets import is_table, load_rows
from rsoups.data.prompts import template_kwargs
from rsoups.data.tasks import columns_of
from rsoups.fronts.grids import edges
from rsoups.rewards.interface import check_columns, columns_read, rewards_by_name
from rsoups.training.flags import FlagParser


@dataclass
class ScriptArguments(PromptArguments):
    adapters: list[str] = field(
        metadata={
            "help": "Ingredients, NAME=FOLDER or NAME=HUB_ID. Without NAME=, the last part of the path is the name."
        }
    )
    reward: list[str] = field(metadata={"help": "Rewards: cards by name or path, or module:function."})
    held_out_reward: list[str] = field(
        default_factory=list, metadata={"help": "Rewards that no ingredient was trained on; the report marks them."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model; the one that the adapters name if unset."}
    )
    others: list[str] = field(
        default_factory=list,
        metadata={"help": "Further adapters to compare, NAME=FOLDER, such as MORL runs.", "aliases": ["--morl"]},
    )
    ensemble: bool = field(default=False, metadata={"help": "Also evaluate the ingredients' prediction ensemble."})
    split: str = field(
        default="test",
        metadata={
            "help": "Split of the prompts. Of a single file, test is the last tenth, which rsoups train holds out; "
            "all is every row.",
            "choices": ["test", "train", "all"],
        },
    )
    allow_trained_prompts: bool = field(
        default=False, metadata={"help": "Accept prompts that an adapter was trained on; the report says so."}
    )
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={"help": "Variables of the chat template, a JSON object; those of the adapters' training if unset."},
    )
    prompts: int = field(default=200, metadata={"help": "Number of prompts."})
    samples: int = field(default=1, metadata={"help": "Responses of each model to each prompt."})
    grid: str = field(
        default="simplex",
        metadata={
            "help": "Grid of λ. simplex: the whole one; edges: each ingredient alone, all of them equally, and λ between two.",
            "choices": ["simplex", "edges"],
        },
    )
    points: int = field(default=11, metadata={"help": "Number of λ on each edge of the simplex."})
    random: int = field(default=0, metadata={"help": "Number of further λ, drawn from the whole simplex."})
    refine: int = field(default=0, metadata={"help": "Number of further λ, each in the front's largest gap."})
    method: str = field(
        default="exact",
        metadata={"help": "Interpolation: exact deltas, or A and B apart (factors).", "choices": ["exact", "factors"]},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling; 0 is greedy."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest response, in tokens."})
    batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a batch; as many as fit the memory if unset."}
    )
    server: str | None = field(
        default=None, metadata={"help": "URL of a vLLM server of this base, which generates the responses instead."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling and of --random."})
    allow_base_mismatch: bool = field(
        default=False, metadata={"help": "Accept adapters that name another base; the records say so."}
    )
    output_dir: str = field(default="runs/sweep", metadata={"help": "Folder of the records and the report."})


def main(script: ScriptArguments) -> None:
    adapters, others = named_sources(script.adapters, "adapters"), named_sources(script.others, "others")
    task, out = script.find_task(), Path(script.output_dir)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    loaded = {source: load_reward(source, device) for source in [*script.reward, *script.held_out_reward]}
    rewards = rewards_by_name(loaded)
    rows = load_rows(task, script.dataset, script.split, kept=columns_read(loaded.values()))
    different = list({repr(row["prompt"]): row for row in reversed(rows)}.values())[::-1]
    if len(different) < script.prompts and is_table(task, script.dataset) and script.split == "test":
        print(f"{len(different)} prompts: the part of {script.dataset} that is held out (--split all takes every row)")
    columns = columns_of(different[: script.prompts])
    check_columns(list(loaded.values()), columns)
    if script.grid == "edges":
        lambdas = edges(len(adapters), script.points)
        lambdas += simplex(len(adapters), 2, random=script.random, seed=script.seed)[len(adapters) :]
    else:
        lambdas = simplex(len(adapters), script.points, random=script.random, seed=script.seed)
    front = sweep(
        script.model_name_or_path,
        adapters,
        rewards,
        columns.pop("prompt"),
        lambdas,
        method=script.method,
        samples=script.samples,
        others=others,
        ensemble=script.ensemble,
        refine=script.refine,
        columns=columns,
        held_out=[loaded[source].name for source in script.held_out_reward],
        cut=task.cut,
        temperature=script.temperature,
        max_new_tokens=script.max_new_tokens,
        long_prompts=script.long_prompts,
        chat_template_kwargs=None if (given := script.chat_template_kwargs) is None else template_kwargs(given),
        allow_trained_prompts=script.allow_trained_prompts,
        batch_tokens=script.batch_tokens or "auto",
        server=script.server,
        seed=script.seed,
        allow_base_mismatch=script.allow_base_mismatch,
        notes={"task": script.task, "reward_sources": {reward.name: source for source, reward in loaded.items()}},
        out=out / "records.jsonl",
    )
    if os.environ.get("RANK", "0") == "0":
        told = write_report(front, read_jsonl(out / "records.jsonl"), out)
        print("\n".join([*front.notes, front.to_markdown(), *(f"- {sentence}" for sentence in told)]))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with in_one_line():
        example = "--adapters helpful=runs/helpful harmless=runs/harmless --reward helpful harmless --out runs/sweep"
        main(*FlagParser((ScriptArguments,), __doc__, example).read())
