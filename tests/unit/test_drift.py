"""Drift of hidden states and the random mapping: against what transformers calls hidden states."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from immunity.batch import Batch
from immunity.bounded import wide
from immunity.drift import depths, drift, random_mapping
from immunity.errors import SettingsError
from immunity.models import LoRA, attach
from immunity.reference import Reference
from immunity.testing import tiny
from immunity.testing.watch import picture, require_same
from immunity.theta import Theta

ROWS = tiny.batch(4)
WIDTH = 17


def lora():
    return attach(tiny.language_model(), LoRA(r=4)).network


MAKERS = {"gpt2": tiny.gpt2, "llama": tiny.llama, "lora": lora}
FAMILIES = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def train(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def theirs(network, batch: Batch, width: int | None = None):
    """Hidden states as the network itself gives them: L + 1 tensors."""
    padded = wide(batch, width)
    out = network(
        input_ids=padded.input_ids, attention_mask=padded.attention_mask, output_hidden_states=True, use_cache=False
    )
    return [h.detach() for h in out.hidden_states], padded.attention_mask.bool()


@FAMILIES
def test_the_depths_are_those_of_transformers(make):
    network = make()
    found = depths(network, ROWS.padded())
    wanted, _ = theirs(network, ROWS)
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@FAMILIES
@pytest.mark.parametrize("norm", ["norm", "squared"])
@pytest.mark.parametrize("width", [None, WIDTH])
def test_drift_is_the_mean_of_norms_and_squared_that_of_their_squares(make, norm, width):
    network = make()
    reference, (then, _) = Reference(network), theirs(network, ROWS, width)
    train(network)
    now, mask = theirs(network, ROWS, width)
    off = torch.stack([(a - b).norm(dim=-1) for a, b in zip(now, then, strict=True)]).mean(0)  # [B, T], mean of depths
    if norm == "squared":
        off = torch.stack([(a - b).norm(dim=-1) ** 2 for a, b in zip(now, then, strict=True)]).mean(0)
    rows = off.mean(1) if width else torch.stack([o[m].mean() for o, m in zip(off, mask, strict=True)])
    loss = drift(reference, norm=norm, width=width)
    assert loss(network, ROWS).tolist() == pytest.approx(rows.tolist(), rel=1e-5)


@FAMILIES
@pytest.mark.parametrize("norm", ["norm", "squared"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_where_nothing_has_changed_drift_and_its_gradient_are_0_and_finite(make, norm, autocast):
    network = make()
    theta, loss = Theta(network, autocast=autocast), drift(Reference(network), norm=norm)
    assert theta.value(loss, ROWS) == 0.0
    assert theta.grad(loss, ROWS).norm() == 0.0


@pytest.mark.parametrize("norm", ["norm", "squared"])
@pytest.mark.parametrize("width", [None, WIDTH])
def test_its_gradient_is_that_of_finite_differences_and_of_any_micro_batch(norm, width):
    network = tiny.gpt2()
    loss = drift(Reference(network), norm=norm, width=width)
    train(network)
    theta = Theta(network)
    g = theta.grad(loss, ROWS)
    step = 1e-6 * g.unit()
    with theta.moved(step):
        ahead = theta.value(loss, ROWS)
    with theta.moved(-step):
        behind = theta.value(loss, ROWS)
    assert (ahead - behind) / 2e-6 == pytest.approx(g.norm(), rel=1e-6)
    for micro in (1, 3):
        assert (Theta(network, micro_batch=micro).grad(loss, ROWS) - g).norm() < 1e-12 * g.norm()


def test_a_step_against_it_goes_back():
    network = tiny.gpt2()
    theta, loss = Theta(network), drift(Reference(network))
    train(network)
    before = theta.value(loss, ROWS)
    with theta.moved(-1e-2 * theta.grad(loss, ROWS).unit()):
        assert theta.value(loss, ROWS) < before


@FAMILIES
def test_everything_is_left_as_found_under_gradient_checkpointing_too(make):
    network = make()
    loss, mapped = drift(Reference(network)), random_mapping(network)
    train(network)
    plain = Theta(network).grad(loss, ROWS)
    getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)()
    network.train()
    found = picture(network)
    again = Theta(network).grad(loss, ROWS)
    Theta(network).grad(mapped, ROWS)
    require_same(found, network, "drift")
    assert (again - plain).norm() < 1e-5 * plain.norm()


@FAMILIES
@pytest.mark.parametrize("width", [None, WIDTH])
def test_random_mapping_is_one_minus_the_absolute_cosine_with_the_tokens_row(make, width):
    network = make()
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    words, size = inner.get_input_embeddings().weight.shape
    table = torch.randn(words, size, generator=torch.Generator().manual_seed(3))
    states, mask = theirs(network, ROWS, width)
    ids = wide(ROWS, width).input_ids
    off = torch.stack([1 - functional.cosine_similarity(h, table[ids].to(h), dim=-1).abs() for h in states]).mean(0)
    rows = off.mean(1) if width else torch.stack([o[m].mean() for o, m in zip(off, mask, strict=True)])
    assert random_mapping(network, seed=3, width=width)(network, ROWS).tolist() == pytest.approx(
        rows.tolist(), rel=1e-5
    )
    assert random_mapping(network, seed=4)(network, ROWS).tolist() != pytest.approx(rows.tolist(), rel=1e-3)


def test_its_table_is_fixed_and_the_callers_random_numbers_stay():
    network, state = tiny.gpt2(), torch.get_rng_state()
    values = [random_mapping(network)(network, ROWS) for _ in range(2)]
    assert torch.equal(*values)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_can_descend_it():
    network = tiny.gpt2()
    theta, loss = Theta(network), random_mapping(network)
    start = theta.value(loss, ROWS)
    for _ in range(40):
        theta.step(-0.1 * theta.grad(loss, ROWS).unit())
    assert theta.value(loss, ROWS) < 0.7 * start


def test_what_is_out_of_range_is_refused():
    network = tiny.gpt2()
    with pytest.raises(SettingsError, match="mse"):
        drift(Reference(network), norm="mse")
    with pytest.raises(SettingsError, match="width 3"):
        drift(Reference(network), width=3)(network, ROWS)
