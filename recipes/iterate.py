"""Iterated soups: PPO for each reward, their soup, PPO for each reward from it, ... (WARP, Ramé et al. 2024, arXiv 2406.16768).

    python recipes/iterate.py --rounds 3 --output_dir runs/iterate                        # the embedded policy
    python recipes/iterate.py --rounds 1 --max_steps 360 --output_dir runs/once           # as many steps without iterating
    python recipes/iterate.py --config recipes/configs/llama7b-assistant.yaml --reward helpful harmless

Flags that are not of this recipe go to recipes/ppo_reward.py. A round trains one adapter for each reward, all from one start,
whose frozen copy is their KL reference; interpolates them; and moves the start a share `--eta` of the way to the soup, where
the next round begins. `factors` keeps the rank from round to round, and is right because the adapters share their start;
`svd` is the exact soup, cut back to the start's rank.

After each round, as in the paper: models on the line from the first start to the soup, (1 - η)·start + η·soup, with their
rewards and their KL to the first start on held-out prompts: the KL-reward front, which further rounds should lift. What
differs from WARP: the rounds' policies are of different rewards, not of one reward and other orders of the prompts;
interpolation is linear, not spherical; the KL reference within a run is its start, not the run's moving average.

Writes round-N/ (ingredients, soup, start of the next one), records.jsonl, iterate.png, report.md. Run again after an
interruption, it goes on.
"""

import argparse
import json
import os
from itertools import cycle
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoTokenizer

import rsoups
from demo import train_all
from ppo_reward import parse as parse_ppo
from ppo_reward import policy, prompts, task_of
from rsoups.adapters.filenames import MANIFEST_FILE
from rsoups.adapters.lineage import write_manifest
from rsoups.common.assets import resolve
from rsoups.common.errors import in_one_line
from rsoups.common.files import read_jsonl, whole_folder
from rsoups.fronts.estimates import Estimate
from rsoups.fronts.points import Point
from rsoups.generation.decoding import encode
from rsoups.generation.respond import respond
from rsoups.rewards.interface import check_columns, columns_read, rewards_by_name
from rsoups.training.ppo import reset_adapter
from rsoups.training.trl_rewards import reward_function

MINUS_KL = "-KL"  # as one more objective: of two models of one reward, that nearer the start is better
BATCH = 64
COLORS = ("#56B4E9", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--reward", nargs="+", default=["naturalness", "coverage"], help="one PPO run each, every round"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="factors", choices=("factors", "svd"))
    parser.add_argument("--eta", type=float, default=1.0, help="how far towards the soup the next round starts")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="η of the fronts")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of the fronts")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/iterate"))
    args, flags = parser.parse_known_args()
    if not 0 < args.eta <= 1:
        parser.error(f"--eta is a share in (0, 1], got {args.eta}")
    return args, flags


