"""Tasks: where prompts come from, how they are written for the policy, and which part of a response counts.

The prompt format is the paper's (Ramé et al. 2023, appendix; after Alpaca):
``### Instruction: {instruction} ### Input: {input} ### Response: `` with the Input part left out where there is none.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsoups._errors import DatasetError

_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:", " ### Input:", " ### Response: "
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def format_prompt(instruction: str, input: str | None = None) -> str:
    """Write a policy prompt. New lines become spaces, as in the paper's data."""
    parts = [_INSTRUCTION, " ", _one_line(instruction)]
    if input:
        parts += [_INPUT, " ", _one_line(input)]
    return "".join(parts) + _RESPONSE


def question_of(prompt: str) -> str:
    """The part of a policy prompt that a reward model is asked about: the input, or the instruction where there is none.

    A text that is not in the prompt format is its own question. The question is never empty by construction: the
    paper's code looked for an input that its assistant prompts do not have, and scored answers to nothing.
    """
    if not prompt.startswith(_INSTRUCTION) or _RESPONSE.strip() not in prompt:
        return prompt.strip()
    body = prompt[len(_INSTRUCTION) : prompt.rindex(_RESPONSE.strip())]
    instruction, _, input = body.partition(_INPUT)
    return (input or instruction).strip()


def first_sentence(text: str) -> str:
    """The text up to and with its first full stop, question or exclamation mark (all of it where there is none)."""
    text = _one_line(text)
    end = _SENTENCE_END.search(text)
    return text[: end.end()] if end else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class Task:
    """One kind of prompt.

    Attributes:
        name: What ``--task`` calls it.
        dataset: Default data: a Hub id, or ``rsoups/...`` for the embedded prompts.
        columns: The columns that a dataset must have.
        prompt: Row -> policy prompt, or None where the paper filters the row out.
        references: Row -> reference responses (empty where the data has none).
        cut: Response -> the part of it that rewards see.
    """

    name: str
    dataset: str
    columns: tuple[str, ...]
    prompt: Callable[[dict[str, Any]], str | None]
    references: Callable[[dict[str, Any]], list[str]]
    cut: Callable[[str], str]

    def rows(self, dataset: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of a dataset as ``{"prompt": str, "references": list[str]}``; filtered rows are left out.

        Raises:
            DatasetError: A column is missing (those present are listed), or no row is left.
        """
        out = []
        for row in dataset:
            missing = [c for c in self.columns if c not in row]
            if missing:
                raise DatasetError(
                    f"task {self.name!r} needs the column(s) {missing}, the dataset has {sorted(row)}; "
                    f"rename them, or choose another --task"
                )
            if (prompt := self.prompt(row)) is not None:
                out.append({"prompt": prompt, "references": self.references(row)})
        if not out:
            raise DatasetError(f"the dataset holds no row that task {self.name!r} can use")
        return out


def fit_prompts(prompts: list[str], lengths: list[int], longest: int, policy: str) -> list[str]:
    """Prompts that leave room for a response in the model's context.

    Args:
        prompts: Texts.
        lengths: Tokens of each.
        longest: Tokens that a prompt may have.
        policy: ``"refuse"`` prompts that are longer, or ``"drop"`` them.

    Raises:
        DatasetError: Some are longer and the policy is to refuse, or none is left.
    """
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= longest]
    over = len(prompts) - len(kept)
    if over and policy == "refuse":
        raise DatasetError(
            f"{over} of {len(prompts)} prompts are longer than {longest} tokens (the longest: {max(lengths)}), which is what "
            "the context leaves beside a response: --long_prompts drop leaves them out"
        )
    if not kept:
        raise DatasetError(f"none of {len(prompts)} prompts has at most {longest} tokens")
    return kept


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, gzip-compressed where the name ends in ``.gz``."""
    path = Path(path)
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DatasetError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def _concepts_prompt(row: dict[str, Any]) -> str:
    return format_prompt("Write one sentence that uses these words.", ", ".join(row["concepts"]))


def _assistant_turns(row: dict[str, Any]) -> tuple[str, str]:
    _, _, rest = row["chosen"].partition("Human:")
    question, _, answer = rest.partition("Assistant:")
    return _one_line(question), _one_line(answer.partition("Human:")[0])


def _assistant_prompt(row: dict[str, Any]) -> str | None:
    question, _ = _assistant_turns(row)
    return format_prompt(question) if 5 < len(question) < 100 else None


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="concepts",
            dataset="rsoups/concepts",
            columns=("concepts",),
            prompt=_concepts_prompt,
            references=lambda row: list(row.get("sentences", [])),
            cut=first_sentence,
        ),
        Task(
            name="assistant",
            dataset="Anthropic/hh-rlhf",
            columns=("chosen",),
            prompt=_assistant_prompt,
            references=lambda row: [_assistant_turns(row)[1]],
            cut=_one_line,
        ),
    )
}
