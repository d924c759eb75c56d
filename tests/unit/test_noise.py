"""Noise as large as the hidden states: mean and deviation, where it is, when it changes, what it leaves as found."""

from __future__ import annotations

import pytest
import torch

from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import ModelError, SettingsError
from immunity.hidden import Site, reading
from immunity.losses import Loss, nll, response_states
from immunity.models import LoRA, attach
from immunity.noise import noised
from immunity.testing import tiny
from immunity.testing.watch import InjectedError, picture, require_same
from immunity.theta import Theta
from immunity.transforms import chosen

BATCH = tiny.batch(4, seed=3)
PLACE = Site(1, "output")


def gpt2():
    return tiny.gpt2(torch.float32)


def adapted():
    network = attach(tiny.language_model(), LoRA(r=4)).network
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.cos(torch.arange(p.numel())).view_as(p))
    return network


FAMILIES = pytest.mark.parametrize("make", [tiny.llama, gpt2, adapted])


def states(network, batch, loss=None, places=(PLACE,)):
    """Hidden states of the pass in which ``loss`` is computed, or of a plain one."""
    found = {}

    def of(inner, rows):
        with reading(inner, places) as seen:
            response_states(inner, rows)
        found.update({place: h.detach() for place, h in seen.items()})
        return torch.zeros(len(rows))

    with torch.no_grad():
        (Loss("look", of) if loss is None else loss(Loss("look", of)))(network, batch)
    return found


