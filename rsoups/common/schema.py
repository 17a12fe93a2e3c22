"""Check data from files against a dataclass, with pydantic; an error names file, field and value in one line."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rsoups.common.errors import RsoupsError

T = TypeVar("T")

# For `@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)`: no unknown fields, and no text where a number belongs.
STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


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
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise refusal(f"{where}: {problems_of(error)}") from None


def problems_of(error: ValidationError) -> str:
    """Return every problem of a validation, in one line."""
    return "; ".join(_problem(details) for details in error.errors(include_url=False, include_context=False))


def _problem(details: Any) -> str:
    field = ".".join(map(str, details["loc"]))
    if details["type"] in ("missing", "missing_argument"):
        return f"field {field} is missing"
    if details["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {field}"

    message = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not message[1:2].isupper():  # but for an acronym
        message = message[:1].lower() + message[1:]
    if not field and details["type"] == "value_error":
        return message  # about several fields together; their values may be secret, so they are not shown

    return f"field {field or 'the file'} is {_short(details['input'])}: {message}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
