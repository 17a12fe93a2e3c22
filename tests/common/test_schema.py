"""Data from files: what is wrong with it, in one line."""

from dataclasses import field

import pytest
from pydantic.dataclasses import dataclass

from rsoups import SuiteError
from rsoups.common.schema import STRICT, validated


@dataclass(frozen=True, config=STRICT)
class Inner:
    limit: float


@dataclass(frozen=True, config=STRICT)
class Outer:
    name: str
    inner: Inner
    count: int = 1
    labels: tuple[str, ...] = field(default_factory=tuple)
    weights: list[int] | dict[str, int] | None = None


def test_nested_data_becomes_dataclasses():
    outer = validated(Outer, {"name": "a", "inner": {"limit": 2}}, "a.yaml", SuiteError)
    assert outer == Outer("a", Inner(2.0), 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a"}, "a.yaml: field inner is missing"),
        ({"name": "a", "inner": {"limit": 1.0}, "nmae": 2}, "a.yaml: unknown field nmae"),
        ({"name": "a", "inner": {"limit": "1"}}, "a.yaml: field inner.limit is '1': input should be a valid number"),
        ({"name": "a", "inner": {"limit": float("nan")}}, "field inner.limit is nan: input should be a finite number"),
        ({"name": True, "inner": {"limit": 1.0}}, "field name is True: input should be a valid string"),
        ({"name": "a", "inner": {"limit": 1.0}, "count": 1.5}, "field count is 1.5: input should be a valid integer"),
        (
            {"name": "a", "inner": {"limit": 1.0}, "weights": {"int": "x"}},
            "field weights is {'int': 'x'}: input should be a valid array; field weights.int is 'x': input should be a valid",
        ),
        ([1], "a.yaml: field the file is [1]"),
        ({"name": 1, "inner": {}}, "field name is 1: input should be a valid string; field inner.limit is missing"),
    ],
)
def test_every_problem_is_named_with_its_field_and_value(data, message):
    with pytest.raises(SuiteError) as refused:
        validated(Outer, data, "a.yaml", SuiteError)
    assert message in str(refused.value) and "\n" not in str(refused.value)
