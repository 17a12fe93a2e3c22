"""The command line: thin commands over the library and the recipes. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import json
import logging
import os
import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsoups import __version__
from rsoups._errors import AdapterError, FrontError, OutputError, RewardError, RsoupsError
from rsoups._resources import named_sources, shipped
from rsoups.cli_hub import add_commands, add_override

if TYPE_CHECKING:
    from rsoups.front import Front
    from rsoups.tasks import Task

_BASE = "folder or Hub id of the base, for what only it can tell: whole parameters that some lack, old names of layers"
_RECIPES = {
    "sweep": "generate and score at every λ, then draw the front and write the report",
    "demo": "the whole recipe on the embedded models, offline, in minutes",
}
_TEMPLATE_HELP = "JSON object: variables of the chat template, as in training"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that rsoups raises on purpose are one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Where it is installed, it tells everyone of CPU kernels that only 4-bit bases miss.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if arguments[:1] and arguments[0] in _RECIPES:
            return _recipe(arguments[0], arguments[1:])
        args = _parser().parse_args(arguments)
        args.run(args)
    except RsoupsError as error:
        told = " ".join(str(error).splitlines())  # other libraries' reasons may have several lines
        print(f"rsoups: {told}", file=sys.stderr)
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
    interpolate.add_argument("--extrapolate", action="store_true", help="allow weights outside [0, 1], and any sum")
    interpolate.add_argument("--base", help=_BASE)
    add_override(interpolate)
    interpolate.set_defaults(run=_interpolate)

    inspect = commands.add_parser("inspect", help="what adapters are, how far apart, whether they can be souped")
    inspect.add_argument("adapters", nargs="+", help="folders or Hub ids (id@revision)")
    inspect.add_argument("--records", type=Path, help="records.jsonl of a sweep over them: looks for barriers too")
    inspect.add_argument("--base", help=_BASE)
    add_override(inspect)
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser("merge", help="write an adapter or a soup into its base: a whole model")
    merge.add_argument("adapter", help="folder or Hub id (id@revision)")
    merge.add_argument("--base", help="folder or Hub id; the one that the adapter names if left out")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the model; the base's if left out"
    )
    merge.add_argument("--out", required=True, type=Path, help="folder of the model")
    add_override(merge)
    merge.set_defaults(run=_merge)

    convert = commands.add_parser("convert", help="pickled weights (.bin, .pt) of an adapter or a model to safetensors")
    convert.add_argument("source", help="folder, file or Hub id (id@revision)")
    convert.add_argument(
        "--out", type=Path, help="new folder; the cache if left out, where every command finds it under the same name"
    )
    convert.set_defaults(run=_convert)

    rewards = commands.add_parser("rewards", help="the reward cards that ship with rsoups")
    rewards.set_defaults(run=_rewards)

    score = commands.add_parser("score", help="score one response, and show what a reward model reads")
    score.add_argument("--reward", required=True, help="a card's name or path, a classifier's Hub id, module:function")
    score.add_argument("--prompt", required=True, help="a policy's prompt, or a bare question")
    score.add_argument("--response", required=True)
    score.add_argument("--reference", nargs="+", help="texts that a statistical reward compares the response with")
    score.add_argument(
        "--column",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what else of a row the reward reads; VALUE as in a line of JSON, or a text",
    )
    score.add_argument("--device", default="cpu")
    score.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    score.set_defaults(run=_score)

    _add_probe(commands)

    tasks = commands.add_parser("tasks", help="the tasks that write prompts")
    tasks.set_defaults(run=_tasks)

    preview = commands.add_parser("preview", help="five prompts of a task, and what a reward would see of them")
    preview.add_argument("--task", required=True, help="a task's name, or custom")
    preview.add_argument("--dataset", help="file, folder or Hub id; the task's own if left out")
    preview.add_argument("--template", help="of a custom task's prompts")
    preview.add_argument("--split", default="train", choices=("train", "test", "all"), help="all: of one file")
    preview.add_argument("--reward", help="a reward, as in rsoups score")
    preview.add_argument("--tokenizer", default="rsoups/tiny-llama", help="whose tokens are counted")
    preview.add_argument("--chat_template_kwargs", help=_TEMPLATE_HELP)
    preview.add_argument("--rows", type=int, default=1000, help="how many of the dataset's rows are looked at")
    preview.set_defaults(run=_preview)

    _add_fronts(commands)
    _add_explore(commands)
    add_commands(commands)
    for name, text in _RECIPES.items():  # listed here for --help; `main` runs them
        commands.add_parser(name, help=text, add_help=False)
    return parser


def _add_fronts(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands over a sweep's records."""
    report = commands.add_parser("report", help="draw the front of a records file and write its report")
    report.add_argument("records", type=Path, help="records.jsonl of a sweep")
    report.add_argument("--out", type=Path, help="folder of the report; beside the records if left out")
    report.add_argument(
        "--reference",
        nargs="+",
        metavar="REWARD=VALUE",
        help="where hypervolume is counted from, for each reward (all maximised)",
    )
    report.add_argument(
        "--other",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="further fronts: records.jsonl, or points in a .csv",
    )
    report.set_defaults(run=_report)

    select = commands.add_parser("select", help="choose λ among the soups of a records file, by one rule")
    select.add_argument("records", type=Path, help="records.jsonl of a sweep, or points in a .csv")
    select.add_argument("--preference", nargs="+", metavar="REWARD=WEIGHT", help="the largest weighted sum")
    select.add_argument(
        "--maximise", metavar="REWARD", help="the most of one reward, with --subject_to limits of others"
    )
    select.add_argument("--subject_to", nargs="+", metavar="'REWARD >= 0.2'", help="limits of rewards, each in quotes")
    select.add_argument("--knee", action="store_true", help="where the front bends")
    select.add_argument("--votes", type=Path, help="votes.jsonl: what people chose between generations")
    select.add_argument(
        "--above_base", action="store_true", help="above the base in every reward; with --preference, its best by it"
    )
    select.set_defaults(run=_select)


