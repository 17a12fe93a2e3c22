"""Tasks: where prompts come from, how they are written for the policy, and which part of a response counts.

The prompt format is the paper's (Ramé et al. 2023, appendix; after Alpaca):
``### Instruction: {instruction} ### Input: {input} ### Response: `` with the Input part left out where there is none.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rsoups._errors import DatasetError

_T = TypeVar("_T")
_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:", " ### Input:", " ### Response: "
_FIELD = re.compile(r"\{(\w+)\}")  # in templates
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
_LONGEST_FIELD = 2**30  # characters of a CSV field; Python's own limit is 131,072

logger = logging.getLogger(__name__)


def format_prompt(instruction: str, input: str | None = None) -> str:
    """Write a policy prompt. New lines become spaces, as in the paper's data."""
    parts = [_INSTRUCTION, " ", _one_line(instruction)]
    if input:
        parts += [_INPUT, " ", _one_line(input)]
    return "".join(parts) + _RESPONSE


def question_of(prompt: str | list[dict[str, Any]]) -> str:
    """The part of a policy prompt that a reward model is asked about: the input, or the instruction where there is none.

    A text that is not in the prompt format is its own question; of messages the question is the user's last turn.

    Raises:
        DatasetError: An empty question (the paper's code looked for an input that its assistant prompts do not have, and
            scored answers to nothing), or messages as `messages_of` refuses them.
    """
    if not isinstance(prompt, str):
        question = _last_turn(messages_of(prompt))
    elif not prompt.startswith(_INSTRUCTION) or _RESPONSE.strip() not in prompt:
        question = prompt
    else:
        body = prompt[len(_INSTRUCTION) : prompt.rindex(_RESPONSE.strip())]
        instruction, _, input = body.partition(_INPUT)
        question = input.strip() or instruction

    if not question.strip():
        raise DatasetError(f"the prompt {shown(prompt)} asks nothing: its question is empty")
    return question.strip()


def _last_turn(messages: list[dict[str, str]]) -> str:
    """The text of the user's last message, in a conversation that waits for an answer."""
    if messages and messages[-1]["role"] == "assistant":
        raise DatasetError(
            f"the prompt {shown(messages)} ends with an assistant's message, so there is nothing to answer: leave it out"
        )
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def messages_of(value: Any) -> list[dict[str, str]]:
    """Messages as ``{"role", "content"}`` with one text each.

    Text parts of a content are joined, and ShareGPT's turns (``{"from": "human", "value": ...}``) get their roles' usual names.

    Raises:
        DatasetError: No list of messages, an unknown role, or a content that is not a text or parts of text.
    """
    if not isinstance(value, (list, tuple)):
        raise DatasetError(f"a prompt is a text or a list of messages, not {type(value).__name__}: {shown(value)}")
    return [_message(each) for each in value]


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise DatasetError(f"a message is {{'role': ..., 'content': ...}}, not {shown(value)}")
    role, content = value.get("role"), value.get("content")
    if role is None and "from" in value:
        role, content = _SHAREGPT.get(str(value["from"])), value.get("value")

    if role not in _ROLES:
        raise DatasetError(f"the message {shown(value)} has no known role; the roles are {', '.join(_ROLES)}")
    if value.get("tool_calls"):
        raise DatasetError(f"the message {shown(value)} calls tools, which rsoups does not: leave such rows out")
    parts = [content] if isinstance(content, str) else content
    texts = [_part(part) for part in parts] if isinstance(parts, (list, tuple)) else [None]
    if None in texts:
        raise DatasetError(f"the content of the message {shown(value)} must be a text, or a list of text parts")
    return {"role": role, "content": "".join(map(str, texts))}


def _part(part: Any) -> str | None:
    """The text of one part of a content; None of an image and the like."""
    if isinstance(part, Mapping) and str(part.get("type", "text")).endswith("text"):
        part = part.get("text")
    return part if isinstance(part, str) else None


