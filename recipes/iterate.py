"""Iterated soups: PPO for each reward, their soup, PPO for each reward from it, ... (WARP, Ramé et al. 2024, arXiv 2406.16768).

    python recipes/iterate.py --rounds 3 --output_dir runs/iterate                        # the embedded policy
    python recipes/iterate.py --rounds 1 --max_steps 360 --output_dir runs/once           # as many steps without iterating
    python recipes/iterate.py --config recipes/configs/llama7b-assistant.yaml --reward helpful harmless

How this differs from WARP: the policies of a round are of different rewards, not of one reward and other orders of the
prompts; interpolation is linear, not spherical; the KL reference within a run is its start, not the run's moving average.

A round trains one adapter for each reward, all from one start, whose frozen copy is their KL reference; interpolates them; and
moves the start a share `--eta` of the way to the soup, where the next round begins. `factors` keeps the rank from round to
round, and is right because the adapters share their start; `svd` is the exact soup, cut back to the start's rank. Flags that
are not of this recipe go to recipes/ppo_reward.py.

After each round, as in the paper: models on the line from the first start to the soup, (1 - η)·start + η·soup, with their
rewards and their KL to the first start on held-out prompts: the KL-reward front, which further rounds should lift.

Writes round-N/ (ingredients, soup, start of the next one), records.jsonl, iterate.png, report.md. A second run continues an
interrupted one.
"""

import argparse
import json
import os
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import rsoups
from rsoups.adapters.filenames import MANIFEST_FILE
from rsoups.adapters.lineage import write_manifest
from rsoups.bases.load import load_tokenizer
from rsoups.common.errors import in_one_line
from rsoups.common.files import read_jsonl, whole_folder, write_whole
from rsoups.fronts.estimates import Estimate
from rsoups.fronts.points import Point, estimates_of
from rsoups.generation.decoding import encode
from rsoups.generation.respond import respond
from rsoups.reports.plots import add_legend, bars, new_figure, style
from rsoups.rewards.interface import check_columns, columns_read, rewards_by_name
from rsoups.training.configs import config_path, given_flags, spelled_out
from rsoups.training.launch import QUIET, Run, train_all
from rsoups.training.policy import load_policy, reset_adapter
from rsoups.training.run_arguments import DEFAULT_CONFIG, parse
from rsoups.training.run_data import read_prompts
from rsoups.training.trl_rewards import reward_function

