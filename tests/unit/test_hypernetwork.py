"""The hypernetwork: what its patches depend on, how long they are, and that it is the same whenever it is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import SettingsError
from immunity.hypernetwork import HEAD, hypernetwork, prompts
from immunity.losses import nll
from immunity.patches import patched, sizes
from immunity.testing import tiny
from immunity.testing.watch import bits
from immunity.theta import Theta
from pairs import DATA, HARMFUL, METHOD, SAFE


def llama():
    return tiny.language_model()


def content(module: nn.Module) -> list[bytes]:
    return [bits(p) for p in module.parameters()]


def test_patches_are_of_prompts_alone_without_pads():
    model = llama()
    adversary = METHOD.start(model).adversary
    theta = Theta(model.network)
    duel = METHOD.start(model)
    duel.attack(theta, HARMFUL, SAFE)
    adversary.load_state_dict(duel.adversary.state_dict())
    together, other = (adversary.patches(model.network, rows) for rows in (HARMFUL, SAFE))
    for i, row in enumerate(HARMFUL.rows):
        alone = adversary.patches(model.network, Batch((row,)))
        for name, patch in together.items():
            torch.testing.assert_close(patch.u[i : i + 1], alone[name].u, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(patch.v[i : i + 1], alone[name].v, rtol=1e-4, atol=1e-6)
            assert torch.equal(patch.v, other[name].v)  # the same prompts, other answers
            assert len(patch.v) == len(HARMFUL)
            assert patch.v.abs().max() > 0
    row = Tokens((5, 6, 7, 8), (IGNORE, IGNORE, 7, IGNORE))
    ids, mask, _ = prompts(Batch((row, Tokens((9, 4), (9, 4)))))
    assert ids.tolist() == [[5, 6], [9, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]


def test_at_first_nothing_is_patched_and_the_cap_holds_however_large_v_is():
    model = llama()
    adversary = METHOD.start(model).adversary
    with torch.no_grad():
        plain = nll(model.network, SAFE)
        with patched(model.network, adversary.patches(model.network, SAFE)):
            assert torch.equal(nll(model.network, SAFE), plain)
        assert all(not patch.v.any() for patch in adversary.patches(model.network, SAFE).values())
        for head in adversary.v.values():
            head.weight.normal_(std=100.0)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = adversary.patches(model.network, SAFE)
            for name, size in sizes(model.network).items():
                lengths = torch.linalg.matrix_norm(found[name].v @ found[name].u)
                torch.testing.assert_close(lengths, torch.full_like(lengths, METHOD.rho * size.norm))


def test_one_patch_for_a_batch_is_that_of_the_mean_and_couples_its_rows():
    model = llama()
    method = replace(METHOD, per="batch")
    duel, theta = method.start(model), Theta(model.network)
    duel.attack(theta, HARMFUL, SAFE)
    assert all(len(patch.v) == 1 for patch in duel.adversary.patches(model.network, SAFE).values())
    with pytest.raises(SettingsError, match="couples the examples"):
        method.start(model)(Theta(model.network, micro_batch=2), DATA)


def test_the_hypernetwork_is_fixed_by_its_seed_and_draws_nothing_of_the_callers():
    network, state = tiny.llama(), torch.random.get_rng_state()
    one, two, other = (hypernetwork(network, rank=2, width=8, rho=0.1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert content(one) == content(two) != content(other)
    assert {p.dtype for p in hypernetwork(tiny.gpt2(), rank=2, width=8, rho=0.1).parameters()} == {torch.float64}
    assert {p.dtype for p in hypernetwork(network.bfloat16(), rank=2, width=8, rho=0.1).parameters()} == {torch.float32}
    assert hypernetwork(network, rank=2, width=2 * HEAD, rho=0.1).heads == 2
    with pytest.raises(SettingsError, match="in multiples of it"):
        hypernetwork(network, rank=2, width=2 * HEAD + 1, rho=0.1)
