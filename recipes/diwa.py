"""Many runs of one reward, averaged: DiWA (Ramé et al. 2022, arXiv 2205.09739) and Ratatouille (2023, arXiv 2212.10445).

    python recipes/diwa.py --reward coverage --runs 5 --out runs/diwa
    python recipes/diwa.py --reward coverage --starts runs/ppo-naturalness runs/ppo-rating runs/ppo-both \\
        --out runs/ratatouille                                     # Ratatouille: one run from each auxiliary adapter

How this differs from the papers: PPO of a language model instead of classifiers; the prediction ensemble is the mean of the
runs' next-token distributions while generating, which costs M models at every token.

M runs of recipes/ppo_reward.py over a mild grid: each has its own seed (order of the prompts, sampling), and draws a learning
rate and a KL coefficient near the config's. Then uniform and greedy soups against the single run that is best on validation
prompts, and against the ensemble. All on held-out prompts, and on prompts that ask for more words than any in training. So the
task is concepts, and the policy one that a CPU runs.

report.md and results.json hold the three criteria of weight averaging: linear connectivity (each pair's middle less the
mean of the two), individual accuracy, diversity (KL between next-token distributions); and gain against diversity, which
diwa.png draws. A second run continues an interrupted one.
"""

import argparse
import json
import os
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import rsoups  # isort: skip  (before torch)

import numpy as np
import torch
import yaml

from rsoups.common.errors import in_one_line
from rsoups.common.files import read_jsonl
from rsoups.data.datasets import load_rows
from rsoups.data.prompts import question_of
from rsoups.data.tasks import TASKS
from rsoups.fronts.estimates import Estimate
from rsoups.fronts.points import Point
from rsoups.reports.plots import add_legend, bars, new_figure, style
from rsoups.training.configs import config_path
from rsoups.training.launch import QUIET, Run, train_all

LEARNING_RATES = (0.5, 0.7, 1.0, 1.4)  # mild factors of the config's own, drawn for each run
KL_COEFFICIENTS = (0.6, 1.0, 1.4)
TASK = TASKS["concepts"]
SOUPS = ("uniform soup", "greedy soup")
GAIN = "uniform soup less the runs' mean"
CORRELATION = "correlation of gain and diversity"
MARKS = {"uniform soup": ("#0072B2", "D"), "greedy soup": ("#009E73", "^"), "ensemble": ("#D55E00", "s")}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--reward", default="coverage", help="reward card, by name or path")
    parser.add_argument("--runs", type=int, help="number of runs; one for each start, or 5, if unset")
    parser.add_argument(
        "--starts", nargs="+", default=[], help="adapters to start from, in turn; a fresh LoRA if unset"
    )
    parser.add_argument("--config", type=Path, default=config_path("embedded"),
                        help="config of ppo_reward.py")  # fmt: skip
    parser.add_argument("--max_steps", type=int, help="optimizer steps of each run; the config's own if unset")
    parser.add_argument("--validation", type=int, default=96, help="test prompts that choose, and are not tested on")
    parser.add_argument("--prompts", type=int, help="prompts of each test set; all if unset")
    parser.add_argument("--samples", type=int, default=4, help="responses to each prompt")
    parser.add_argument("--out", type=Path, default=Path("runs/diwa"), help="output folder")
    return parser.parse_args()


def main() -> None:
    args = parse()
    os.environ |= QUIET
    config = yaml.safe_load(args.config.read_text("utf-8"))

    # Train the runs.
    settings = grid(config, args.runs or len(args.starts) or 5)
    runs = [run_of(number, args) for number in settings]
    train_all(runs)

    # Choose on the validation prompts: the best single run, and the greedy soup's members.
    members = {run.folder.name: run.folder for run in runs}
    held_out = list(dict.fromkeys(row["prompt"] for row in load_rows(TASK, None, "test")))
    validation, test = held_out[: args.validation], held_out[args.validation :][: args.prompts]
    evaluation = Evaluation(args, config, members)
    scores = {}

    def score(soup: rsoups.Soup) -> float:
        value = evaluation.score(validation, soup)
        scores[tuple(ingredient.name for ingredient in soup.ingredients)] = value
        return value

    greedy = rsoups.greedy(members, score)
    greedy.save_pretrained(args.out / "greedy")
    rsoups.interpolate(members).save_pretrained(args.out / "uniform")
    pairs = zip(greedy.ingredients, greedy.lambdas, strict=True)
    chosen = [ingredient.name for ingredient, weight in pairs if weight]
    best = max(members, key=lambda name: scores[(name,)])

    # Test: each run, each pair, all of them, and the greedy soup's members.
    groups = [[name] for name in members] + [list(pair) for pair in combinations(members, 2)] + [list(members), chosen]
    rows = list(dict.fromkeys(tuple((name in group) / len(group) for name in members) for group in groups))
    results = {}
    for name, prompts in (("held-out", test), ("more words", more_words(test, seed=0))):
        front, kl = evaluation.front(name, prompts, [list(row) for row in rows])
        results[name] = results_of(front, kl, best, chosen)

    # Report.
    choice = {"best": best, "greedy": chosen, "validation": {"+".join(names): value for names, value in scores.items()}}
    (args.out / "results.json").write_text(json.dumps(choice | results, indent=2) + "\n", "utf-8")
    text = report(results, settings, best, chosen)
    (args.out / "report.md").write_text(text, "utf-8")
    plot(results, len(members), args.reward, args.out / f"{args.out.name}.png")
    print(text)


