"""Names that are misspelled: the error has the one that was meant."""

import pytest

import rsoups
from rsoups.common.assets import resolve
from rsoups.common.errors import RsoupsError
from rsoups.data.tasks import find_task


@pytest.mark.parametrize(
    ("look_up", "name", "meant"),
    [
        (resolve, "rsoups/tiny-lama", "tiny-llama"),
        (find_task, "asistant", "assistant"),
        (rsoups.load_reward, "naturalnes", "naturalness"),
    ],
)
def test_a_misspelled_name_is_answered_with_the_one_that_was_meant(look_up, name, meant):
    with pytest.raises(RsoupsError, match=f"Did you mean '{meant}'"):
        look_up(name)
    with pytest.raises(RsoupsError) as refused:
        look_up("rsoups/zzz" if look_up is resolve else "zzz")
    assert "Did you mean" not in str(refused.value)