def _add_explore(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    explore = commands.add_parser("explore", help="choose λ on a page: slide, read, vote, save; or write it as a Space")
    explore.add_argument("folder", nargs="?", type=Path, help="of a sweep: records.jsonl, the models beside it")
    explore.add_argument("--base", help="folder or Hub id; the sweep's if left out")
    explore.add_argument("--adapters", nargs="+", default=[], metavar="NAME=FOLDER", help="the sweep's if left out")
    explore.add_argument("--host", default="127.0.0.1", help="address to listen on")
    explore.add_argument("--port", type=int, help="the first free one from 7860 if left out")
    explore.add_argument("--export", type=Path, metavar="FOLDER", help="write a Hugging Face Space there instead")
    add_override(explore)
    explore.set_defaults(run=_explore)


def _add_probe(commands: argparse._SubParsersAction) -> None:
    probe = commands.add_parser("probe", help="what rewards make of length, nothing, noise, templates, wrong questions")
    probe.add_argument("rewards", nargs="+", help="rewards, as in rsoups score")
    probe.add_argument("--task", default="concepts", help="a task's name, or custom")
    probe.add_argument("--dataset", help="file, folder or Hub id; the task's own if left out")
    probe.add_argument("--template", help="of a custom task's prompts")
    probe.add_argument(
        "--split", choices=("train", "test", "all"), help="all rows of one file, test of other datasets if left out"
    )
    probe.add_argument("--model", default="rsoups/tiny-llama", help="who answers where the data holds no references")
    probe.add_argument("--chat_template_kwargs", help=_TEMPLATE_HELP)
    probe.add_argument("--records", help="take the responses of a sweep's records.jsonl instead")
    probe.add_argument("--rows", type=int, default=200, help="how many responses are looked at")
    probe.add_argument("--seed", type=int, default=0)
    probe.add_argument("--device", default="cpu")
    probe.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a model")
    probe.add_argument("--out", type=Path, help="JSON file of the figures")
    probe.set_defaults(run=_probe)


def _recipe(name: str, arguments: list[str]) -> int:
    script = str(shipped("recipes") / f"{name}.py")
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:  # what a recipe refuses it has told
        if end.code != 2:
            raise
        return 2
    return 0


def _interpolate(args: argparse.Namespace) -> None:
    from rsoups.soup import Soup, interpolate

    soup = interpolate(
        args.adapters,
        args.lambdas,
        method=args.method,
        rank=args.rank,
        normalize=args.normalize,
        extrapolate=args.extrapolate,
        allow_base_mismatch=args.allow_base_mismatch,
        base=args.base,
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
    found = inspect_adapters(adapters, args.base, allow_base_mismatch=args.allow_base_mismatch)
    print(found.to_text())
    for conflict in merge_conflicts(found.adapters, Front.from_jsonl(args.records) if args.records else None):
        print(f"conflict: {conflict}")


def _convert(args: argparse.Namespace) -> None:
    from rsoups.convert import convert

    convert(args.source, args.out)


def _merge(args: argparse.Namespace) -> None:
    import torch

    from rsoups.soup import Soup, interpolate

    soup = interpolate([args.adapter], [1.0])
    assert isinstance(soup, Soup)
    base = args.base or soup.config.base_model_name_or_path
    if not base:
        raise AdapterError(f"{args.adapter} does not name its base: say --base")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    soup.merge(base, args.out, dtype, allow_base_mismatch=args.allow_base_mismatch)
    print(args.out)


def _rewards(args: argparse.Namespace) -> None:
    from rsoups.scoring import cards, read_card

    for name, path in cards().items():
        print(f"{name:20} {read_card(path).summary()}")


def _score(args: argparse.Namespace) -> None:
    from rsoups.function_rewards import columns_read
    from rsoups.judge import Judge
    from rsoups.scoring import Reward, load_reward

    reward = load_reward(args.reward, args.device, trust_remote_code=args.trust_remote_code)
    if isinstance(reward, Reward):
        found = reward.explain(args.prompt, args.response)
        print(f"input   {found['text']}\nids     {found['ids']}")
        print("logits  " + ", ".join(f"{label} {value:.6g}" for label, value in found["logits"].items()))
        print(f"score   {found['score']:.6g}")
    else:
        if "references" in columns_read([reward]) and not args.reference:
            raise RewardError(f"reward {reward.name!r} compares a response with references: say --reference TEXT ...")
        columns = {name: [value] for name, value in map(_column, args.column)}
        columns |= {"references": [args.reference]} if args.reference else {}
        (score,) = reward([args.prompt], [args.response], **columns)
        if score is None:
            print("score   None: the reward has no opinion on this response")
            return
        if (card := getattr(reward, "card", None)) and (card.mean, card.std) != (0, 1):
            print(f"raw     {getattr(card, 'sign', 1) * (score * card.std + card.mean):.6g}")
        print(f"score   {score:.6g}")
    if isinstance(reward, Judge):
        print(f"asked   {reward.counts}")


def _column(pair: str) -> tuple[str, Any]:
    name, separator, value = pair.partition("=")
    if not separator:
        raise RewardError(f"--column takes NAME=VALUE, got {pair!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _probe(args: argparse.Namespace) -> None:
    from rsoups.function_rewards import check_columns, columns_read
    from rsoups.judge import Judge
    from rsoups.probing import probe, sample_of, sample_of_records
    from rsoups.scoring import load_reward
    from rsoups.tasks import template_kwargs

    loaded = [load_reward(name, args.device, trust_remote_code=args.trust_remote_code) for name in args.rewards]
    if len(names := {reward.name for reward in loaded}) < len(loaded):
        raise RewardError(f"{len(loaded)} rewards with {len(names)} names, {sorted(names)}: give each its own")
    if args.records:
        sample = sample_of_records(args.records, args.rows, args.seed)
    else:
        options = {"split": args.split, "rows": args.rows, "model": args.model, "device": args.device}
        kept, template = columns_read(loaded), template_kwargs(args.chat_template_kwargs)
        sample = sample_of(_task(args), args.dataset, seed=args.seed, kept=kept, template=template, **options)
        check_columns(loaded, sample.columns)
    found = probe({reward.name: reward for reward in loaded}, sample, seed=args.seed)
    print(found.to_text())
    for reward in loaded:
        if isinstance(reward, Judge):
            print(f"{reward.name} was asked: {reward.counts}")
    if args.out:
        try:
            args.out.write_text(found.to_json(), "utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {args.out}: {error.strerror}") from None


def _task(args: argparse.Namespace) -> Task:
    from rsoups.tasks import find_task

    return find_task(args.task, args.dataset, args.template)


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

    from rsoups._resources import is_table, load_tokenizer, part_of, raw_rows
    from rsoups.decoding import encode
    from rsoups.function_rewards import check_columns, columns_read
    from rsoups.scoring import load_reward
    from rsoups.tasks import columns_of, template_kwargs

    task = _task(args)
    one_file = is_table(task, args.dataset)
    raw = list(islice(raw_rows(task, args.dataset, args.split), None if one_file else args.rows))
    reward = load_reward(args.reward) if args.reward else None
    rows = task.rows(raw, kept=columns_read([reward]))
    print(f"{len(rows)} of the first {len(raw)} rows kept, {len(raw) - len(rows)} dropped")
    if one_file:
        rows = part_of(rows, args.split, str(args.dataset or task.dataset))
        print(f"{len(rows)} of them are the split {args.split!r}")
    if reward is not None:
        check_columns([reward], columns_of(rows))

    tokenizer = load_tokenizer(args.tokenizer)
    template = template_kwargs(args.chat_template_kwargs)
    for row in rows[:5]:
        ids = encode(tokenizer, row["prompt"], template)
        text = row["prompt"] if isinstance(row["prompt"], str) else tokenizer.decode(ids)
        print(f"\n[{len(ids)} tokens] {text}")
        if row["references"]:
            _preview_reference(row, task, reward)


def _preview_reference(row: dict[str, Any], task: Task, reward: Any) -> None:
    """The first reference of a row, and what a reward reads of it and makes of it."""
    from rsoups.scoring import Reward

    said = task.cut(row["references"][0])
    print(f"  reference: {said}")
    if isinstance(reward, Reward):
        found = reward.explain(row["prompt"], said)
        print(f"  {reward.name} reads: {found['text']}\n  and scores it {found['score']:.4g}")
    elif reward is not None:
        columns = {name: [row[name]] for name in reward.columns if name in row}
        (score,) = reward([row["prompt"]], [said], **columns)
        print(f"  {reward.name} scores it {'None' if score is None else format(score, '.4g')}")


def _front(path: Path) -> Front:
    from rsoups.front import Front

    return Front.from_csv(path) if path.suffix == ".csv" else Front.from_jsonl(path)


def _report(args: argparse.Namespace) -> None:
    from rsoups.report import write_report
    from rsoups.tasks import read_jsonl

    front = _front(args.records)
    others = {name: _front(Path(path)) for name, path in named_sources(args.other, "other fronts", FrontError).items()}
    records = [] if args.records.suffix == ".csv" else read_jsonl(args.records)
    told = write_report(
        front,
        records,
        args.out or args.records.parent,
        reference=_figures(args.reference) if args.reference else None,
        others=others,
        settings=_settings(args.records),
    )
    print("\n".join([*front.notes, front.to_markdown(), *(f"- {sentence}" for sentence in told)]))
    print(args.out or args.records.parent)


def _select(args: argparse.Namespace) -> None:
    front = _front(args.records)
    choice = front.select(
        _figures(args.preference) if args.preference else None,
        maximise=args.maximise,
        subject_to=dict(_limit(text) for text in args.subject_to) if args.subject_to else None,
        knee=args.knee,
        votes=args.votes,
        above_base=args.above_base,
    )
    for note in front.notes:
        print(note)
    print(f"{choice}  (all rewards maximised)")
    if choice.behind:
        print(_better(front))
    if choice.point.lambdas:
        adapters = _settings(args.records).get("adapters", {})
        found = [_source(args.records.parent, name, adapters.get(name)) for name in choice.point.lambdas]
        found = [os.path.normpath(source) for source in found]  # without the way up and down again
        weights = " ".join(f"{weight:.6g}" for weight in choice.point.lambdas.values())
        print(f"rsoups interpolate {shlex.join(found)} --lambdas {weights} --out soup")


def _better(front: Front) -> str:
    """What is above the base in every reward, where a choice is not."""
    try:
        return f"Above the base in every reward (--above_base): {front.select(above_base=True)}"
    except FrontError as error:
        return f"{error}"


def _settings(records: Path) -> dict[str, Any]:
    """What a sweep leaves beside its records."""
    path = records.with_suffix(".settings.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _source(folder: Path, name: str, told: str | None) -> str:
    """An ingredient's folder, told as seen from that of the records, or its Hub id; its name where neither is known."""
    inside = folder / told if told else None
    return str(inside) if inside and inside.is_dir() else told or name


def _figures(given: Sequence[str]) -> dict[str, float]:
    """``a=.7 b=.3``, or ``a=.7,b=.3``."""
    found = {}
    for pair in ",".join(given).split(","):
        name, separator, value = pair.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator:
            raise FrontError(f"{pair!r} is not REWARD=NUMBER")
    return found


def _limit(text: str) -> tuple[str, str]:
    """``a >= 0.2`` to the reward and its limit."""
    place = min((at for sign in "<>" if (at := text.find(sign)) > 0), default=0)
    if not place:
        raise FrontError(f"the limit {text!r} is not like 'REWARD >= 0.2'")
    return text[:place].strip(), text[place:]


def _explore(args: argparse.Namespace) -> None:
    from rsoups.explorer import explore
    from rsoups.space import write_space

    if wrong := [pair for pair in args.adapters if "=" not in pair]:
        raise AdapterError(f"--adapters takes NAME=FOLDER or NAME=HUB_ID, got {wrong}")
    models = {"base": args.base, "adapters": named_sources(args.adapters, "adapters")}
    models["allow_base_mismatch"] = args.allow_base_mismatch
    if args.export:
        write_space(args.folder, args.export, **models)
        print(f"{args.export}\npublish it: hf upload user/name {args.export} . --repo-type space")
    else:
        explore(args.folder, host=args.host, port=args.port, **models)


if __name__ == "__main__":
    sys.exit(main())
