"""A soup that is read again is the soup that was saved, or is refused."""

import json
import math

import pytest
from hub_pushes import FILES

import rsoups


def test_a_soup_that_was_read_is_the_soup_that_was_saved(two, tmp_path):
    made = rsoups.interpolate(two, [0.25, 0.75], method="svd", rank=3)
    made.save_pretrained(tmp_path / "soup")
    read = rsoups.Soup.from_pretrained(tmp_path / "soup")
    assert read.ingredients == made.ingredients and read.lambdas == made.lambdas and read.svd_error == made.svd_error
    assert all((read.state_dict[key] == tensor).all() for key, tensor in made.state_dict.items())
    read.save_pretrained(tmp_path / "again")
    assert all(
        (tmp_path / "again" / n).read_bytes() == (tmp_path / "soup" / n).read_bytes() for n in FILES - {"README.md"}
    )
    both = rsoups.interpolate({"old": read, "new": two[0]}, [0.5, 0.5])
    assert [i.name for i in both.ingredients] == ["old", "new"]
    assert both.ingredients[0].sha256 == json.loads((tmp_path / "soup" / "soup.json").read_text())["sha256"]
    assert read.truncate(2).config.r == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ingredients", 3),
        ("ingredients", [{"name": "a"}]),
        ("ingredients", [{"name": "a", "source": "b", "sha256": "c", "lambda": math.nan}]),
        ("ingredients", []),
        ("ingredients", [{"name": "a", "source": "b", "sha256": "c"}]),
        ("method", "full weights"),
        ("svd_error", "none"),
        ("history", []),
        ("history", {"a": 3}),
        ("config", "x"),
        ("rewards", ["x"]),
    ],
)
def test_a_soup_json_that_is_none_is_refused(two, tmp_path, field, value):
    rsoups.interpolate(two).save_pretrained(tmp_path / "soup")
    path = tmp_path / "soup" / "soup.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(rsoups.LineageError, match=r"soup\.json"):
        rsoups.Soup.from_pretrained(tmp_path / "soup")