MINUS_KL = "-KL"  # one more objective: of two models of one reward, the nearer to the start is better
BATCH = 64
COLORS = ("#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's


def parse_flags() -> tuple[argparse.Namespace, list[str]]:
    """This recipe's arguments, and the flags of ppo_reward.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--reward", nargs="+", default=["naturalness", "coverage"], help="rewards; each has a PPO run in every round")
    add("--rounds", type=int, default=3, help="number of rounds")
    add("--method", default="factors", choices=("factors", "svd"), help="interpolation of a round's soup")
    add("--eta", type=float, default=1.0, help="share of the way to the soup at which the next round starts, in (0, 1]")
    add("--scales", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="η of the fronts")
    add("--prompts", type=int, default=200, help="held-out prompts of the fronts")
    add("--output_dir", type=Path, default=Path("runs/iterate"), help="output folder")
    args, flags = parser.parse_known_args(spelled_out(sys.argv[1:]))
    if not 0 < args.eta <= 1:
        parser.error(f"--eta is {args.eta}, must be in (0, 1]")
    if not {"config", "model_name_or_path"} & given_flags(flags).keys():
        flags = ["--config", str(config_path(DEFAULT_CONFIG)), *flags]
    return args, flags


def main() -> None:
    args, flags = parse_flags()
    os.environ |= QUIET
    if len({Path(reward).stem for reward in args.reward}) < len(args.reward):  # each names the folder of its runs
        raise rsoups.RewardError(f"two rewards of {args.reward} have one name: give their cards other file names")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(args, flags)
    path = args.output_dir / "records.jsonl"
    records = read_jsonl(path) if path.exists() else []

    def evaluate(name: str, soup: rsoups.Soup) -> None:
        if name in {record["name"] for record in records}:
            return
        records.extend(evaluator.records(name, soup))
        write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    start = evaluator.start
    evaluate("start", rsoups.interpolate([start], [1.0]))
    for number in range(1, args.rounds + 1):
        soup, start = one_round(number, args, start, flags)
        # Every model on the line from the first start has its factors, unless they were cut out of an exact soup.
        method = "factors" if args.method == "factors" else "exact"
        for scale in args.scales:
            line = rsoups.interpolate([evaluator.start, soup], [1 - scale, scale], method=method, extrapolate=True)
            evaluate(f"round {number}, η {scale:g}", line)

    report(rsoups.Front.from_jsonl(path), [reward.name for reward in evaluator.rewards], args.output_dir)
    print((args.output_dir / "report.md").read_text("utf-8"))
    print(args.output_dir / "iterate.png")


def one_round(number: int, args: argparse.Namespace, start: Path, flags: list[str]) -> tuple[Path, Path]:
    """Train from `start`; returns the folders of the soup and of the next round's start."""
    folder = args.output_dir / f"round-{number}"
    runs = {reward: folder / Path(reward).stem for reward in args.reward}
    flags = [*flags, "--adapter_name_or_path", str(start)]
    train_all(
        [Run(f"round {number}  PPO on {reward}", path, [*flags, "--reward", reward]) for reward, path in runs.items()]
    )

    share = 1 / len(runs)
    rsoups.interpolate(runs, [share] * len(runs), method=args.method).save_pretrained(folder / "soup")
    if args.eta == 1:
        return folder / "soup", folder / "soup"
    weights = [1 - args.eta, *[args.eta * share] * len(runs)]
    rsoups.interpolate({"start": start, **runs}, weights, method=args.method).save_pretrained(folder / "next")
    return folder / "soup", folder / "next"


class Evaluator:
    """Rewards and KL to the first start, on held-out prompts."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.run, self.training, model = parse(flags)
        self.run.eval_prompts = args.prompts
        adapter = self.run.adapter_name_or_path
        self.base, lora = load_policy(model, adapter, allow_base_mismatch=self.run.allow_base_mismatch)
        self.start = Path(adapter or args.output_dir / "start")
        self.name = str(model.model_name_or_path)
        self.tokenizer = load_tokenizer(self.name, padding_side="left")
        room = self.base.config.get_text_config().max_position_embeddings - self.training.max_completion_length
        self.rewards = list(rewards_by_name({name: rsoups.load_reward(name) for name in args.reward}).values())
        self.prompts, self.columns = self.held_out(room)
        if lora is None:
            self.base = self.base.unload()
        elif not self.start.exists():
            self.save_start(lora)
        self.base.eval()

    def held_out(self, room: int) -> tuple[list, dict[str, list]]:
        """Held-out prompts, each once, and the columns of their rows that the rewards read."""
        _, columns = read_prompts(self.run, self.training, self.tokenizer, room, columns_read(self.rewards))
        check_columns(self.rewards, columns)
        first_places = {json.dumps(prompt): i for i, prompt in reversed([*enumerate(columns["prompt"])])}
        rows = sorted(first_places.values())
        columns = {name: [values[i] for i in rows] for name, values in columns.items()}
        return columns.pop("prompt"), columns

    def save_start(self, lora: LoraConfig) -> None:
        """A fresh adapter, which changes nothing yet."""
        seed = getattr(self.training, "adapter_init_seed", 0)
        model = get_peft_model(self.base, lora)
        reset_adapter(model, seed)
        model.peft_config["default"].base_model_name_or_path = self.name
        base = {"model": self.name, "revision": None}
        with whole_folder(self.start, MANIFEST_FILE) as partial:
            model.save_pretrained(str(partial))
            write_manifest(partial, "fresh LoRA", base=base, recipe="recipes/iterate.py", config={}, data={}, seed=seed)
        self.base = model.unload()

    def records(self, name: str, soup: rsoups.Soup) -> list[dict]:
        """One record for each prompt, as a sweep writes them."""
        (start,) = rsoups.interpolate([self.start], [[1.0]])
        records = []
        for at in range(0, len(self.prompts), BATCH):
            prompts = self.prompts[at : at + BATCH]
            columns = {column: values[at : at + BATCH] for column, values in self.columns.items()}
            with soup.attached(self.base) as model:
                ids, inputs = self.sample(model.eval(), prompts)
                logits = self.logits(model, *inputs)
            with start.attached(self.base) as model:
                kl = divergence(logits, self.logits(model.eval(), *inputs), ids)

            tokens = [[token for token in row if token >= 0] for row in ids.tolist()]
            responses, scores = self.scores(prompts, tokens, columns)
            scores[MINUS_KL] = [-nats for nats in kl]
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                head = {"name": name, "lambdas": None, "method": None, "prompt": prompt, "response": response}
                rewards = {reward: values[i] for reward, values in scores.items()}
                records.append(head | {"rewards": rewards, "seed": self.training.seed})
        return records

    def scores(self, prompts: list, tokens: list[list[int]], columns: dict[str, list]) -> tuple[list[str], dict]:
        """The part of each response that rewards see, and the scores of each reward, as in a PPO run."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        cut = self.run.find_task().cut
        scores = {}
        for reward in self.rewards:
            function = reward_function(reward, cut, self.tokenizer)
            scores[reward.name] = function(prompts, texts, completion_ids=tokens, **columns)
        return [cut(text) for text in texts], scores

    def sample(self, model: Any, prompts: list) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, int]]:
        """Responses from the training's seed, (B, T), -1 after their ends; and the arguments of `logits` for them."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        template, longest = getattr(self.training, "chat_template_kwargs", None), self.training.max_completion_length
        assert longest is not None  # the prompts have the room that it leaves
        responses = respond(
            model,
            self.tokenizer,
            prompts,
            temperature=self.training.temperature,
            max_new_tokens=longest,
            seed=self.training.seed,
            template=template,
        )
        prompt_ids = [encode(self.tokenizer, prompt, template) for prompt in prompts]
        start, length = max(map(len, prompt_ids)), max(map(len, responses))
        ids = torch.tensor([row + [-1] * (length - len(row)) for row in responses], device=model.device)
        left_padded = [[-1] * (start - len(row)) + row for row in prompt_ids]
        whole = torch.cat([torch.tensor(left_padded, device=model.device), ids], dim=1)
        return ids, (whole.clamp(min=0), (whole >= 0).long(), start)

    @torch.inference_mode()
    def logits(self, model: Any, whole: torch.Tensor, mask: torch.Tensor, start: int) -> torch.Tensor:
        """Logits before each response token at the sampling temperature, (B, T, V)."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        out = model(input_ids=whole, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.logits[:, start - 1 : -1].float() / self.training.temperature