def grid(config: dict, runs: int) -> list[dict]:
    """The settings of each run."""
    settings = []
    for seed in range(runs):
        rng = random.Random(seed)
        rate, kl = rng.choice(LEARNING_RATES), rng.choice(KL_COEFFICIENTS)
        settings.append(
            {"learning_rate": rate * config["learning_rate"], "kl_coef": kl * config["kl_coef"], "seed": seed}
        )
    return settings


def run_of(settings: dict, args: argparse.Namespace) -> Run:
    """The run of ppo_reward.py with these settings."""
    flags = ["--config", str(args.config), "--reward", args.reward]
    flags += [text for name, value in settings.items() for text in (f"--{name}", f"{value:g}")]
    if args.starts:
        flags += ["--adapter_name_or_path", args.starts[settings["seed"] % len(args.starts)]]
    if args.max_steps:
        flags += ["--max_steps", str(args.max_steps)]
    title = f"run {settings['seed']}: learning rate {settings['learning_rate']:g}, KL {settings['kl_coef']:g}"
    return Run(title, args.out / f"run-{settings['seed']}", flags)


def more_words(prompts: list[str], seed: int) -> list[str]:
    """Each prompt with the words of another one: six to ten of them, where training asks for three to five."""
    shuffled = random.Random(seed).sample(prompts, k=len(prompts))
    longer = []
    for prompt, other in zip(prompts, shuffled, strict=True):
        words = list(dict.fromkeys(f"{question_of(prompt)}, {question_of(other)}".split(", ")))
        if len(words) > 5:
            longer.append(str(TASK.prompt({"concepts": words})))
    return longer


@torch.inference_mode()
def divergences(live: rsoups.LiveSoup, prompts: list[str], responses: list[str], temperature: float) -> np.ndarray:
    """KL(member i ‖ member j), (M, M), in nats per token of given responses, at the sampling temperature.

    Each text is M rows of a batch, one for each member alone.
    """
    assert live.tokenizer is not None  # `LiveSoup.from_pretrained` loads the base's
    members = np.eye(len(live.names)).tolist()
    total, tokens = np.zeros((len(members), len(members))), 0
    for prompt, response in zip(prompts, responses, strict=True):
        before = live.tokenizer(prompt)["input_ids"]
        after = live.tokenizer(response, add_special_tokens=False)["input_ids"]
        with live.at(members) as model:
            logits = model(input_ids=torch.tensor([before + after] * len(members))).logits[:, len(before) - 1 : -1]
        logp = (logits.float() / temperature).log_softmax(-1)
        total += torch.einsum("itv,ijtv->ij", logp.exp(), logp[:, None] - logp[None]).numpy()
        tokens += len(after)
    return total / tokens


class Evaluation:
    """Every model on a set of prompts, `samples` times each."""

    def __init__(self, args: argparse.Namespace, config: dict, members: dict[str, Path]):
        self.out, self.samples, self.members = args.out, args.samples, members
        self.base, self.reward = config["model_name_or_path"], rsoups.load_reward(args.reward)
        self.settings = {"temperature": config["temperature"], "max_new_tokens": config["max_completion_length"]}
        self.live = rsoups.LiveSoup.from_pretrained(self.base, members)

    def records(self, name: str, prompts: list[str], rows: list[list[float]], ensemble: bool = False) -> list[dict]:
        """Records of soups of the members, the base and their prediction ensemble."""
        path = self.out / "records" / f"{name}.jsonl"
        rewards = {self.reward.name: self.reward}
        settings = {"ensemble": ensemble, "samples": self.samples, "cut": TASK.cut, "out": path} | self.settings
        rsoups.sweep(self.live, None, rewards, prompts, rows, **settings)
        return read_jsonl(path)

    def score(self, prompts: list[str], soup: rsoups.Soup) -> float:
        """The soup's mean reward."""
        weights = dict(zip((i.name for i in soup.ingredients), soup.lambdas, strict=True))
        row = [weights.get(name, 0.0) for name in self.members]
        records = self.records("validation-" + "+".join(sorted(weights)), prompts, [row])
        return rsoups.Front.from_records(records).soups[0].mean[self.reward.name]

    def front(self, name: str, prompts: list[str], rows: list[list[float]]) -> tuple[rsoups.Front, np.ndarray]:
        """Soups, base and ensemble; and the members' divergences over the first responses of their uniform soup."""
        records = self.records(name, prompts, rows, ensemble=True)
        uniform = [r for r in records if r["lambdas"] and not r["sample"] and len(set(r["lambdas"].values())) == 1]
        responses = {record["prompt"]: record["response"] for record in uniform}
        kl = divergences(self.live, list(responses), list(responses.values()), self.settings["temperature"])
        return rsoups.Front.from_records(records), kl


