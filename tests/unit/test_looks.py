"""Where an attack is measured: at all of its budgets, or at fewer of them."""

from __future__ import annotations

import pytest

from immunity.attacks.curve import budgets, thinned
from immunity.errors import SettingsError


@pytest.mark.parametrize(
    ("steps", "most", "found"),
    [
        (16, None, (0, 1, 2, 3, 5, 10, 16)),
        (16, 9, (0, 1, 2, 3, 5, 10, 16)),
        (16, 4, (0, 2, 5, 16)),
        (30, 4, (0, 2, 10, 30)),
        (30, 2, (0, 30)),
        (1, 2, (0, 1)),
    ],
)
def test_the_first_and_the_last_stay(steps, most, found):
    assert thinned(budgets(steps), most) == found


def test_one_look_is_none():
    with pytest.raises(SettingsError, match="looks = 1"):
        thinned(budgets(4), 1)
    assert thinned((0,), 2) == (0,)
