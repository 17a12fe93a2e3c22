"""Commands about rewards and the data that they read: rewards, score, probe, tasks, preview."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rsoups.common.errors import RewardError

if TYPE_CHECKING:
    from rsoups.data.tasks import Task

Split = Literal["train", "test", "all"]


def rewards() -> None:
    """List the reward cards that ship with rsoups.

    Example: `rsoups rewards`
    """
    from rsoups.rewards.load import cards, read_card

    for name, path in cards().items():
        print(f"{name:20} {read_card(path).summary()}")


def score(
    *,
    reward: str,
    prompt: str,
    response: str,
    reference: list[str] | None = None,
    column: list[str] | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> None:
    """Score one response, and show what a reward model reads.

    Example: `rsoups score --reward naturalness --prompt "dog, run" --response "A dog runs."`

    Args:
        reward: Reward: a card's name or path, a classifier's Hub id, or module:function.
        prompt: Prompt of a policy, or a bare question.
        response: Response to score.
        reference: Texts that a statistical reward compares the response with.
        column: Further columns of the row that the reward reads, NAME=VALUE; VALUE is JSON or a text.
        device: Device of the reward model.
        trust_remote_code: Run Python code that comes with the model.
    """
    from rsoups.rewards.classifier import Reward
    from rsoups.rewards.interface import columns_read
    from rsoups.rewards.judge import Judge
    from rsoups.rewards.load import load_reward

    loaded = load_reward(reward, device, trust_remote_code=trust_remote_code)
    if isinstance(loaded, Reward):
        _explain(loaded, prompt, response)
        return

    if "references" in columns_read([loaded]) and not reference:
        raise RewardError(f"reward {loaded.name!r} compares a response with references: pass --reference TEXT ...")
    columns = {name: [value] for name, value in map(_column, column or [])}
    columns |= {"references": [reference]} if reference else {}
    (value,) = loaded([prompt], [response], **columns)
    if value is None:
        print("score   None: the reward has no opinion on this response")
        return
    card = getattr(loaded, "card", None)
    if card and (card.mean, card.std) != (0, 1):
        print(f"raw     {getattr(card, 'sign', 1) * (value * card.std + card.mean):.6g}")
    print(f"score   {value:.6g}")
    if isinstance(loaded, Judge):
        print(f"asked   {loaded.counts}")


def probe(
    rewards: list[str],
    *,
    task: str = "concepts",
    dataset: str | None = None,
    template: str | None = None,
    split: Split | None = None,
    model: str = "rsoups/tiny-llama",
    chat_template_kwargs: str | None = None,
    records: str | None = None,
    rows: int = 200,
    seed: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    out: Path | None = None,
) -> None:
    """Show how rewards score length, empty responses, noise, templates and wrong questions.

    Example: `rsoups probe naturalness coverage --records runs/sweep/records.jsonl`

    Args:
        rewards: Rewards, as in `rsoups score`.
        task: Task of the prompts; custom for a dataset's own.
        dataset: File, folder or Hub id; the task's own if left out.
        template: Template of a custom task's prompts.
        split: Split of the dataset; if left out, all rows of a file, and the split test of other datasets.
        model: Model that responds where the data holds no references.
        chat_template_kwargs: Variables of the chat template as a JSON object, as in training.
        records: File records.jsonl of a sweep, to score its responses instead.
        rows: Number of responses to look at.
        seed: Random seed.
        device: Device of the reward models.
        trust_remote_code: Run Python code that comes with a model.
        out: JSON file for the figures.
    """
    from rsoups.common.files import write_whole
    from rsoups.data.prompts import template_kwargs
    from rsoups.generation.samples import sample_of, sample_of_records
    from rsoups.rewards.interface import check_columns, columns_read
    from rsoups.rewards.judge import Judge
    from rsoups.rewards.load import load_reward
    from rsoups.rewards.probing import probe as probed

    loaded = [load_reward(name, device, trust_remote_code=trust_remote_code) for name in rewards]
    by_name = {reward.name: reward for reward in loaded}
    if len(by_name) < len(loaded):
        raise RewardError(f"{len(loaded)} rewards with {len(by_name)} names, {sorted(by_name)}: give each its own")

    if records:
        sample = sample_of_records(records, rows, seed)
    else:
        sample = sample_of(
            _task(task, dataset, template),
            dataset,
            split=split,
            rows=rows,
            model=model,
            device=device,
            seed=seed,
            kept=columns_read(loaded),
            template=template_kwargs(chat_template_kwargs),
        )
        check_columns(loaded, sample.columns)

    figures = probed(by_name, sample, seed=seed)
    print(figures.to_text())
    for reward in loaded:
        if isinstance(reward, Judge):
            print(f"{reward.name} was asked: {reward.counts}")
    if out:
        write_whole(out, figures.to_json())


def tasks() -> None:
    """List the tasks that write prompts.

    Example: `rsoups tasks`
    """
    from rsoups.data.tasks import TASKS

    for task in TASKS.values():
        most = "".join(f", {count:,} rows of {split}" for split, count in task.most.items())
        cut = task.cut.__name__.strip("_")
        print(f"{task.name:10} {task.dataset:34} {', '.join(task.columns)}; rewards see: {cut}{most}")
    print(f"{'custom':10} {'any: --dataset':34} prompt, or the columns of a --template")


def preview(
    *,
    task: str,
    dataset: str | None = None,
    template: str | None = None,
    split: Split = "train",
    reward: str | None = None,
    tokenizer: str = "rsoups/tiny-llama",
    chat_template_kwargs: str | None = None,
    rows: int = 1000,
) -> None:
    """Show five prompts of a task, and what a reward would see of them.

    Example: `rsoups preview --task custom --dataset posts.jsonl --template "Summarize: {post}" --reward length`

    Args:
        task: Task of the prompts; custom for a dataset's own.
        dataset: File, folder or Hub id; the task's own if left out.
        template: Template of a custom task's prompts.
        split: Split of the dataset. Of a file, test is the last tenth of the prompts, and all is every row.
        reward: Reward, as in `rsoups score`.
        tokenizer: Tokenizer that counts tokens.
        chat_template_kwargs: Variables of the chat template as a JSON object, as in training.
        rows: Number of the dataset's rows to look at.
    """
    from itertools import islice

    from rsoups.bases.load import load_tokenizer
    from rsoups.data.datasets import is_table, part_of, raw_rows
    from rsoups.data.prompts import template_kwargs
    from rsoups.data.tasks import columns_of
    from rsoups.generation.decoding import encode
    from rsoups.rewards.interface import check_columns, columns_read
    from rsoups.rewards.load import load_reward

    chosen_task = _task(task, dataset, template)
    one_file = is_table(chosen_task, dataset)
    raw = list(islice(raw_rows(chosen_task, dataset, split), None if one_file else rows))
    loaded = load_reward(reward) if reward else None
    usable = chosen_task.rows(raw, kept=columns_read([loaded]))
    print(f"{len(usable)} of the first {len(raw)} rows kept, {len(raw) - len(usable)} dropped")
    if one_file:
        usable = part_of(usable, split, str(dataset or chosen_task.dataset))
        print(f"{len(usable)} of them are the split {split!r}")
    if loaded is not None:
        check_columns([loaded], columns_of(usable))

    loaded_tokenizer = load_tokenizer(tokenizer)
    variables = template_kwargs(chat_template_kwargs)
    for row in usable[:5]:
        ids = encode(loaded_tokenizer, row["prompt"], variables)
        text = row["prompt"] if isinstance(row["prompt"], str) else loaded_tokenizer.decode(ids)
        print(f"\n[{len(ids)} tokens] {text}")
        if row["references"]:
            _preview_reference(row, chosen_task, loaded)


def _explain(reward: Any, prompt: str, response: str) -> None:
    """Print what a reward model reads, its logits and its score."""
    shown = reward.explain(prompt, response)
    print(f"input   {shown['text']}\nids     {shown['ids']}")
    print("logits  " + ", ".join(f"{label} {value:.6g}" for label, value in shown["logits"].items()))
    print(f"score   {shown['score']:.6g}")


def _column(pair: str) -> tuple[str, Any]:
    name, separator, value = pair.partition("=")
    if not separator:
        raise RewardError(f"--column takes NAME=VALUE, got {pair!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _task(name: str, dataset: str | None, template: str | None) -> Task:
    from rsoups.data.tasks import find_task

    return find_task(name, dataset, template)


def _preview_reference(row: dict[str, Any], task: Task, reward: Any) -> None:
    """Print the first reference of a row, and what a reward reads of it and scores it."""
    from rsoups.rewards.classifier import Reward

    reference = task.cut(row["references"][0])
    print(f"  reference: {reference}")
    if isinstance(reward, Reward):
        shown = reward.explain(row["prompt"], reference)
        print(f"  {reward.name} reads: {shown['text']}\n  and scores it {shown['score']:.4g}")
    elif reward is not None:
        columns = {name: [row[name]] for name in reward.columns if name in row}
        (score,) = reward([row["prompt"]], [reference], **columns)
        print(f"  {reward.name} scores it {'None' if score is None else format(score, '.4g')}")
