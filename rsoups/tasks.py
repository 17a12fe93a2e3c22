"""Tasks: where prompts come from, how they are written for the policy, and which part of a response counts.

The prompt format is the paper's (Ramé et al. 2023, appendix; after Alpaca):
``### Instruction: {instruction} ### Input: {input} ### Response: `` with the Input part left out where there is none.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rsoups._errors import DatasetError

_T = TypeVar("_T")
_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:", " ### Input:", " ### Response: "
_FIELD = re.compile(r"\{(\w+)\}")  # in templates
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def format_prompt(instruction: str, input: str | None = None) -> str:
    """Write a policy prompt. New lines become spaces, as in the paper's data."""
    parts = [_INSTRUCTION, " ", _one_line(instruction)]
    if input:
        parts += [_INPUT, " ", _one_line(input)]
    return "".join(parts) + _RESPONSE


def question_of(prompt: str | list[dict[str, Any]]) -> str:
    """The part of a policy prompt that a reward model is asked about: the input, or the instruction where there is none.

    A text that is not in the prompt format is its own question. The question is never empty by construction: the
    paper's code looked for an input that its assistant prompts do not have, and scored answers to nothing.
    """
    if isinstance(prompt, list):  # messages: the last one of the user
        return str(next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")).strip()
    if not prompt.startswith(_INSTRUCTION) or _RESPONSE.strip() not in prompt:
        return prompt.strip()
    body = prompt[len(_INSTRUCTION) : prompt.rindex(_RESPONSE.strip())]
    instruction, _, input = body.partition(_INPUT)
    return (input or instruction).strip()


def response_start(prompt: str | list[dict[str, Any]]) -> str:
    """What a policy prompt already holds of the response: the text after its last ``### Response:``, if any."""
    if isinstance(prompt, list):
        return ""
    marker = _RESPONSE.strip()
    return prompt.rpartition(marker)[2].strip() if marker in prompt else ""


def with_prefixes(
    rows: list[dict[str, Any]], tokenize: Callable[[str], list[int]], decode: Callable[[list[int]], str], shortest: int,
    longest: int, seed: int,
) -> list[str]:  # fmt: skip
    """Prompts followed by the first tokens of a reference response, as the paper trains with.

    Args:
        rows: ``{"prompt", "references"}``; one without references keeps its prompt.
        tokenize, decode: Of the policy's tokenizer, without special tokens.
        shortest, longest: Tokens; how many is drawn for each row from `seed` and its place.
    """
    prompts = []
    for place, row in enumerate(rows):
        draw = random.Random(f"{seed} {place}")
        if references := row["references"]:
            ids = tokenize(_one_line(draw.choice(references)))[: draw.randint(shortest, longest)]
            prompts.append(row["prompt"] + decode(ids).strip())
        else:
            prompts.append(row["prompt"])
    return prompts


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
        folders: Folder of the Hub dataset that holds "train" and "test", where they are not told apart by file names.
        revision: Branch or commit of the Hub dataset; its main branch if None.
        splits: What the dataset calls "train" and "test", where it has other names (or, as for news, the paper swaps them).
        most: Rows at most of each split, after the filters; None for all.
        key: Row -> what may occur once only; None where every row counts.
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
    key: Callable[[dict[str, Any]], Any] | None = None
    folders: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    def rows(
        self, dataset: Iterable[dict[str, Any]], most: int | None = None, kept: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Rows of a dataset as ``{"prompt": str, "references": list[str]}``; filtered rows are left out.

        Args:
            dataset: Rows.
            most: How many to return at most; the rest is not read.
            kept: Further columns of the dataset to keep as they are, where it has them.

        Raises:
            DatasetError: A column is missing (those present are listed), or no row is left.
        """
        out: list[dict[str, Any]] = []
        seen = set()
        for row in dataset:
            if most is not None and len(out) >= most:
                break
            missing = [c for c in self.columns if c not in row]
            if missing:
                raise DatasetError(
                    f"task {self.name!r} needs the column(s) {missing}, the dataset has {sorted(row)}; "
                    f"rename them, or choose another --task"
                )
            key = self.key(row) if self.key else None
            if (key is not None and key in seen) or (prompt := self.prompt(row)) is None:
                continue
            seen.add(key)
            further = {name: row[name] for name in kept if name in row}
            out.append(further | {"prompt": prompt, "references": [text for text in self.references(row) if text]})
        if not out:
            raise DatasetError(f"the dataset holds no row that task {self.name!r} can use")
        return out


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows of a task as columns, None where a row lacks one; without ``references`` where no row has any."""
    names = dict.fromkeys(name for row in rows for name in row if name != "references" or row[name])
    return {name: [row.get(name) for row in rows] for name in names}


def fit_prompts(prompts: list[_T], lengths: list[int], longest: int, policy: str) -> list[_T]:
    """Prompts that leave room for a response in the model's context.

    Args:
        prompts: Texts, or rows that hold them.
        lengths: Tokens of each prompt.
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


def find_task(name: str, dataset: str | None = None, template: str | None = None) -> Task:
    """One of `TASKS` by its name; ``custom`` is `custom_task`.

    Raises:
        DatasetError: No such task, or a custom one without a dataset.
    """
    if name in TASKS:
        return TASKS[name]
    if name != "custom" or not dataset:
        raise DatasetError(f"--task is one of {[*TASKS, 'custom']}, and custom needs a --dataset; got {name!r}")
    return custom_task(dataset, template)


def custom_task(dataset: str, template: str | None = None) -> Task:
    """A task of the user's own: any dataset with a ``prompt``, or with the columns that a template names.

    Args:
        dataset: Hub id, folder or file.
        template: Such as ``"Summarise in one sentence: {article}"``; the ``prompt`` column as it is by default: a text, or
            messages ``[{"role", "content"}, ...]`` for a model with a chat template. References are taken from a column
            ``references`` (texts), ``reference`` or ``response``, where there is one.

    Raises:
        DatasetError: A template that names no column.
    """
    names = tuple(dict.fromkeys(_FIELD.findall(template))) if template is not None else ("prompt",)
    if not names:
        raise DatasetError(f"the template {template!r} names no column: write one in braces, as in {{article}}")

    def prompt(row: dict[str, Any]) -> Any:
        if template is None:
            return row["prompt"] or None
        return _FIELD.sub(lambda match: str(row[match[1]]), template) if all(row[name] for name in names) else None

    def references(row: dict[str, Any]) -> list[str]:
        found: Any = next((row[name] for name in ("references", "reference", "response") if row.get(name)), [])
        return [found] if isinstance(found, str) else list(found)

    return Task("custom", dataset, names, prompt, references, cut=str.strip)


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


_SUMMARISE = "Generate a one-sentence summary of this post."


def _between(text: Any, least: int, most: float) -> bool:
    """Whether it is a text of a length within these bounds, which the paper excludes."""
    return isinstance(text, str) and least < len(text) < most


def _news_article(row: dict[str, Any]) -> str:
    """The text after the agency's mark."""
    return row["text"].rpartition("(Reuters) -")[2].strip()


def _news_prompt(row: dict[str, Any]) -> str | None:
    return format_prompt(_SUMMARISE, _news_article(row)) if _between(row["text"], 100, 1500) else None


def _reddit_prompt(row: dict[str, Any]) -> str | None:
    post = row["info"].get("post")  # None for the dataset's news part
    return format_prompt(_SUMMARISE, post) if _between(post, 100, 1200) else None


def _stack_prompt(row: dict[str, Any]) -> str | None:
    question = row["question"]
    return format_prompt(question) if isinstance(question, str) and 0 < len(question.strip()) < 300 else None


def _review_prompt(row: dict[str, Any]) -> str | None:
    return format_prompt("Generate a movie review.") if _between(row["text"], 200, float("inf")) else None


def _assistant_turns(row: dict[str, Any]) -> tuple[str, str]:
    _, _, rest = (row["chosen"] or "").partition("Human:")
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
            name="news",
            dataset="argilla/news-summary",
            columns=("text", "prediction", "id"),
            prompt=_news_prompt,
            references=lambda row: [_one_line(guess["text"]) for guess in (row["prediction"] or [])[:1]],
            cut=first_sentence,
            key=lambda row: row["id"],
            splits={"train": "test", "test": "train"},  # the larger one is called test
        ),
        Task(
            name="reddit",
            dataset="openai/summarize_from_feedback",
            # Its main branch is a script, which datasets no longer runs; the Hub keeps its own conversion to parquet.
            revision="refs/convert/parquet",
            folders={"train": "comparisons", "test": "comparisons"},
            columns=("info", "summaries", "choice"),
            prompt=_reddit_prompt,
            references=lambda row: [_one_line(row["summaries"][row["choice"]]["text"])],
            cut=first_sentence,
            key=lambda row: row["info"]["id"],
            splits={"test": "validation"},
        ),
        Task(
            name="stack",
            dataset="lvwerra/stack-exchange-paired",
            columns=("question", "response_k", "qid"),
            prompt=_stack_prompt,
            references=lambda row: [_one_line(row["response_k"] or "")],
            cut=_one_line,
            key=lambda row: row["qid"],
            folders={"train": "data/rl", "test": "data/evaluation"},
            splits={"test": "train"},  # of a folder
            most={"train": 40_000, "test": 1_000},
        ),
        Task(
            name="review",
            dataset="stanfordnlp/imdb",
            columns=("text",),
            prompt=_review_prompt,
            references=lambda row: [_one_line(row["text"])],
            cut=_one_line,
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
