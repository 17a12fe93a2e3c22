"""Reward cards: YAML files whose keys are the fields of a dataclass, which pydantic checks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import yaml
from pydantic import BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass

from rsoups.common.errors import RewardError
from rsoups.common.schema import STRICT, problems_of, validated
from rsoups.data.prompts import first_sentence
from rsoups.rewards.inputs import FIELD, FIELDS

INPUTS = ("pair", "reversed_pair", "chat")
_T = TypeVar("_T")


def _quoted(value: Any) -> Any:
    """Refuse what YAML makes of a text without quotes."""
    if isinstance(value, bool):
        raise ValueError("YAML reads yes, no, on, off, true and false as booleans, so put the text in quotes")
    if value is not None and not isinstance(value, str):
        raise ValueError("it must be a text: put it in quotes")
    return value


def _integer(value: Any) -> Any:
    if type(value) is not int:  # True and 1.0 equal 1
        raise ValueError("input should be an integer")
    return value


Text = Annotated[str, BeforeValidator(_quoted)]
# Place or label of a logit. Only an int itself is a place: True is a label without its quotes.
Label = Annotated[int | str, BeforeValidator(lambda value: value if type(value) is int else _quoted(value))]
Sign = Annotated[Literal[1, -1], BeforeValidator(_integer)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # auto: as the weights are stored


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def card_class(cls: type[_T]) -> type[_T]:
    """Make a frozen dataclass that refuses wrong fields with a RewardError, in Python as in files."""
    checked = dataclass(frozen=True, config=STRICT)(cls)
    init = checked.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            name = kwargs.get("name", args[0] if args else "")
            raise RewardError(f"reward card {name!r}: {problems_of(error)}") from None

    checked.__init__ = __init__  # type: ignore[method-assign]
    return checked  # type: ignore[return-value]


class _Loader(yaml.SafeLoader):
    """Reads a date as the text that it is written as."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_fields(path: str | Path) -> dict[str, Any]:
    """Return the fields of a card's file.

    Raises:
        RewardError: No such file, not YAML, or no mapping of fields.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path}: cannot be read as a reward card ({error})") from None
    except yaml.YAMLError as error:
        raise RewardError(f"{path}: not YAML ({error})") from None

    if not isinstance(data, dict):
        raise RewardError(f"{path}: a reward card is a mapping of fields, not {type(data).__name__}")
    return data


def of_fields(kind: type[_T], data: Mapping[Any, Any], where: str) -> _T:
    """Return a card of the fields of a file.

    Raises:
        RewardError: A missing, unknown or wrong field; for an unknown one the error lists those that there are.
    """
    names = [known.name for known in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted({str(key) for key in data} - set(names)):
        raise RewardError(f"{where}: unknown field(s) {unknown}; there are {names}")
    return validated(kind, data, where, RewardError)


@card_class
class Card:
    """Fields of every card.

    Attributes:
        name: Name of the reward in records, logs and plots.
        mean, std: The score is ``(value - mean) / std``: a named calibration, so that rewards can be mixed.
        calibration: Name of the data that mean and std were measured on.
        source: Where the recipe of the input, the rubric or the function comes from.
    """

    name: Text
    mean: float = field(default=0.0, kw_only=True)
    std: Annotated[float, Field(gt=0)] = field(default=1.0, kw_only=True)
    calibration: Text | None = field(default=None, kw_only=True)
    source: Text = field(default="", kw_only=True)

    def scaled(self, value: Any) -> Any:
        """Return the score of a value (a number, or a tensor of them)."""
        return (value - self.mean) / self.std


@card_class
class RewardCard(Card):
    """A reward model, or an average of several. Each field is a key of the YAML file.

    The score is ``(sign * logit - mean) / std``.

    Attributes:
        model: Hub id, folder, or ``rsoups/...`` for an embedded model: a sequence classifier, or a LoRA adapter of one.
        models: Several models to average instead of one, each as ``model`` or ``id@revision``.
        average: What is averaged: ``weights`` (WARM, Ramé et al. 2024: models of one architecture and tokenizer, one
            forward for a score) or ``scores`` (an ensemble: any models, one forward of each).
        lambdas: Weights of the average, one for each model, summing to 1; uniform if None.
        revision: Revision of `model` on the Hub; the newest if None.
        adapter: LoRA of the sequence classifier `model`, as PEFT saves reward models, which is merged into it: a folder, or a
            Hub id, ``id@revision``.
        input: ``pair``: tokenizer(question, response); ``reversed_pair``: tokenizer(response, question); ``chat``: the whole
            conversation and the response by the model's chat template; or one text, a template with ``{response}`` and, where
            the model reads them, ``{question}``, ``{bos}``, ``{eos}``, ``{sep}``.
        system: With ``chat``, whether the model reads the prompt's system message: ``keep`` or ``drop``.
        question: Template of the question before it goes in, such as a chat's turn.
        response: ``whole``, or ``first_sentence``: the part of a response that is scored.
        head: Name of the model's output that holds the logits (B, logits), where that is not ``logits``.
        logit: Index or label of the logit that is the score.
        minus: Index or label of a logit to subtract from it.
        sign: 1, or -1 where a higher logit is worse.
        max_length: Number of tokens; a longer input loses a side of its question, and only then the end of its response.
        cut: Side of a long question that is lost: ``end``, or ``start`` (of a conversation, say).
        dtype: Precision of the computation: ``float32``, as ``auto`` is; in ``bfloat16`` and ``float16`` scores move a little
            with the batch (the log says by how much when the model is loaded).
        license: License of the model's weights; empty where it was not looked up.
    """

    model: Text | None = None
    models: Annotated[Sequence[Text], Field(min_length=2)] | None = None
    average: Literal["weights", "scores"] | None = None
    lambdas: Sequence[float] | None = None
    revision: Text | None = None
    adapter: Text | None = None
    input: Text = "pair"
    system: Literal["keep", "drop"] = "keep"
    question: Text = "{question}"
    response: Literal["whole", "first_sentence"] = "whole"
    head: Text = "logits"
    logit: Label = 0
    minus: Label | None = None
    sign: Sign = 1
    max_length: Annotated[int, Field(gt=0)] = 512
    cut: Literal["end", "start"] = "end"
    dtype: Dtype = "auto"
    license: Text = ""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.models is None):
            raise ValueError("a card names either its model, or models with an average")
        if self.models is None and (self.average is not None or self.lambdas is not None):
            raise ValueError("average and lambdas go with models, not with one model")
        if self.models is not None and self.average is None:
            raise ValueError("average is None; with models it must be weights or scores")
        if self.models is not None and (self.revision is not None or self.adapter is not None):
            raise ValueError("revision and adapter go with one model; with models, write each as id@revision")

        if self.input not in INPUTS and "{response}" not in self.input:
            raise ValueError(f"input is {self.input!r}, must be one of {list(INPUTS)} or a template with {{response}}")
        for template, allowed in ((self.input, FIELDS), (self.question, {"question"})):
            if unknown := {*FIELD.findall(template)} - allowed:
                raise ValueError(
                    f"the template {template!r} has no field {sorted(unknown)}; there are {sorted(allowed)}"
                )

    @property
    def sources(self) -> list[tuple[str, str | None]]:
        """Models with their revisions (None for the newest)."""
        if self.model is not None:
            return [(self.model, self.revision)]
        named = [name.partition("@") for name in self.models or ()]
        return [(model, revision or None) for model, _, revision in named]

    def summary(self) -> str:
        """Return the model, what it reads, and which logit counts, on one line."""
        who = self.model or f"average of {self.average}: {', '.join(self.models or ())}"
        minus = f" - logit {self.minus}" if self.minus is not None else ""
        return f"{who:50} {self.input:28} {'-' if self.sign < 0 else ''}logit {self.logit}{minus}"

    def scored_part(self, response: str) -> str:
        """Return the part of a response that is scored."""
        return first_sentence(response) if self.response == "first_sentence" else response
