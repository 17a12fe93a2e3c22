"""Cards: YAML files whose keys are the fields of a dataclass, checked as they are read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from rsoups.common.errors import RewardError
from rsoups.data.prompts import first_sentence
from rsoups.rewards.inputs import FIELD, FIELDS

DTYPES = ("auto", "float32", "bfloat16", "float16")  # auto: as the weights are stored

_T = TypeVar("_T")


def read_card_file(path: str | Path) -> dict[str, Any]:
    """The mapping that a card's file holds.

    Raises:
        RewardError: No such file, not YAML, or no mapping of fields.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"{path}: cannot be read as a reward card ({error})") from None
    except yaml.YAMLError as error:
        raise RewardError(f"{path}: not YAML ({error})") from None
    if not isinstance(data, dict):
        raise RewardError(f"{path}: a reward card is a mapping of fields, not {type(data).__name__}")
    return data


def made(kind: type[_T], data: Mapping[Any, Any], where: str) -> _T:
    """A dataclass of a card's fields.

    Raises:
        RewardError: An unknown or missing field, or a value that the class refuses.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := {str(key) for key in data} - set(known):
        raise RewardError(f"{where}: unknown field(s) {sorted(unknown)}; there are {sorted(known)}")
    required = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    if missing := required - set(data):
        raise RewardError(f"{where}: missing field(s) {sorted(missing)}")
    return kind(**data)


def check_fields(card: Any, where: str) -> None:
    """Refuse what YAML made of a text without quotes: a boolean, a number or a date where a field takes texts.

    Args:
        card: A dataclass.
        where: How an error message names it.

    Raises:
        RewardError: Such a value; the field is named.
    """
    for name, hint in get_type_hints(type(card)).items():
        kinds = set(get_args(hint)) if isinstance(hint, UnionType) else {hint}
        if any(get_origin(kind) is Mapping for kind in kinds):
            continue
        lists = [kind for kind in kinds if get_origin(kind) is Sequence]
        kinds |= {item for kind in lists for item in get_args(kind)}

        value = getattr(card, name)
        for one in value if lists and isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, bool) and bool not in kinds:
                raise RewardError(
                    f"{where}: {name} is {one}: YAML reads yes, no, on, off, true and false as booleans, so put the text in "
                    "quotes"
                )
            if str in kinds and type(one) not in kinds and not isinstance(one, str):
                raise RewardError(f"{where}: {name} is {one!r}, must be a text: put it in quotes")


def check_calibration(name: str, mean: Any, std: Any) -> None:
    """Refuse a mean or a deviation that no score can be scaled by.

    Raises:
        RewardError: Not finite numbers, or a std that is not above 0.
    """
    for field, value in (("mean", mean), ("std", std)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise RewardError(f"reward card {name!r}: {field} is {value!r}, must be a finite number")
    if std <= 0:
        raise RewardError(f"reward card {name!r}: std is {std!r}, must be above 0")


INPUTS = ("pair", "reversed_pair")
_AVERAGES = ("weights", "scores")
_RESPONSES: dict[str, Callable[[str], str]] = {"whole": str, "first_sentence": first_sentence}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardCard:
    """What a reward is. Each field is a key of the YAML file.

    Attributes:
        name: Names the reward in records, logs and plots.
        model: Hub id, folder, or ``rsoups/...`` for an embedded one: a sequence classifier, or a LoRA adapter of one.
        models: Instead of one model several to be averaged, each as ``model`` or ``id@revision``.
        average: What is averaged: their ``weights`` (WARM, Ramé et al. 2024: models of one architecture and tokenizer, one
            forward for a score) or their ``scores`` (an ensemble: any models, one forward of each).
        lambdas: Weights of the average, one for each of ``models``, summing to 1; uniform ones where left out.
        revision: Of ``model`` on the Hub, None for the newest.
        input: ``pair``: tokenizer(question, response); ``reversed_pair``: tokenizer(response, question); or one text, a
            template with ``{response}`` and, where the model reads them, ``{question}``, ``{bos}``, ``{eos}``, ``{sep}``.
        question: Template of the question before it goes in, such as a chat's turn.
        response: ``whole``, or ``first_sentence`` of it.
        logit: Index or label of the logit that is the score.
        minus: Index or label of a logit to subtract from it, None for none.
        sign: 1, or -1 where a higher logit is worse.
        mean, std: The score is ``(sign * logit - mean) / std``: from a named calibration, so that rewards can be mixed.
        calibration: What mean and std were measured on.
        max_length: Tokens; a longer input loses a side of its question, and only then the end of its response.
        cut: Which side of a long question is lost: ``end``, or ``start`` (of a conversation, say).
        dtype: To compute in: ``float32``, which ``auto`` is too, ``bfloat16`` or ``float16``, whose scores move a little with
            the batch (by how much is logged when the model is loaded).
        source: Where the input recipe comes from.
        license: Of the model's weights; empty where it was not looked up.
    """

    name: str
    model: str | None = None
    models: Sequence[str] | None = None
    average: str | None = None
    lambdas: Sequence[float] | None = None
    revision: str | None = None
    input: str = "pair"
    question: str = "{question}"
    response: str = "whole"
    logit: int | str = 0
    minus: int | str | None = None
    sign: int = 1
    mean: float = 0.0
    std: float = 1.0
    calibration: str | None = None
    max_length: int = 512
    cut: str = "end"
    dtype: str = "auto"
    source: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        check_fields(self, f"reward card {self.name!r}")
        self._check_models()
        if self.input not in INPUTS and "{response}" not in self.input:
            self._refuse(f"input is {self.input!r}, must be one of {list(INPUTS)} or a template with {{response}}")
        if unknown := {*FIELD.findall(self.input)} - FIELDS or {*FIELD.findall(self.question)} - {"question"}:
            self._refuse(f"no field {sorted(unknown)} for templates; {sorted(FIELDS)}")
        allowed = {"response": (*_RESPONSES,), "sign": (1, -1), "cut": ("end", "start"), "dtype": DTYPES}
        for field, values in allowed.items():
            if (value := getattr(self, field)) not in values:
                self._refuse(f"{field} is {value!r}, must be one of {list(values)}")
        if type(self.max_length) is not int or self.max_length < 1:
            self._refuse(f"max_length is {self.max_length!r}, must be a number of tokens")
        check_calibration(self.name, self.mean, self.std)

    def _check_models(self) -> None:
        if (self.model is None) == (self.models is None):
            self._refuse("names either its model, or models with an average")
        if self.models is None:
            if self.average is not None or self.lambdas is not None:
                self._refuse("average and lambdas go with models, not with one model")
            return
        if isinstance(self.models, str) or len(self.models) < 2:
            self._refuse(f"models is {self.models!r}, must be a list of two or more")
        if self.average not in _AVERAGES:
            self._refuse(f"average is {self.average!r}, must be one of {list(_AVERAGES)}")
        if self.revision is not None:
            self._refuse("revision goes with one model; with models, write each as id@revision")

    def _refuse(self, reason: str) -> NoReturn:
        raise RewardError(f"reward card {self.name!r}: {reason}")

    @classmethod
    def read(cls, path: str | Path) -> RewardCard:
        """Read and check a card.

        Raises:
            RewardError: Not a YAML mapping, an unknown or missing key, or a value that is out of range.
        """
        return made(cls, read_card_file(path), str(path))

    def summary(self) -> str:
        """Who scores, what it reads, and which logit counts, on one line."""
        who = self.model or f"average of {self.average}: {', '.join(self.models or ())}"
        minus = f" - logit {self.minus}" if self.minus is not None else ""
        return f"{who:50} {self.input:28} {'-' if self.sign < 0 else ''}logit {self.logit}{minus}"

    def said(self, response: str) -> str:
        """The part of a response that is scored."""
        return _RESPONSES[self.response](response)

    def scaled(self, raw: Any) -> Any:
        """The score of a raw value (a number, or a tensor of them): sign, then mean and std."""
        return (self.sign * raw - self.mean) / self.std