def results_of(front: rsoups.Front, divergences: np.ndarray, best: str, chosen: list[str]) -> dict:
    """The figures of one set of prompts: rewards, differences, and for each pair of runs its gain and its diversity."""
    (reward,), names = front.rewards, front.ingredients
    gains = {id(point): gap[reward] for point, gap in front.linear_mode_connectivity()}

    def at(some: Sequence[str]) -> Point:
        return front.at({name: 1 / len(some) for name in some})

    def figures(estimate: Estimate) -> list[float | None]:
        return [estimate.value, estimate.low, estimate.high]

    models = {name: at([name]) for name in names}
    models |= {"uniform soup": at(names), "greedy soup": at(chosen), **{p.name: p for p in front.others}}
    pairs: list[dict[str, Any]] = []
    for i, j in combinations(range(len(names)), 2):
        runs = [names[i], names[j]]
        diversity = float(divergences[i, j] + divergences[j, i]) / 2
        pairs.append({"runs": runs, "diversity": diversity, "gain": figures(gains[id(at(runs))])})
    correlation = None
    if len(pairs) > 2:
        correlation = float(np.corrcoef([p["diversity"] for p in pairs], [p["gain"][0] for p in pairs])[0, 1])

    against = [(a, b) for a in SOUPS for b in (best, "ensemble")]
    return {
        "reward": {name: figures(point.estimate(reward)) for name, point in models.items()},
        GAIN: figures(gains[id(at(names))]),
        "differences": {f"{a} less {b}": figures(front.difference(models[a], models[b])[reward]) for a, b in against},
        "pairs": pairs,
        CORRELATION: correlation,
    }


def report(results: dict, settings: list[dict], best: str, chosen: list[str]) -> str:
    def row(name: str, setting: str, cells: list[list[float]]) -> str:
        return f"| {name} | {setting} | {' | '.join(str(Estimate(*cell)) for cell in cells)} |"

    sets, first = list(results.values()), next(iter(results.values()))
    lines = [f"Best single run on the validation prompts: {best}. Greedy soup: {', '.join(chosen)}.", ""]
    lines += [f"| model | settings | {' | '.join(results)} |", "| --- | --- |" + " ---: |" * len(results)]
    notes = {f"run-{s['seed']}": f"learning rate {s['learning_rate']:g}, KL {s['kl_coef']:g}" for s in settings}
    lines += [row(name, notes.get(name, ""), [r["reward"][name] for r in sets]) for name in first["reward"]]
    lines += [row(name, "", [r["differences"][name] for r in sets]) for name in first["differences"]]
    lines += [row(GAIN, "", [r[GAIN] for r in sets]), ""]
    for name, figures in results.items():
        gains, kl = [p["gain"] for p in figures["pairs"]], [p["diversity"] for p in figures["pairs"]]
        correlation = figures[CORRELATION]
        lines.append(
            f"- {name}: of {len(gains)} pairs, {sum(g[0] >= 0 for g in gains)} have a middle at or above their mean "
            f"({sum(g[1] > 0 for g in gains)} above, {sum(g[2] < 0 for g in gains)} below with 95% confidence); mean gain "
            f"{np.mean([g[0] for g in gains]):+.3f}; KL between two runs {min(kl):.3f} to {max(kl):.3f} nats per token"
            + ("." if correlation is None else f"; correlation of gain and KL {correlation:+.2f}.")
        )
    return "\n".join(lines) + "\n"


def plot(results: dict, runs: int, reward: str, path: Path) -> None:
    """Left: every model on every set of prompts. Right: each pair's gain against its diversity."""
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    for at, (figures, color) in enumerate(zip(results.values(), ("#0072B2", "#D55E00"), strict=False)):
        rewards = figures["reward"]
        single = [value for name, (value, _, _) in rewards.items() if name.startswith("run-")]
        left.plot([at - 0.2] * runs, single, "o", color="#777777", label="single runs")
        for shift, (name, (mark, shape)) in zip((-0.05, 0.1, 0.25), MARKS.items(), strict=True):
            yerr = bars([Estimate(*rewards[name])])
            left.errorbar(at + shift, rewards[name][0], yerr=yerr, fmt=shape, color=mark, label=name)
        left.hlines(rewards["base"][0], at - 0.3, at + 0.35, "#222222", "dotted", label="base")

        gains = [Estimate(*pair["gain"]) for pair in figures["pairs"]]
        kl, y = [pair["diversity"] for pair in figures["pairs"]], [gain.value for gain in gains]
        right.errorbar(kl, y, yerr=bars(gains), fmt="o", color=color, ecolor=color + "55", label=list(results)[at])

    left.set_xticks(range(len(results)), results)
    left.set_ylabel(f"{reward}  (mean reward)")
    left.set_title("bars: 95% bootstrap over prompts", fontsize=9, color="#777777", loc="left")
    right.axhline(0, color="#777777", ls="--", lw=1.2)
    right.set_xlabel("KL between the two runs, nats per token")
    right.set_ylabel("middle of two runs less their mean")
    for axes in (left, right):
        add_legend(axes)
        style(axes)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    with in_one_line():
        main()
