"""Check data from files against a dataclass, with pydantic; an error names file, field and value in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rsoups.common.errors import RsoupsError

T = TypeVar("T")

# For `@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)`: no unknown fields, and no text where a number belongs.
STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_MISSING = ("missing", "missing_argument")


def validated(kind: type[T], data: Any, where: str, refusal: type[RsoupsError]) -> T:
    """Return `data` as an instance of `kind`.

    Args:
        kind: Class to build: a pydantic model, or a dataclass of pydantic with the config `STRICT`.
        data: Parsed JSON or YAML.
        where: Name of the file, for the error.
        refusal: Class of the error.

    Raises:
        RsoupsError: `refusal`, for a missing, unknown or wrong field; the error lists every one.
    """
    # As JSON: only then does pydantic's strict mode take objects for dataclasses, and lists for tuples.
    text = json.dumps(data, default=str)
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(text))
    except ValidationError as error:
        raise refusal(f"{where}: {problems_of(error, data)}") from None


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def problems_of(error: ValidationError, data: Any = None) -> str:
    """Return every problem of a validation, in one line.

    Args:
        error: Error of pydantic.
        data: The data that was validated. With it, names of types that are not fields are left out.
    """
    return "; ".join(_problem(details, data) for details in error.errors(include_url=False, include_context=False))


def _problem(details: Any, data: Any) -> str:
    field = ".".join(map(str, _fields(details, data)))
    if details["type"] in _MISSING:
        return f"field {field} is missing"
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {field}"

    message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not message[1:2].isupper():  # but for an acronym
        message = message[:1].lower() + message[1:]
    if not field and details["type"] == "value_error":
        return message  # about several fields together; their values may be secret, so they are not shown

    return f"field {field or 'the file'} is {_short(details['input'])}: {message}"


def _fields(details: Any, data: Any) -> Sequence[str | int]:
    """Names of nested fields down to the wrong one. Pydantic also names the types of a union: they are left out."""
    place = details["loc"]
    if data is None:
        return place

    fields = []
    for name in place:
        try:
            data = data[name]
        except (KeyError, IndexError, TypeError):  # no field of the data
            continue
        fields.append(name)
    return [*fields, place[-1]] if details["type"] in _MISSING else fields


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
