"""Tasks: where prompts come from, how they are written for the policy, and which part of a response counts.

The prompt format is the paper's (Ramé et al. 2023, appendix; after Alpaca):
``### Instruction: {instruction} ### Input: {input} ### Response: `` with the Input part left out where there is none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rsoups.common.errors import DatasetError, did_you_mean
from rsoups.data.prompts import first_sentence, format_prompt, messages_of, one_line, prompt_of, shown

_FIELD = re.compile(r"\{(\w+)\}")  # in templates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """One kind of prompt.

    Attributes:
        name: Name for ``--task``.
        dataset: Default data: a Hub id, or ``rsoups/...`` for the embedded prompts.
        columns: Names of the columns that a dataset must have.
        prompt: Function of a row: its policy prompt (text or messages), or None where the paper filters the row out.
        references: Function of a row: its reference responses (empty where the data has none).
        cut: Function of a response: the part of it that rewards see.
        key: Function of a row: a value that may occur only once; None where every row counts.
        folders: Folders of the Hub dataset that hold "train" and "test", where file names do not separate them.
        revision: Branch or commit of the Hub dataset; its main branch if None.
        splits: The dataset's names of "train" and "test", where they differ (or, as for news, the paper swaps them).
        most: Largest number of rows of each split, after the filters; None for all.
    """

    name: str
    dataset: str
    columns: tuple[str, ...]
    prompt: Callable[[dict[str, Any]], str | list[dict[str, str]] | None]
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
        """Return rows of a dataset as ``{"prompt": str, "references": list[str]}``; filtered rows are left out.

        Args:
            dataset: Rows of the dataset.
            most: Number of rows to return at most; further ones are not read.
            kept: Names of further columns to keep, where the dataset has them.

        Raises:
            DatasetError: A column is missing (those present are listed), or no row is left.
        """
        out: list[dict[str, Any]] = []
        seen, filtered = set(), 0
        for number, row in enumerate(dataset, 1):
            if most is not None and len(out) >= most:
                break
            self._check_columns(number, row)
            key = self.key(row) if self.key else None
            if key is not None and key in seen:
                continue

            try:
                prompt = self.prompt(row)
                references = [] if prompt is None else self.references(row)
            except DatasetError as error:
                raise DatasetError(f"row {number}: {error}") from None
            if prompt is None:
                filtered += 1
                continue

            seen.add(key)
            further = {name: row[name] for name in kept if name in row}
            out.append(further | {"prompt": prompt, "references": [text for text in references if text]})

        if not out:
            raise DatasetError(f"the dataset holds no row that task {self.name!r} can use")
        if filtered and self.name == "custom":  # the paper's tasks filter by design
            logger.warning("%d of %d rows have nothing in %s and are left out", filtered, number, list(self.columns))
        return out

    def _check_columns(self, number: int, row: Any) -> None:
        if not isinstance(row, Mapping):
            raise DatasetError(f"row {number} is {shown(row)}, not an object of columns")
        if self.columns == ("prompt",):
            row = with_prompt(row)
        if missing := [c for c in self.columns if c not in row]:
            raise DatasetError(
                f"task {self.name!r} needs the column(s) {missing}, the dataset has {sorted(map(str, row))}; "
                f"rename them, or choose another --task"
            )


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return rows of a task as columns, None where a row lacks one; without ``references`` where no row has any."""
    names = dict.fromkeys(name for row in rows for name in row if name != "references" or row[name])
    return {name: [row.get(name) for row in rows] for name in names}


def find_task(name: str, dataset: str | None = None, template: str | None = None) -> Task:
    """Return one of `TASKS` by its name; ``custom`` is `custom_task`.

    Raises:
        DatasetError: No such task, or a custom one without a dataset.
    """
    if name in TASKS:
        return TASKS[name]
    if name != "custom" or not dataset:
        known = [*TASKS, "custom"]
        raise DatasetError(
            f"--task is one of {known}, and custom needs a --dataset; got {name!r}.{did_you_mean(name, known)}"
        )
    return custom_task(dataset, template)


def custom_task(dataset: str, template: str | None = None) -> Task:
    """Return a task of the user's own: any dataset with a ``prompt``, or with the columns that a template names.

    References come from a column ``references`` (texts), ``reference`` or ``response``, where there is one.

    Args:
        dataset: Hub id, folder or file.
        template: Template such as ``"Summarize in one sentence: {article}"``; if None, the ``prompt`` column is the prompt: a
            text, or messages ``[{"role", "content"}, ...]`` for a model with a chat template. A dataset without it may have
            ``messages``: whole conversations, whose last answer is the reference.

    Raises:
        DatasetError: A template that names no column.
    """
    names = tuple(dict.fromkeys(_FIELD.findall(template))) if template is not None else ("prompt",)
    if not names:
        raise DatasetError(f"the template {template!r} names no column: write one in braces, as in {{article}}")

    def prompt(row: dict[str, Any]) -> Any:
        row = with_prompt(row)
        if any(_is_empty(row[name]) for name in names):
            return None
        if template is None:
            return prompt_of(row["prompt"])
        if wrong := [name for name in names if not isinstance(row[name], (str, int, float))]:
            raise DatasetError(f"the template's columns are texts or numbers, {wrong[0]!r} is {shown(row[wrong[0]])}")
        return _FIELD.sub(lambda match: str(row[match[1]]), template)

    return Task("custom", dataset, names, prompt, _own_references, cut=str.strip)


