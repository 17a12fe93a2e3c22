"""The command line: thin commands over the library and the recipes. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from rsoups import __version__
from rsoups._errors import AdapterError, DatasetError, RsoupsError
from rsoups._resources import shipped
from rsoups.cli_hub import add_commands

_RECIPES = {
    "sweep": "generate and score at every λ, then draw the front and write the report",
    "demo": "the whole recipe on the embedded models, offline, in minutes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that rsoups raises on purpose are one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Where it is installed, it tells everyone of CPU kernels that only 4-bit bases miss.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if arguments[:1] and arguments[0] in _RECIPES:
            _recipe(arguments[0], arguments[1:])
        else:
            args = _parser().parse_args(arguments)
            args.run(args)
    except RsoupsError as error:
        print(f"rsoups: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rsoups", description="Rewarded soups: one adapter per reward, any trade-off."
    )
    parser.add_argument("--version", action="version", version=f"rsoups {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    interpolate = commands.add_parser("interpolate", help="make one soup from several adapters")
    interpolate.add_argument("adapters", nargs="+", help="folders or Hub ids (id@revision)")
    interpolate.add_argument(
        "--lambdas", nargs="+", type=float, help="one weight for each adapter; uniform if left out"
    )
    interpolate.add_argument("--out", required=True, type=Path, help="folder of the soup")
    interpolate.add_argument("--method", default="exact", choices=("exact", "factors", "svd"))
    interpolate.add_argument(
        "--rank", type=_rank, help="of an svd soup; below 1 the largest relative error, which decides the rank"
    )
    interpolate.add_argument("--normalize", action="store_true", help="divide the weights by their sum")
    interpolate.add_argument("--extrapolate", action="store_true", help="allow weights outside [0, 1]")
    interpolate.set_defaults(run=_interpolate)

    inspect = commands.add_parser("inspect", help="what adapters are, how far apart, whether they can be souped")
    inspect.add_argument("adapters", nargs="+", help="folders or Hub ids (id@revision)")
    inspect.add_argument("--records", type=Path, help="records.jsonl of a sweep over them: looks for barriers too")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", help="write an adapter or a soup into its base: a whole model")
    merge.add_argument("adapter", help="folder or Hub id (id@revision)")
    merge.add_argument("--base", help="folder or Hub id; the one that the adapter names if left out")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the model; the base's if left out"
    )
    merge.add_argument("--out", required=True, type=Path, help="folder of the model")
    merge.set_defaults(run=_merge)

    rewards = commands.add_parser("rewards", help="the reward cards that ship with rsoups")
    rewards.set_defaults(run=_rewards)

    score = commands.add_parser("score", help="score one response, and show what the reward model reads")
    score.add_argument("--reward", required=True, help="a card's name or path, a classifier's Hub id, module:function")
    score.add_argument("--prompt", required=True, help="a policy's prompt, or a bare question")
    score.add_argument("--response", required=True)
    score.add_argument("--device", default="cpu")
    score.set_defaults(run=_score)

    tasks = commands.add_parser("tasks", help="the tasks that write prompts")
    tasks.set_defaults(run=_tasks)

    preview = commands.add_parser("preview", help="five prompts of a task, and what a reward would see of them")
    preview.add_argument("--task", required=True, help="a task's name, or custom")
    preview.add_argument("--dataset", help="file, folder or Hub id; the task's own if left out")
    preview.add_argument("--template", help="of a custom task's prompts")
    preview.add_argument("--split", default="train", choices=("train", "test"))
    preview.add_argument("--reward", help="a reward, as in rsoups score")
    preview.add_argument("--tokenizer", default="rsoups/tiny-llama", help="whose tokens are counted")
    preview.add_argument("--rows", type=int, default=1000, help="how many of the dataset's rows are looked at")
    preview.set_defaults(run=_preview)

    report = commands.add_parser("report", help="draw the front of a records file and write its report")
    report.add_argument("records", type=Path, help="records.jsonl of a sweep")
    report.add_argument("--out", type=Path, help="folder of the report; beside the records if left out")
    report.set_defaults(run=_report)

    add_commands(commands)
    for name, text in _RECIPES.items():  # listed here for --help; `main` runs them
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _recipe(name: str, arguments: list[str]) -> None:
    script = str(shipped("recipes") / f"{name}.py")
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _interpolate(args: argparse.Namespace) -> None:
    from rsoups.soup import Soup, interpolate

    soup = interpolate(
        args.adapters,
        args.lambdas,
        method=args.method,
        rank=args.rank,
        normalize=args.normalize,
        extrapolate=args.extrapolate,
    )
    assert isinstance(soup, Soup)
    soup.save_pretrained(args.out)
    print(args.out)


def _rank(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)


def _inspect(args: argparse.Namespace) -> None:
    from rsoups.adapters import read_adapter
    from rsoups.conflicts import merge_conflicts
    from rsoups.front import Front
    from rsoups.inspection import inspect_adapters

    adapters = {source: read_adapter(source) for source in args.adapters}
    print(inspect_adapters(adapters).to_text())
    for conflict in merge_conflicts(adapters, Front.from_jsonl(args.records) if args.records else None):
        print(f"conflict: {conflict}")


def _merge(args: argparse.Namespace) -> None:
    import torch

    from rsoups.soup import Soup, interpolate

    soup = interpolate([args.adapter], [1.0])
    assert isinstance(soup, Soup)
    base = args.base or soup.config.base_model_name_or_path
    if not base:
        raise AdapterError(f"{args.adapter} does not name its base: say --base")
    soup.merge(base, args.out, dtype=getattr(torch, args.dtype) if args.dtype else None)
    print(args.out)


def _rewards(args: argparse.Namespace) -> None:
    from rsoups.scoring import RewardCard, cards

    for name, path in cards().items():
        card = RewardCard.read(path)
        logit = f"{'-' if card.sign < 0 else ''}logit {card.logit}" + (
            f" - logit {card.minus}" if card.minus is not None else ""
        )
        print(f"{name:20} {card.model:50} {card.input:28} {logit}")


def _score(args: argparse.Namespace) -> None:
    from rsoups.scoring import Reward, load_reward

    reward = load_reward(args.reward, args.device)
    if isinstance(reward, Reward):
        found = reward.explain(args.prompt, args.response)
        print(f"input   {found['text']}\nids     {found['ids']}")
        print("logits  " + ", ".join(f"{label} {value:.6g}" for label, value in found["logits"].items()))
        print(f"score   {found['score']:.6g}")
    else:
        print(f"score   {reward([args.prompt], [args.response])[0]:.6g}")


def _tasks(args: argparse.Namespace) -> None:
    from rsoups.tasks import TASKS

    for task in TASKS.values():
        rows = "".join(f", {most:,} rows of {split}" for split, most in task.most.items())
        print(
            f"{task.name:10} {task.dataset:34} {', '.join(task.columns)}; rewards see: {task.cut.__name__.strip('_')}{rows}"
        )
    print(f"{'custom':10} {'any: --dataset':34} prompt, or the columns of a --template")


def _preview(args: argparse.Namespace) -> None:
    from itertools import islice

    from transformers import AutoTokenizer

    from rsoups._resources import raw_rows, resolve
    from rsoups.scoring import Reward, load_reward
    from rsoups.tasks import TASKS, custom_task

    if args.task not in {*TASKS, "custom"} or (args.task == "custom" and not args.dataset):
        raise DatasetError(f"--task is one of {[*TASKS, 'custom']}, and custom needs a --dataset; got {args.task!r}")
    task = custom_task(args.dataset, args.template) if args.task == "custom" else TASKS[args.task]
    raw = list(islice(raw_rows(task, args.dataset, args.split), args.rows))
    rows = task.rows(raw)
    tokenizer = AutoTokenizer.from_pretrained(resolve(args.tokenizer))
    reward = load_reward(args.reward) if args.reward else None
    print(f"{len(rows)} of the first {len(raw)} rows kept, {len(raw) - len(rows)} dropped")
    for row in rows[:5]:
        text = row["prompt"]
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        print(f"\n[{len(tokenizer(text)['input_ids'])} tokens] {text}")
        if row["references"]:
            said = task.cut(row["references"][0])
            print(f"  reference: {said}")
            if isinstance(reward, Reward):
                found = reward.explain(row["prompt"], said)
                print(f"  {reward.name} reads: {found['text']}\n  and scores it {found['score']:.4g}")
            elif reward is not None:
                print(f"  {reward.name} scores it {reward([row['prompt']], [said])[0]:.4g}")


def _report(args: argparse.Namespace) -> None:
    from rsoups.front import Front
    from rsoups.report import write_report
    from rsoups.tasks import read_jsonl

    front = Front.from_jsonl(args.records)
    write_report(front, read_jsonl(args.records), args.out or args.records.parent)
    print(front.to_markdown())
    print(args.out or args.records.parent)


if __name__ == "__main__":
    sys.exit(main())