@FAMILIES
@pytest.mark.parametrize("positions", ["all", "prompt", "response", "predicting"])
def test_it_has_the_mean_and_deviation_of_each_vector_and_is_only_where_it_was_asked_for(make, positions):
    network, before = make(), None
    before = picture(network)
    places = (Site(0, "output"), PLACE)
    clean = states(network, BATCH, places=places)
    noisy = states(network, BATCH, lambda loss: noised(loss, [PLACE], seed=1, positions=positions), places=places)
    require_same(before, network, "noised")
    added = (noisy[PLACE] - clean[PLACE]).double()
    here = chosen(BATCH.padded(), positions)
    assert here.any()
    assert not added[~here].any()
    assert torch.equal(noisy[places[0]], clean[places[0]]), "no other block"
    h = clean[PLACE].double()
    torch.testing.assert_close(added[here].mean(-1), h[here].mean(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(added[here].std(-1), h[here].std(-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(added[here].norm(dim=-1), h[here].norm(dim=-1), atol=1e-5, rtol=1e-4)


def test_the_cosine_of_a_disturbed_state_with_itself_is_about_one_over_the_root_of_two():
    network = tiny.llama(width=256, layers=2)
    clean = states(network, BATCH)[PLACE]
    noisy = states(network, BATCH, lambda loss: noised(loss, [PLACE], seed=1, positions="all"))[PLACE]
    here = BATCH.padded().attention_mask.bool()
    cosine = torch.nn.functional.cosine_similarity(clean[here], noisy[here], dim=-1)
    assert float(cosine.mean()) == pytest.approx(0.7071, abs=0.02)


def test_which_positions_predict_a_response():
    rows = (Tokens((5, 6, 7, 8), (IGNORE, IGNORE, 7, 8)), Tokens((5, 6), (IGNORE, 6)))
    padded = Batch(rows).padded()
    found = {kind: chosen(padded, kind).int().tolist() for kind in ("all", "prompt", "response", "predicting")}
    assert found == {
        "all": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "prompt": [[1, 1, 0, 0], [1, 0, 0, 0]],
        "response": [[0, 0, 1, 1], [0, 1, 0, 0]],
        "predicting": [[0, 1, 1, 0], [1, 0, 0, 0]],
    }
    with pytest.raises(SettingsError, match="positions = 'last'"):
        chosen(padded, "last")


def test_the_scale_is_a_multiple_and_0_is_the_loss_itself_bit_for_bit():
    network, theta = tiny.llama(), None
    theta = Theta(network)
    clean = states(network, BATCH)[PLACE]
    once, thrice = (
        states(network, BATCH, lambda loss, c=c: noised(loss, [PLACE], seed=1, scale=c))[PLACE] - clean for c in (1, 3)
    )
    torch.testing.assert_close(thrice, 3 * once, atol=1e-5, rtol=1e-4)
    silent, plain = theta.grad(noised(nll, [PLACE], seed=1, scale=0.0), BATCH), theta.grad(nll, BATCH)
    assert all(torch.equal(a, b) for a, b in zip(silent.tensors(), plain.tensors(), strict=True))


def test_seeds_blocks_and_examples_have_noise_of_their_own_and_the_same_seed_the_same():
    network = tiny.llama()
    theta = Theta(network)
    torch.manual_seed(0)
    values = [theta.value(noised(nll, [place], seed=s), BATCH) for s in (1, 2) for place in (PLACE, Site(0, "output"))]
    assert len(set(values)) == 4
    torch.manual_seed(99)
    assert theta.value(noised(nll, [PLACE], seed=1), BATCH) == values[0], "torch's own random numbers do not matter"
    state = torch.get_rng_state()
    theta.value(noised(nll, [PLACE], seed=1), BATCH)
    assert torch.equal(state, torch.get_rng_state()), "nor are they used up"


def test_a_fixed_table_is_the_same_for_all_rows_of_one_length():
    rows = tuple(Tokens((i, i + 1, i + 2, i + 3), (IGNORE, IGNORE, i + 2, i + 3)) for i in (10, 20))
    network, batch = tiny.llama(), Batch(rows)
    for apart in (True, False):
        clean = states(network, batch)[PLACE]
        added = states(network, batch, lambda loss, a=apart: noised(loss, [PLACE], seed=1, apart=a))[PLACE] - clean
        unit = (added - added.mean(-1, keepdim=True)) / added.std(-1, keepdim=True)
        assert torch.allclose(unit[0, 2], unit[1, 2], atol=1e-3) != apart


def test_noise_like_the_input_has_the_input_s_mean_and_deviation():
    network = tiny.llama()
    entered = Site(1, "input")
    clean = states(network, BATCH, places=(PLACE, entered))
    noisy = states(network, BATCH, lambda loss: noised(loss, [PLACE], seed=1, like={PLACE: entered}))[PLACE]
    here = chosen(BATCH.padded(), "predicting")
    added = (noisy - clean[PLACE])[here]
    torch.testing.assert_close(added.std(-1), clean[entered][here].std(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_change_nothing(size):
    network = tiny.gpt2()
    loss = noised(nll, [PLACE], seed=5)
    whole, split = Theta(network).grad(loss, BATCH), Theta(network, micro_batch=size).grad(loss, BATCH)
    assert (whole - split).norm() < 1e-9 * whole.norm()


def test_no_gradient_flows_into_the_noise():
    """The noise is as large as h, yet is a constant: the gradient is that of a loss with the same numbers added."""
    network = tiny.gpt2()
    found = Theta(network).grad(noised(nll, [PLACE], seed=5), BATCH)
    added = {}

    def keep(loss):
        return noised(loss, [PLACE], seed=5)

    added[PLACE] = states(network, BATCH, keep)[PLACE] - states(network, BATCH)[PLACE]
    handle = network.transformer.h[1].register_forward_hook(lambda _m, _i, out: out + added[PLACE])
    try:
        wanted = Theta(network).grad(nll, BATCH)
    finally:
        handle.remove()
    assert (found - wanted).norm() < 1e-10 * wanted.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_gradient_is_the_same_under_checkpointing(reentrant):
    network = tiny.llama()
    loss = noised(nll, [Site(0, "output")], seed=5)
    wanted = Theta(network).grad(loss, BATCH)
    network.train()
    network.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = Theta(network).grad(loss, BATCH)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_an_exception_leaves_everything_as_found():
    network = tiny.llama()
    before = picture(network)

    def fail(_network, _batch):
        raise InjectedError

    with pytest.raises(InjectedError):
        noised(Loss("fails", fail), [PLACE], seed=1)(network, BATCH)
    require_same(before, network, "an exception under noise")
    with pytest.raises(ModelError, match="no block 7"):
        noised(nll, [Site(7, "output")], seed=1)(network, BATCH)
    require_same(before, network, "a block that is not there")


def test_what_makes_no_sense_is_refused():
    with pytest.raises(SettingsError, match="at least one place"):
        noised(nll, [], seed=1)
    with pytest.raises(SettingsError, match="seed from 0"):
        noised(nll, [PLACE], seed=-1)


def test_in_bf16_autocast_it_is_finite():
    found = Theta(tiny.llama(), autocast=torch.bfloat16).grad(noised(nll, [PLACE], seed=1), BATCH)
    assert all(bool(t.isfinite().all()) for t in found.tensors())
