"""Sweep λ between adapters: one base, N ingredients, every reward at every λ; then the front and its report.

    python recipes/sweep.py --adapters naturalness=runs/ppo-naturalness coverage=runs/ppo-coverage \\
        --reward naturalness coverage --others "MORL 0.5/0.5=runs/ppo-morl" --output_dir runs/sweep
    rsoups sweep ...                                          # the same script, from an installed package

Writes records.jsonl, front.png, report.html and report.md to `--output_dir`. Run again after an interruption, it goes
on after the records that are there. As in the paper: 11 λ from 0 to 1, sampled responses; unlike it, the base is loaded
once, prompts are generated in batches, and every figure has an interval.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trl import TrlParser

from rsoups import load_reward, simplex, sweep, write_report
from rsoups._resources import load_rows
from rsoups.tasks import TASKS, read_jsonl


@dataclass
class ScriptArguments:
    adapters: list[str] = field(metadata={"help": "Ingredients, NAME=FOLDER or Hub id."})
    reward: list[str] = field(metadata={"help": "Reward cards, by name or path."})
    model_name_or_path: str = field(default="rsoups/tiny-llama", metadata={"help": "Base."})
    others: list[str] = field(default_factory=list, metadata={"help": "Further adapters to compare, NAME=FOLDER."})
    task: str = field(default="concepts", metadata={"help": "Task of the prompts.", "choices": sorted(TASKS)})
    dataset: str | None = field(
        default=None, metadata={"help": "JSONL file, folder or Hub id; the task's own if unset."}
    )
    prompts: int = field(default=200, metadata={"help": "Test prompts."})
    points: int = field(default=11, metadata={"help": "λ on each edge of the simplex."})
    method: str = field(default="exact", metadata={"help": "exact or factors.", "choices": ["exact", "factors"]})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling; 0 is greedy."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest response."})
    batch_size: int = field(default=64, metadata={"help": "Prompts generated at a time."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    output_dir: str = field(default="runs/sweep", metadata={"help": "Folder of the records and the report."})


def named(pairs: list[str]) -> dict[str, str]:
    """``NAME=SOURCE`` pairs as a dict; a bare source is named after its last part."""
    out = {}
    for pair in pairs:
        name, separator, source = pair.partition("=")
        out[name if separator else Path(pair).name] = source if separator else pair
    return out


def main(script: ScriptArguments) -> None:
    task = TASKS[script.task]
    rows = load_rows(task, script.dataset, "test")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: script.prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = [load_reward(name, device) for name in script.reward]
    adapters = named(script.adapters)
    out = Path(script.output_dir)
    front = sweep(
        script.model_name_or_path,
        adapters,
        {reward.name: reward for reward in loaded},
        prompts,
        simplex(len(adapters), script.points),
        method=script.method,
        others=named(script.others),
        cut=task.cut,
        temperature=script.temperature,
        max_new_tokens=script.max_new_tokens,
        batch_size=script.batch_size,
        seed=script.seed,
        out=out / "records.jsonl",
    )
    write_report(front, read_jsonl(out / "records.jsonl"), out)
    print(front.to_markdown())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(*TrlParser((ScriptArguments,)).parse_args_and_config())
