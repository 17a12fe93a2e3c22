"""Cards: YAML files whose keys are the fields of a dataclass, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from rsoups._errors import RewardError

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
