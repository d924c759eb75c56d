"""Drift: its length, where it is, what it leaves as found; under checkpointing, dropout, LoRA and bf16."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from immunity import transforms
from immunity.batch import Batch
from immunity.errors import ModelError, SettingsError
from immunity.hidden import Site, module_at, sites
from immunity.losses import Loss, nll
from immunity.methods.targeted_vaccine import TargetedVaccine
from immunity.methods.vaccine import Vaccine
from immunity.models import LoRA, attach
from immunity.testing import tiny
from immunity.testing.watch import InjectedError, picture, require_same
from immunity.theta import Theta
from immunity.transforms import check_places, drifted, perturbed, site_norms

BATCH = tiny.batch(4, seed=3)
SCOPES = ("global", "per_example", "per_layer")


def gpt2():
    return tiny.gpt2(torch.float32)


def adapted(family=tiny.llama, dropout=0.0):
    """With adapters that already do something."""
    network = attach(tiny.language_model(family()), LoRA(r=4, dropout=dropout)).network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return network


def adapted_gpt2():
    return adapted(gpt2)


FAMILIES = pytest.mark.parametrize("make", [tiny.llama, gpt2, adapted, adapted_gpt2])


def attention(network, layers="all"):
    return sites(network, "attention", layers)


@pytest.fixture
def added(monkeypatch):
    """What is added to hidden states in second passes: site -> ε, of the last one."""
    found, real = {}, transforms.perturbed

    def spy(loss, additions, **how):
        def told(network, batch):
            found.clear()
            found.update(additions(network, batch))
            return found

        return real(loss, told, **how)

    monkeypatch.setattr(transforms, "perturbed", spy)
    return found


@FAMILIES
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
def test_what_has_the_length_rho(make, scope, layers, added):
    network, rho = make(), 0.3
    Theta(network).value(drifted(nll, rho, attention(network, layers), norm_scope=scope), BATCH)
    assert set(added) == set(attention(network, layers))
    rows = torch.stack([e.flatten(1).norm(dim=1) for e in added.values()])  # [S, B]
    found = {"global": rows.norm(), "per_example": rows.norm(dim=0), "per_layer": rows.norm(dim=1)}[scope]
    torch.testing.assert_close(found, torch.full_like(found, rho), rtol=1e-3, atol=0)  # 1e-7 beside small norms
    if scope == "global" and layers == "all":  # norms of their own would be rho, both
        assert rows.norm(dim=1).max() < 0.29
    if scope == "per_example":
        assert rows.norm() > 1.5 * rho


@FAMILIES
def test_padding_and_what_no_response_looks_at_do_not_drift(make, added):
    network = make()
    Theta(network).value(drifted(nll, 0.3, attention(network)), BATCH)
    lengths = [len(row.ids) for row in BATCH.rows]
    assert min(lengths) < max(lengths)
    for e in added.values():
        for i, n in enumerate(lengths):
            assert not e[i, n - 1 :].any()  # the last response token is predicted, and looked at by none
            assert e[i, n - 2].any()


@FAMILIES
@pytest.mark.parametrize("scope", SCOPES)
def test_a_small_drift_raises_the_loss(make, scope):
    network = make()
    theta = Theta(network)
    plain = theta.value(nll, BATCH)
    assert plain < theta.value(drifted(nll, 0.05, attention(network), norm_scope=scope), BATCH)


def test_rho_0_is_the_loss_itself():
    network = tiny.llama()
    assert drifted(nll, 0.0, attention(network)) is nll
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            Vaccine(rho=0.0).gradient(Theta(network), {"alignment": BATCH}).tensors(),
            Theta(network).grad(nll, BATCH).tensors(),
            strict=True,
        )
    )


def test_one_norm_for_a_batch_cannot_be_split_and_one_for_each_example_can():
    network = tiny.gpt2()
    places = attention(network)
    for scope in ("global", "per_layer"):
        with pytest.raises(SettingsError, match="couples"):
            Theta(network, micro_batch=2).grad(drifted(nll, 1.0, places, norm_scope=scope), BATCH)
    loss = drifted(nll, 1.0, places, norm_scope="per_example")
    whole, split = (Theta(network, micro_batch=m).grad(loss, BATCH) for m in (None, 1))
    assert (whole - split).norm() < 1e-12 * whole.norm()


def checkpointing(network: nn.Module, *, reentrant: bool) -> nn.Module:
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return network.train()


@FAMILIES
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layers", ["all", [0], [1]], ids=str)
def test_gradient_checkpointing_of_either_kind_changes_nothing(make, reentrant, layers):
    plain, again = make().train(), checkpointing(make(), reentrant=reentrant)
    before = picture(again)
    loss = drifted(nll, 0.5, attention(plain, layers))
    want, got = (Theta(network).grad(loss, BATCH) for network in (plain, again))
    require_same(before, again, "after a drifted gradient")
    assert (want - got).norm() < 1e-6 * want.norm()
    assert site_norms(Theta(again), nll, BATCH, attention(again)) == pytest.approx(
        site_norms(Theta(plain), nll, BATCH, attention(plain)), rel=1e-6
    )


def test_checkpointing_that_is_not_done_block_by_block_is_refused_before_compute():
    model = tiny.language_model()
    model.network.model.gradient_checkpointing = True
    for method in (Vaccine(), TargetedVaccine()):
        (found,) = method.problems(model)
        assert found.where == "model"
        assert "turn gradient checkpointing off" in found.what
    with pytest.raises(ModelError, match="no block 2"):
        check_places(tiny.llama(), [Site(2, "attention")])


@pytest.mark.parametrize("at", [1, 2])
def test_hooks_are_gone_after_an_exception_in_either_pass(at):
    network, passes = adapted(), []
    before = picture(network)

    def fails(network, batch):
        passes.append(1)
        values = nll(network, batch)
        if len(passes) == at:
            raise InjectedError
        return values

    with pytest.raises(InjectedError):
        Theta(network).grad(drifted(Loss("fails", fails), 1.0, attention(network)), BATCH)
    assert len(passes) == at
    require_same(before, network, "after an exception")


@FAMILIES
def test_bf16_drifts_the_same_way(make, added):
    network = make()
    loss = drifted(nll, 0.5, attention(network))
    exact = Theta(network).grad(loss, BATCH)
    drift = {site: e.clone() for site, e in added.items()}
    rough = Theta(network, autocast=torch.bfloat16).grad(loss, BATCH)
    assert exact @ rough > 0.99 * exact.norm() * rough.norm()
    plain = Theta(network).grad(nll, BATCH)
    assert (rough - plain).norm() > 5 * (rough - exact).norm()
    for site, e in added.items():
        assert e.dtype == torch.bfloat16
        assert (e.float() * drift[site]).sum() > 0.98 * e.float().norm() * drift[site].norm()
    assert math.sqrt(sum(float(e.double().square().sum()) for e in added.values())) == pytest.approx(0.5, rel=1e-2)


def test_the_first_pass_takes_no_gradient_of_weights():
    network, calls = tiny.llama(), []
    hooks = [p.register_hook(lambda g: calls.append(g.shape)) for p in network.parameters()]
    Theta(network).value(drifted(nll, 0.5, attention(network)), BATCH)  # both passes, and no backward of the second
    assert not calls
    Theta(network).grad(drifted(nll, 0.5, attention(network)), BATCH)
    assert len(calls) == len(hooks)


def test_blocks_below_anything_trainable_drift_too(added):
    network = tiny.llama().requires_grad_(False)
    module_at(network, Site(1, "output")).requires_grad_(True)
    Theta(network).grad(drifted(nll, 0.5, attention(network)), BATCH)
    assert added[Site(0, "attention")].norm() > 0.01


def test_with_the_same_masks_both_passes_see_one_network():
    network = adapted(dropout=0.4).train()

    def value(loss):
        torch.manual_seed(5)
        found = Theta(network).value(loss, BATCH)
        return found, torch.rand(1)

    (plain, after), places = value(nll), attention(network)
    same, then = value(drifted(nll, 1e-6, places))
    assert same == pytest.approx(plain, rel=1e-5)
    assert torch.equal(after, then)
    fresh, then = value(drifted(nll, 1e-6, places, masks="fresh"))
    assert abs(fresh - plain) > 1e-3 * plain
    assert not torch.equal(after, then)


def test_additions_may_be_drawn_and_stay_in_second_runs():
    """Noise at some sites stands beside drift, under checkpointing as well."""
    network = tiny.llama().train()

    def noise(network: nn.Module, batch: Batch):
        ids = batch.padded().input_ids
        return {Site(1, "output"): 0.3 * torch.randn(*ids.shape, 32)}

    loss = perturbed(nll, noise, name="noisy-nll", coupled=False)
    torch.manual_seed(1)
    want = Theta(network).grad(loss, BATCH)
    torch.manual_seed(1)
    got = Theta(checkpointing(network, reentrant=True)).grad(loss, BATCH)
    assert (want - got).norm() < 1e-6 * want.norm()
    assert (want - Theta(network).grad(nll, BATCH)).norm() > 0.01 * want.norm()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"rho": -1.0}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"places": ()}, "place"),
        ({"norm_scope": "per_token"}, "per_token"),
        ({"masks": "none"}, "none"),
        ({"loss": Loss("mmd", nll.of, coupled=True), "norm_scope": "per_example"}, "couples"),
    ],
    ids=["negative", "nan", "nowhere", "no such scope", "no such masks", "coupled"],
)
def test_what_cannot_drift_is_refused(how, says):
    with pytest.raises(SettingsError, match=says):
        drifted(**{"loss": nll, "rho": 1.0, "places": (Site(0, "attention"),), **how})


def test_norms_of_a_coupled_loss_are_refused():
    network = tiny.llama()
    with pytest.raises(SettingsError, match="couples"):
        site_norms(Theta(network), Loss("mmd", nll.of, coupled=True), BATCH, attention(network))


def test_no_gradient_flows_into_additions():
    network = tiny.llama()

    def of_weights(network: nn.Module, batch: Batch, *, live: bool):
        scale = network.model.norm.weight if live else network.model.norm.weight.detach()
        return {Site(0, "attention"): 0.3 * scale.expand(*batch.padded().input_ids.shape, 32)}

    live, dead = (
        Theta(network).grad(perturbed(nll, partial(of_weights, live=live), name="pushed-nll", coupled=False), BATCH)
        for live in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(live.tensors(), dead.tensors(), strict=True))
