"""Commands: rewards, score, probe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rsoups.cli.data import TEMPLATE_HELP, task_of_arguments
from rsoups.common.errors import OutputError, RewardError


def add_probe(commands: argparse._SubParsersAction) -> None:
    probe = commands.add_parser("probe", help="what rewards make of length, nothing, noise, templates, wrong questions")
    probe.add_argument("rewards", nargs="+", help="rewards, as in rsoups score")
    probe.add_argument("--task", default="concepts", help="a task's name, or custom")
    probe.add_argument("--dataset", help="file, folder or Hub id; the task's own if left out")
    probe.add_argument("--template", help="of a custom task's prompts")
    probe.add_argument(
        "--split", choices=("train", "test", "all"), help="all rows of one file, test of other datasets if left out"
    )
    probe.add_argument("--model", default="rsoups/tiny-llama", help="who answers where the data holds no references")
    probe.add_argument("--chat_template_kwargs", help=TEMPLATE_HELP)
    probe.add_argument("--records", help="take the responses of a sweep's records.jsonl instead")
    probe.add_argument("--rows", type=int, default=200, help="how many responses are looked at")
    probe.add_argument("--seed", type=int, default=0)
    probe.add_argument("--device", default="cpu")
    probe.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a model")
    probe.add_argument("--out", type=Path, help="JSON file of the figures")
    probe.set_defaults(run=_probe)


def rewards(args: argparse.Namespace) -> None:
    from rsoups.rewards.load import cards, read_card

    for name, path in cards().items():
        print(f"{name:20} {read_card(path).summary()}")


def score(args: argparse.Namespace) -> None:
    from rsoups.rewards.classifier import Reward
    from rsoups.rewards.interface import columns_read
    from rsoups.rewards.judge import Judge
    from rsoups.rewards.load import load_reward

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
    from rsoups.data.prompts import template_kwargs
    from rsoups.rewards.interface import check_columns, columns_read
    from rsoups.rewards.judge import Judge
    from rsoups.rewards.load import load_reward
    from rsoups.rewards.probing import probe, sample_of, sample_of_records

    loaded = [load_reward(name, args.device, trust_remote_code=args.trust_remote_code) for name in args.rewards]
    if len(names := {reward.name for reward in loaded}) < len(loaded):
        raise RewardError(f"{len(loaded)} rewards with {len(names)} names, {sorted(names)}: give each its own")
    if args.records:
        sample = sample_of_records(args.records, args.rows, args.seed)
    else:
        options = {"split": args.split, "rows": args.rows, "model": args.model, "device": args.device}
        kept, template = columns_read(loaded), template_kwargs(args.chat_template_kwargs)
        sample = sample_of(
            task_of_arguments(args), args.dataset, seed=args.seed, kept=kept, template=template, **options
        )
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