def template_kwargs(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables of a chat template (``enable_thinking``, say), of a JSON object or as they are; none where none are given.

    Raises:
        DatasetError: Not an object.
    """
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except ValueError:
        found = None
    if not isinstance(found, Mapping):
        raise DatasetError(
            f'chat_template_kwargs is {given!r}, must be a JSON object such as {{"enable_thinking": false}}'
        )
    return dict(found)


def prompt_of(value: Any) -> str | list[dict[str, str]]:
    """A dataset's prompt, checked: a text as it is, or messages as `messages_of` gives them.

    Raises:
        DatasetError: Neither of them, or one that asks nothing.
    """
    prompt = value if isinstance(value, str) else messages_of(value)
    question_of(prompt)
    return prompt


def pair_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Question, chosen and rejected response of a preference pair, texts or messages.

    The prompt may be a column of its own, or what both conversations begin with.

    Raises:
        DatasetError: A column is missing, or the two are not answers to one question.
    """
    if missing := [name for name in ("chosen", "rejected") if not row.get(name)]:
        raise DatasetError(
            f"a preference pair has prompt, chosen and rejected; {missing} of {shown(dict(row))} are empty"
        )
    sides = [row["chosen"], row["rejected"]]
    prompt = row.get("prompt")
    if all(isinstance(side, str) for side in sides):
        if not prompt:
            raise DatasetError(f"the pair {shown(dict(row))} has no prompt: give it as a column, or write messages")
        return question_of(prompt), sides[0], sides[1]

    (*asked, chosen), (*asked_too, rejected) = map(messages_of, sides)
    if asked != asked_too or {chosen["role"], rejected["role"]} != {"assistant"}:
        raise DatasetError(f"chosen and rejected are not two answers to one conversation: {shown(dict(row))}")
    if isinstance(prompt, str) and not asked:
        return question_of(prompt), chosen["content"], rejected["content"]
    return question_of([*messages_of(prompt or []), *asked]), chosen["content"], rejected["content"]


def shown(value: Any) -> str:
    """A value for an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def response_start(prompt: str | list[dict[str, Any]]) -> str:
    """What a policy prompt already holds of the response: the text after its last ``### Response:``, if any."""
    if not isinstance(prompt, str):
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

    Raises:
        DatasetError: A prompt of messages: a chat template has no place for the beginning of an answer.
    """
    prompts = []
    for place, row in enumerate(rows):
        if not isinstance(row["prompt"], str):
            raise DatasetError(
                f"--prefix_tokens goes with prompts that are texts, not with messages ({shown(row['prompt'])}): leave it out"
            )
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
        if missing := [c for c in self.columns if c not in row]:
            raise DatasetError(
                f"task {self.name!r} needs the column(s) {missing}, the dataset has {sorted(map(str, row))}; "
                f"rename them, or choose another --task"
            )


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
        if any(_is_empty(row[name]) for name in names):
            return None
        if template is None:
            return prompt_of(row["prompt"])
        if wrong := [name for name in names if not isinstance(row[name], (str, int, float))]:
            raise DatasetError(f"the template's columns are texts or numbers, {wrong[0]!r} is {shown(row[wrong[0]])}")
        return _FIELD.sub(lambda match: str(row[match[1]]), template)

    return Task("custom", dataset, names, prompt, _own_references, cut=str.strip)


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _own_references(row: dict[str, Any]) -> list[str]:
    """Reference responses of a custom task: the texts, or the last message's, of the first such column that has any.

    A column ``reference`` or ``response`` of other values is a column for rewards to read, and no reference.
    """
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


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Rows of a CSV file. Every value is the text that the file has: "007", "NA" and "null" are no numbers and not nothing.

    Raises:
        DatasetError: No header, a name in it twice, a row of another number of fields, or a file that is not UTF-8.
    """
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if not header or len(set(header)) < len(header):
                raise DatasetError(f"{path}: the first line names the columns, each once; it is {header}")
            rows = []
            for values in reader:
                if values and len(values) != len(header):
                    raise DatasetError(
                        f"{path}, line {reader.line_num}: {len(values)} fields, the header has {len(header)}: {shown(values)}"
                    )
                if values:
                    rows.append(dict(zip(header, values, strict=True)))
            return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not CSV in UTF-8: {error}") from None
    finally:
        csv.field_size_limit(before)


def _concepts_prompt(row: dict[str, Any]) -> str:
    concepts = row["concepts"]
    return format_prompt(
        "Write one sentence that uses these words.", concepts if isinstance(concepts, str) else ", ".join(concepts)
    )


def _concepts_references(row: dict[str, Any]) -> list[str]:
    sentences = row.get("sentences") or []
    return [sentences] if isinstance(sentences, str) else list(sentences)


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
            references=_concepts_references,
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