def with_prompt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with a prompt and a reference, where it has ``messages`` and no ``prompt``.

    A last message of the assistant is the reference; the others are the prompt.
    """
    messages = row.get("messages")
    if "prompt" in row or "messages" not in row:
        return dict(row)
    if _is_empty(messages):
        return {**row, "prompt": None}
    *before, last = messages_of(messages)
    if last["role"] != "assistant":
        return {**row, "prompt": [*before, last]}
    return {"reference": last["content"], **row, "prompt": before}


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _own_references(row: dict[str, Any]) -> list[str]:
    """Return a custom task's references: the texts, or the last message, of the first such column that has any.

    A column ``reference`` or ``response`` of other values is no reference; rewards may read it.
    """
    row = with_prompt(row)
    for name in ("references", "reference", "response"):
        if _is_empty(value := row.get(name)):
            continue
        try:
            if isinstance(value, str):
                return [value]
            if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
                return [text for text in value if text]
            return [messages_of(value)[-1]["content"]]
        except DatasetError:
            if name == "references":
                raise DatasetError(f"references are texts, this row has {shown(value)}: rename the column") from None
    return []


def _concepts_prompt(row: dict[str, Any]) -> str:
    concepts = row["concepts"]
    return format_prompt(
        "Write one sentence that uses these words.", concepts if isinstance(concepts, str) else ", ".join(concepts)
    )


def _concepts_references(row: dict[str, Any]) -> list[str]:
    sentences = row.get("sentences") or []
    return [sentences] if isinstance(sentences, str) else list(sentences)


def _film_prompt(row: dict[str, Any]) -> list[dict[str, str]] | None:
    if _is_empty(row["plot"]):
        return None
    content = f"Write a one-sentence review of this film.\n\n{one_line(row['plot'])}"
    return [{"role": "user", "content": content}]


_SUMMARIZE = "Generate a one-sentence summary of this post."


def _between(text: Any, least: int, most: float) -> bool:
    """Whether this is a text, and its length is between these bounds (which the paper excludes)."""
    return isinstance(text, str) and least < len(text) < most


def _news_article(row: dict[str, Any]) -> str:
    """Return the text after the agency's mark."""
    return row["text"].rpartition("(Reuters) -")[2].strip()


def _news_prompt(row: dict[str, Any]) -> str | None:
    return format_prompt(_SUMMARIZE, _news_article(row)) if _between(row["text"], 100, 1500) else None


def _reddit_prompt(row: dict[str, Any]) -> str | None:
    post = row["info"].get("post")  # None for the dataset's news part
    return format_prompt(_SUMMARIZE, post) if _between(post, 100, 1200) else None


def _stack_prompt(row: dict[str, Any]) -> str | None:
    question = row["question"]
    return format_prompt(question) if isinstance(question, str) and 0 < len(question.strip()) < 300 else None


def _review_prompt(row: dict[str, Any]) -> str | None:
    return format_prompt("Generate a movie review.") if _between(row["text"], 200, float("inf")) else None


def _assistant_turns(row: dict[str, Any]) -> tuple[str, str]:
    _, _, rest = (row["chosen"] or "").partition("Human:")
    question, _, answer = rest.partition("Assistant:")
    return one_line(question), one_line(answer.partition("Human:")[0])


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
            references=_concepts_references,
            cut=first_sentence,
        ),
        Task(
            name="film",
            dataset="rsoups/films",
            columns=("plot",),
            prompt=_film_prompt,
            references=_own_references,
            cut=first_sentence,
        ),
        Task(
            name="news",
            dataset="argilla/news-summary",
            columns=("text", "prediction", "id"),
            prompt=_news_prompt,
            references=lambda row: [one_line(guess["text"]) for guess in (row["prediction"] or [])[:1]],
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
            references=lambda row: [one_line(row["summaries"][row["choice"]]["text"])],
            cut=first_sentence,
            key=lambda row: row["info"]["id"],
            splits={"test": "validation"},
        ),
        Task(
            name="stack",
            dataset="lvwerra/stack-exchange-paired",
            columns=("question", "response_k", "qid"),
            prompt=_stack_prompt,
            references=lambda row: [one_line(row["response_k"] or "")],
            cut=one_line,
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
            references=lambda row: [one_line(row["text"])],
            cut=one_line,
        ),
        Task(
            name="assistant",
            dataset="Anthropic/hh-rlhf",
            columns=("chosen",),
            prompt=_assistant_prompt,
            references=lambda row: [_assistant_turns(row)[1]],
            cut=one_line,
        ),
    )
}
