"""The token noiser: a target that leaves part of its mass to all other tokens, fairly and always in the same way."""

from __future__ import annotations

import pytest
import torch

from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import SettingsError
from immunity.losses import nll
from immunity.noiser import noiser, uniform
from immunity.testing import tiny
from immunity.theta import Theta

ROWS = tiny.batch(4, seed=3, role="harmful")


@pytest.fixture
def network():
    return tiny.gpt2()


def targets(network, batch, loss) -> list[list[torch.Tensor]]:
    """What a loss asks for: minus its derivative by log-probabilities, [V] for each response position of each row."""
    found = []
    for row in batch.rows:
        one = Batch((row,), batch.role)
        asked = []

        def each(scores, n=one.rows[0].n_response, kept=asked):
            scores = scores.detach().requires_grad_()
            kept.append(scores)
            return scores

        hook = network.get_output_embeddings().register_forward_hook(lambda _module, _args, out, f=each: f(out))
        try:
            value = loss(network, one)[0]
        finally:
            hook.remove()
        (scores,) = asked
        (slope,) = torch.autograd.grad(value * row.n_response, scores)
        # d/ds of −Σ q log softmax(s) is p Σq − q.
        p = scores.detach().softmax(-1)
        mass = mass_of(loss)
        found.append([mass * p[i] - slope[i] for i in range(row.n_response)])
    return found


def mass_of(loss) -> float:
    return MASSES[loss]


MASSES: dict = {}


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize(("mass", "tail", "whole"), [(None, 0.1, 1.0), (0.01, 0.01, 0.91)])
def test_the_target_has_1_minus_lambda_on_what_was_said_and_its_tail_on_the_rest(network, seed, mass, tail, whole):
    loss = noiser(0.1, mass=mass, seed=seed)
    MASSES[loss] = whole
    for row, asked in zip(ROWS.rows, targets(network, ROWS, loss), strict=True):
        said = [label for label in row.labels[1:] if label != IGNORE]
        assert len(asked) == len(said)
        for q, token in zip(asked, said, strict=True):
            assert float(q.sum()) == pytest.approx(whole, abs=1e-9)
            assert float(q[token]) == pytest.approx(0.9, abs=1e-9)
            others = torch.cat([q[:token], q[token + 1 :]])
            assert float(others.min()) >= -1e-12
            assert float(others.sum()) == pytest.approx(tail, abs=1e-9)
            if seed is None:
                assert float(others.max() - others.min()) < 1e-9
            else:
                assert float(others.max()) > 1.2 * tail / len(others)


def test_without_noise_it_is_the_cross_entropy(network):
    theta = Theta(network)
    want = theta.grad(nll, ROWS)
    for loss in (noiser(0.0), noiser(0.0, seed=1)):
        assert (theta.grad(loss, ROWS) - want).norm() < 1e-12 * want.norm()


def test_on_average_over_seeds_it_is_the_loss_with_the_mean(network):
    want = noiser(0.3)(network, ROWS)
    drawn = torch.stack([noiser(0.3, seed=seed)(network, ROWS) for seed in range(200)])
    spread = drawn.std(0) / 200**0.5
    assert bool((spread > 0).all())
    assert bool(((drawn.mean(0) - want).abs() < 4 * spread + 2e-3 * want).all())


def test_noise_is_of_a_rows_place_alone_and_prompts_and_pads_are_never_asked_for(network):
    loss = noiser(0.4, seed=5)
    together = loss(network, ROWS)
    alone = torch.cat([loss(network, Batch((row,), "harmful")) for row in ROWS.rows])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    row = max(ROWS.rows, key=lambda row: row.n_response)
    at = next(t for t, label in enumerate(row.labels) if label != IGNORE)
    later = Tokens(row.ids, (*(IGNORE,) * (at + 1), *row.labels[at + 1 :]))
    sums = [float(loss(network, Batch((r,), "harmful")).detach()) * r.n_response for r in (row, later)]
    alone = Tokens(row.ids, tuple(label if t == at else IGNORE for t, label in enumerate(row.labels)))
    assert sums[0] - sums[1] == pytest.approx(float(loss(network, Batch((alone,), "harmful")).detach()))
    assert not torch.allclose(together, noiser(0.4, seed=6)(network, ROWS))


def test_numbers_are_uniform_unlike_for_each_key_and_the_same_again():
    keys = torch.arange(50, dtype=torch.int64)[:, None] << 30
    u = uniform(keys, 1000)
    assert torch.equal(u, uniform(keys, 1000))
    assert torch.equal(u[3:4], uniform(keys[3:4], 1000))
    assert torch.equal(u[:, :7], uniform(keys, 7))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(u.var()) == pytest.approx(1 / 12, abs=0.002)
    seen = torch.corrcoef(u) - torch.eye(50, dtype=torch.float64)
    assert float(seen.abs().max()) < 0.2
    counts = torch.histc(u.flatten(), 10, 0, 1)
    assert float(counts.min()) > 4700
    assert float(counts.max()) < 5300


def test_splitmix64_is_the_published_one():
    # The first outputs of the generator that starts at 0, as its reference implementation prints them.
    known = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    found = uniform(torch.zeros(1, 1, dtype=torch.int64), 3)[0].tolist()
    assert found == [(word >> 11) / 2.0**53 for word in known]


@pytest.mark.parametrize(("noise", "mass"), [(1.0, None), (-0.1, None), (0.1, 1.0), (0.1, -1.0)])
def test_shares_out_of_range_are_refused(noise, mass):
    with pytest.raises(SettingsError, match="between 0 and 1"):
        noiser(noise, mass=mass)