class Evaluator:
    """Rewards and KL to the first start, on held-out prompts."""

    def __init__(self, args: argparse.Namespace, flags: list[str]):
        self.script, self.training, model = parse_ppo(flags)
        self.script.eval_prompts = args.prompts
        self.base, lora = policy(self.script, model)
        self.start = Path(self.script.adapter_name_or_path or args.output_dir / "start")
        self.name = model.model_name_or_path
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(self.name), padding_side="left")
        room = self.base.config.get_text_config().max_position_embeddings - self.training.max_completion_length
        self.rewards = list(rewards_by_name({name: rsoups.load_reward(name) for name in args.reward}).values())
        self.prompts, self.columns = self.held_out(room)
        if lora is None:
            self.base = self.base.unload()
        elif not self.start.exists():
            self.save_start(lora)
        self.base.eval()

    def held_out(self, room: int) -> tuple[list, dict[str, list]]:
        """Held-out prompts, each once, and the columns that the rewards read of their rows."""
        _, columns = prompts(self.script, self.training, self.tokenizer, room, columns_read(self.rewards))
        check_columns(self.rewards, columns)
        places = {json.dumps(prompt): place for place, prompt in reversed([*enumerate(columns["prompt"])])}
        kept = {name: [values[place] for place in sorted(places.values())] for name, values in columns.items()}
        return kept.pop("prompt"), kept

    def save_start(self, lora) -> None:
        """A fresh adapter, which changes nothing yet."""
        model = get_peft_model(self.base, lora)
        reset_adapter(model, getattr(self.training, "adapter_init_seed", 0))
        model.peft_config["default"].base_model_name_or_path = self.name
        seed = getattr(self.training, "adapter_init_seed", 0)
        told = {"recipe": "recipes/iterate.py", "config": {}, "data": {}, "seed": seed}
        with whole_folder(self.start, MANIFEST_FILE) as partial:
            model.save_pretrained(partial)
            write_manifest(partial, "fresh LoRA", base={"model": self.name, "revision": None}, **told)
        self.base = model.unload()

    def records(self, name: str, soup: rsoups.Soup) -> list[dict]:
        """One record for each prompt, as a sweep writes them."""
        (start,) = rsoups.interpolate([self.start], [[1.0]])
        found = []
        for at in range(0, len(self.prompts), BATCH):
            asked = self.prompts[at : at + BATCH]
            with soup.attached(self.base) as model:
                ids, seen, logits = self.sample(model.eval(), asked)
            with start.attached(self.base) as model:
                kl = self.divergence(logits, self.logits(model.eval(), *seen), ids)
            columns = {name: values[at : at + BATCH] for name, values in self.columns.items()}
            texts, scores = self.scored(
                asked, [[token for token in row if token >= 0] for row in ids.tolist()], columns
            )
            scores[MINUS_KL] = [-x for x in kl]
            for i, (prompt, response) in enumerate(zip(asked, texts, strict=True)):
                head = {"name": name, "lambdas": None, "method": None, "prompt": prompt, "response": response}
                found.append(head | {"rewards": {k: v[i] for k, v in scores.items()}, "seed": self.training.seed})
        return found

    def scored(self, asked: list, ids: list[list[int]], columns: dict[str, list]) -> tuple[list[str], dict[str, list]]:
        """What rewards see of responses, and what each says, as in a PPO run."""
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        cut = task_of(self.script).cut
        scores = {}
        for reward in self.rewards:
            function = reward_function(reward, cut, self.tokenizer)
            scores[reward.name] = function(asked, texts, completion_ids=ids, **columns)
        return [cut(text) for text in texts], scores

    def sample(self, model, asked: list) -> tuple:
        """Responses (B, T), -1 after their ends; what `logits` needs to see them again; their logits (B, T, V). From the
        training's seed."""
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        template = getattr(self.training, "chat_template_kwargs", None)
        said = respond(
            model,
            self.tokenizer,
            asked,
            temperature=self.training.temperature,
            max_new_tokens=self.training.max_completion_length,
            seed=self.training.seed,
            template=template,
        )
        prompts = [encode(self.tokenizer, prompt, template) for prompt in asked]
        start, length = max(map(len, prompts)), max(map(len, said))
        ids = torch.tensor([row + [-1] * (length - len(row)) for row in said], device=model.device)
        before = [[-1] * (start - len(prompt)) + prompt for prompt in prompts]
        whole = torch.cat([torch.tensor(before, device=model.device), ids], dim=1)
        seen = (whole.clamp(min=0), (whole >= 0).long(), start)
        return ids, seen, self.logits(model, *seen)

    @torch.inference_mode()
    def logits(self, model, whole: torch.Tensor, mask: torch.Tensor, start: int) -> torch.Tensor:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        out = model(input_ids=whole, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.logits[:, start - 1 : -1].float() / self.training.temperature

    def divergence(self, logits: torch.Tensor, reference: torch.Tensor, ids: torch.Tensor) -> list[float]:
        """Σ over a response's tokens, its end included, of KL(policy ‖ start) between next-token distributions, in nats."""
        log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
        return (each * (ids >= 0)).sum(-1).tolist()


def one_round(number: int, args: argparse.Namespace, start: Path, flags: list[str]) -> tuple[Path, Path]:
    """Train from `start`; returns the folders of the soup and of the next round's start."""
    folder = args.output_dir / f"round-{number}"
    runs = {reward: folder / Path(reward).stem for reward in args.reward}
    train_all(
        [
            (
                f"round {number}  PPO on {reward}",
                path,
                [*flags, "--reward", reward, "--adapter_name_or_path", str(start)],
            )
            for reward, path in runs.items()
        ]
    )
    share = 1 / len(runs)
    rsoups.interpolate(runs, [share] * len(runs), method=args.method).save_pretrained(folder / "soup")
    if args.eta == 1:
        return folder / "soup", folder / "soup"
    weights = [1 - args.eta, *[args.eta * share] * len(runs)]
    rsoups.interpolate({"start": start, **runs}, weights, method=args.method).save_pretrained(folder / "next")
    return folder / "soup", folder / "next"


def report(front: rsoups.Front, rewards: list[str], out: Path) -> None:
    """The table, and a panel for each reward and for their mean, over KL."""
    from matplotlib.figure import Figure

    (out / "report.md").write_text(table(front, rewards) + "\n", "utf-8")
    first, *others = front.points
    lines: dict[str, list] = {}
    for point in others:
        lines.setdefault(point.name.partition(",")[0], [first]).append(point)
    figure = Figure(figsize=(5 * (len(rewards) + 1), 4.4), layout="constrained")
    shown = {"mean of the rewards": rewards} | {reward: [reward] for reward in rewards}
    for axes, (title, of) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for (name, points), color, marker in zip(lines.items(), cycle(COLORS), cycle("o^sDvP"), strict=False):
            x = [abs(p.mean[MINUS_KL]) for p in points]
            estimates = [mean_of(front, p, of) for p in points]
            y = [e.value for e in estimates]
            errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
            axes.errorbar(x, y, yerr=errors, marker=marker, color=color, label=name, linewidth=1.5, elinewidth=0.6)
        axes.set(title=title, xlabel="KL to the first start, nats per response")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("reward")
    figure.axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(out / "iterate.png", dpi=130)


def mean_of(front: rsoups.Front, point: Point, rewards: list[str]) -> Estimate:
    """The mean of some rewards, with its interval: 1.96 standard errors over prompts."""
    values = point.values[:, [front.rewards.index(reward) for reward in rewards]].mean(axis=1)
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def table(front: rsoups.Front, rewards: list[str]) -> str:
    rows = [f"| model | KL | mean | {' | '.join(rewards)} |", "| --- | ---: | ---: |" + " ---: |" * len(rewards)]
    for point in front.points:
        cells = [str(mean_of(front, point, rewards)), *(str(mean_of(front, point, [r])) for r in rewards)]
        rows.append(f"| {point.name} | {abs(point.mean[MINUS_KL]):.2f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    args, flags = parse()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if len({Path(reward).stem for reward in args.reward}) < len(args.reward):  # each names the folder of its runs
        raise rsoups.RewardError(f"two rewards of {args.reward} end alike: give their cards other file names")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(args, flags)
    if not {"--config", "--model_name_or_path"} & set(flags):
        flags = ["--config", str(Path(__file__).parent / "configs" / "embedded.yaml"), *flags]
    path = args.output_dir / "records.jsonl"
    records = read_jsonl(path) if path.exists() else []

    def evaluate(name: str, soup: rsoups.Soup) -> None:
        if name not in {record["name"] for record in records}:
            records.extend(evaluator.records(name, soup))
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
            partial.replace(path)

    start = evaluator.start
    evaluate("start", rsoups.interpolate([start], [1.0]))
    for number in range(1, args.rounds + 1):
        soup, start = one_round(number, args, start, flags)
        # All on the line from the first start has its factors, unless they were cut out of an exact soup.
        method = "factors" if args.method == "factors" else "exact"
        for scale in args.scales:
            line = rsoups.interpolate([evaluator.start, soup], [1 - scale, scale], method=method, extrapolate=True)
            evaluate(f"round {number}, η {scale:g}", line)
    front = rsoups.Front.from_jsonl(path)
    report(front, [reward.name for reward in evaluator.rewards], args.output_dir)
    print((args.output_dir / "report.md").read_text("utf-8"))
    print(args.output_dir / "iterate.png")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with in_one_line():
        main()