def divergence(logits: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """Σ over a response's tokens, its end included, of KL(policy ‖ start) between next-token distributions, in nats.

    Args:
        logits, reference: Of the policy and the start, (B, T, V).
        ids: Response tokens, (B, T), -1 at padding.
    """
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (each * (ids >= 0)).sum(-1).tolist()


def report(front: rsoups.Front, rewards: list[str], out: Path) -> None:
    """The table, and a panel for each reward and for their mean, over KL."""
    (out / "report.md").write_text(table(front, rewards) + "\n", "utf-8")
    first, *others = front.points
    lines: dict[str, list[Point]] = {}
    for point in others:
        lines.setdefault(point.name.partition(",")[0], [first]).append(point)

    figure = new_figure(5 * (len(rewards) + 1), 4.4)
    panels = {"mean of the rewards": rewards} | {reward: [reward] for reward in rewards}
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (name, points), color, marker in zip(lines.items(), cycle(COLORS), cycle("o^sDvP"), strict=False):
            x = [abs(p.mean[MINUS_KL]) for p in points]
            estimates = [mean_of(front, p, names) for p in points]
            y = [estimate.value for estimate in estimates]
            axes.errorbar(x, y, bars(estimates), marker=marker, color=color, label=name, linewidth=1.5, elinewidth=0.6)
        axes.set(title=title, xlabel="KL to the first start, nats per response")
        style(axes)
    figure.axes[0].set_ylabel("reward")
    add_legend(figure.axes[0])
    figure.savefig(out / "iterate.png", dpi=130)


def table(front: rsoups.Front, rewards: list[str]) -> str:
    rows = [f"| model | KL | mean | {' | '.join(rewards)} |", "| --- | ---: | ---: |" + " ---: |" * len(rewards)]
    for point in front.points:
        cells = [str(mean_of(front, point, rewards)), *(str(point.estimate(reward)) for reward in rewards)]
        rows.append(f"| {point.name} | {abs(point.mean[MINUS_KL]):.2f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def mean_of(front: rsoups.Front, point: Point, rewards: list[str]) -> Estimate:
    """The mean of some rewards, with its bootstrap interval over prompts."""
    columns = point.values[:, [front.rewards.index(reward) for reward in rewards]]
    return estimates_of(columns.mean(axis=1, keepdims=True), ["mean"], front.shares)["mean"]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with in_one_line():
        main()
