"""What a model may fall to: each attractor is 0 where it says, and is what it says elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from immunity.attractors import attractor, spread
from immunity.bounded import uniform
from immunity.errors import SettingsError
from immunity.losses import collapse
from immunity.testing import tiny
from immunity.theta import Theta


@pytest.fixture
def network() -> torch.nn.Module:
    return tiny.gpt2()


def test_one_word_is_ctraps_loss_bit_for_bit(network):
    rows = tiny.batch(3)
    assert torch.equal(spread([7])(network, rows), collapse(7)(network, rows))
    assert spread([7]).name == "collapse"


def test_every_word_is_the_maximum_of_entropy(network):
    rows = tiny.batch(3)
    every = attractor("words", network, range(tiny.SMALL_VOCAB))
    assert torch.allclose(every(network, rows), uniform(network, rows), atol=1e-12)


def test_several_words_are_wanted_equally(network):
    """KL(q || p) = the mean of the single words' losses, less the entropy of q; it is 0 where p is q."""
    rows, ids = tiny.batch(3), (5, 9, 20)
    want = sum(collapse(i)(network, rows) for i in ids) / 3 - math.log(3)
    assert torch.allclose(spread(ids)(network, rows), want, atol=1e-12)
    assert float(want.detach().min()) > 0.1


def test_descending_goes_where_the_attractor_says(network):
    theta, rows = Theta(network), tiny.batch(3)
    for name, ids in (("words", (5,)), ("words", (5, 9)), ("uniform", ()), ("random", ())):
        loss = attractor(name, network, ids)
        with theta.excursion():
            before = theta.value(loss, rows)
            for _ in range(60):
                theta.step(-0.1 * theta.grad(loss, rows).unit())
            assert theta.value(loss, rows) < 0.5 * before, name


@pytest.mark.parametrize("ids", [(), (3, 3)])
def test_no_word_and_a_word_twice_are_refused(network, ids):
    with pytest.raises(SettingsError, match="several different ones"):
        attractor("words", network, ids)


def test_an_unknown_attractor_is_refused(network):
    with pytest.raises(SettingsError, match="no attractor 'zero'"):
        attractor("zero", network, (3,))  # type: ignore[arg-type]
