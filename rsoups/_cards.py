"""Cards: YAML files whose keys are the fields of a dataclass, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

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
