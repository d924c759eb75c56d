"""AntiDote's two sides: each moves only its own weights, in its own direction, and a killed run goes on as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from immunity.batch import Batch
from immunity.errors import ModelError, SettingsError
from immunity.fit import Fit, fit
from immunity.hypernetwork import preferred_under
from immunity.losses import nll
from immunity.mechanisms import Patches
from immunity.models import LoRA, attach
from immunity.patches import patched
from immunity.reference import kl
from immunity.testing import tiny
from immunity.testing.watch import InjectedError, bits, picture, require_same
from immunity.theta import Theta
from pairs import DATA, HARMFUL, METHOD, SAFE


def llama():
    return tiny.language_model()


def gpt2():
    return tiny.language_model(tiny.gpt2(torch.float32))


def lora():
    return attach(tiny.language_model(), LoRA(r=4))


def lora_gpt2():
    return attach(tiny.language_model(tiny.gpt2(torch.float32, vocab=tiny.VOCAB)), LoRA(r=4))


FAMILIES = pytest.mark.parametrize("make", [llama, gpt2, lora, lora_gpt2])


def harm(theta: Theta, adversary) -> float:
    """The mean of log sigma(pi(harmful) - pi(safe)) under the patches: what the adversary raises."""
    return -theta.value(preferred_under(adversary, HARMFUL, SAFE, name="harm"), HARMFUL)


def content(module: nn.Module) -> list[bytes]:
    return [bits(p) for p in module.parameters()]


@FAMILIES
def test_a_step_of_the_adversary_raises_harm_and_leaves_the_model_as_it_was(make):
    model = make()
    duel, theta = METHOD.start(model), Theta(model.network)
    adversary, before = duel.adversary, picture(model.network)
    gains = [harm(theta, adversary)]
    for _ in range(3):
        had = content(adversary)
        duel.attack(theta, HARMFUL, SAFE)
        assert content(adversary) != had
        gains.append(harm(theta, adversary))
    assert gains == sorted(gains)
    assert gains[-1] > gains[0] + 1e-3
    require_same(before, model.network, "after three steps of the adversary")
    assert all(p.grad is None and not p.requires_grad for p in adversary.parameters())


def test_the_adversarys_gradient_is_not_0_and_reaches_all_of_it_once_v_is_not_0():
    model = llama()
    adversary, theta = METHOD.start(model).adversary, Theta(model.network)
    loss = preferred_under(adversary, HARMFUL, SAFE, name="adversary")

    def lengths() -> dict[str, float]:
        with adversary.learning() as phi:
            g = Theta(theta.network, trainable=phi).grad(loss, HARMFUL)
        return {name: float(t.norm()) for name, t in zip(phi, g.tensors(), strict=True)}

    first = lengths()
    assert {name for name, length in first.items() if length > 0} == {
        f"v.{shape}.{kind}" for shape in adversary.v for kind in ("weight", "bias")
    }
    duel = METHOD.start(model)
    duel.adversary.load_state_dict(adversary.state_dict())
    duel.attack(theta, HARMFUL, SAFE)
    adversary.load_state_dict(duel.adversary.state_dict())
    assert min(lengths().values()) > 0


@FAMILIES
def test_a_step_of_the_defender_lowers_harm_under_fixed_patches_and_leaves_the_adversary_as_it_was(make):
    model = make()
    duel, theta = replace(METHOD, lam=0.0, beta=0.0).start(model), Theta(model.network)
    for _ in range(5):
        duel.attack(theta, HARMFUL, SAFE)
    had, before, hooks = content(duel.adversary), harm(theta, duel.adversary), picture(model.network)
    with torch.no_grad():
        fixed = duel.adversary.patches(model.network, Batch(SAFE.rows + HARMFUL.rows))

    def under_fixed() -> float:
        with torch.no_grad(), patched(model.network, fixed):
            safe, harmful = (-nll(model.network, Batch(SAFE.rows + HARMFUL.rows))).chunk(2)
        return float(torch.nn.functional.logsigmoid(harmful - safe).mean())

    was = under_fixed()
    g = duel.defend(theta, DATA["alignment"], HARMFUL, SAFE)
    require_same(hooks, model.network, "after the defender's gradient")
    assert content(duel.adversary) == had
    assert all(p.grad is None and not p.requires_grad for p in duel.adversary.parameters())
    with theta.moved(-0.02 * g.unit()):
        assert under_fixed() < was - 1e-3
        assert harm(theta, duel.adversary) < before - 1e-3


@FAMILIES
def test_the_capability_part_does_not_depend_on_the_patches(make):
    model = make()
    duel, theta = METHOD.start(model), Theta(model.network)
    traces = []
    for _ in range(2):
        theta.clear()
        duel.defend(theta, DATA["alignment"], HARMFUL, SAFE)
        traces.append(dict(theta.trace))
        duel.attack(theta, HARMFUL, SAFE)
    kept = ("nll/alignment", "reverse-kl/alignment")
    assert all(traces[0][name] == traces[1][name] for name in kept)
    assert traces[0]["attacked/safe"] != traces[1]["attacked/safe"]
    assert traces[0]["nll/alignment"] == pytest.approx(Theta(model.network).value(nll, DATA["alignment"]))


@FAMILIES
def test_hooks_do_not_pile_up_and_a_clean_pass_is_the_same_bit_for_bit(make):
    model = make()
    duel, theta, before = METHOD.start(model), Theta(model.network), picture(model.network)
    plain = nll(model.network, SAFE)
    for _ in range(3):
        duel(theta, DATA)
        require_same(before, model.network, "after a step")
        assert torch.equal(nll(model.network, SAFE), plain)


@FAMILIES
def test_under_gradient_checkpointing_the_direction_is_the_same(make):
    found = []
    for checkpoints in (False, True):
        model = make()
        network = model.network.train()
        if checkpoints:
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        duel, theta = METHOD.start(model), Theta(network, micro_batch=2)
        for _ in range(3):
            g = duel(theta, DATA)
        found.append(g)
    assert (found[0] - found[1]).norm() < 1e-4 * found[0].norm()


def test_a_network_that_is_not_checkpointed_block_by_block_is_refused():
    model = llama()
    duel = METHOD.start(model)
    model.network.model.gradient_checkpointing = True
    with pytest.raises(ModelError, match="turn gradient checkpointing off"):
        duel(Theta(model.network), DATA)


def test_the_reference_of_a_fresh_adapter_is_the_adapter_off():
    before = METHOD.start(lora()).before
    assert before is not None
    assert before.copied == 0
    assert METHOD.start(llama()).before.copied > 0
    assert replace(METHOD, beta=0.0).start(llama()).before is None


@pytest.mark.parametrize("trains", [llama, lora])
def test_a_killed_run_goes_on_with_the_adversary_and_its_optimiser(trains, tmp_path):
    streams = {role: lambda _step, rows=rows: rows for role, rows in DATA.items()}
    how = Fit(steps=4, lr=1e-3, save_every=1)

    def run(folder, stop=0, forget=()):
        model = trains()
        duel = METHOD.start(model)
        if forget:
            kept = duel.load_state_dict

            def load(state):
                fresh = METHOD.start(model).state_dict()
                kept({**state, **{name: fresh[name] for name in forget}})

            duel.load_state_dict = load

        def observe(done, _trace):
            if stop and done == stop:
                raise InjectedError

        try:
            fit(model.network, duel, streams, how, folder=folder, observe=observe)
        except InjectedError:
            return None
        return content(model.network), content(duel.adversary), duel.state_dict()["optimizer"]

    whole = run(tmp_path / "whole")
    run(tmp_path / "broken", stop=2)
    again = run(tmp_path / "broken")
    assert again[:2] == whole[:2]
    assert str(again[2]) == str(whole[2])
    for i, part in enumerate(("adversary", "optimizer")):
        run(tmp_path / str(i), stop=2)
        assert run(tmp_path / str(i), forget=(part,))[1] != whole[1]


def test_a_row_that_is_there_twice_keeps_a_partner_for_each():
    model, row = llama(), SAFE.rows[0]
    pairs = {"alignment": DATA["alignment"], "safe": Batch((row,) * 4, "safe")}
    partners = HARMFUL.rows[:2]
    found = []
    for harmful in (partners, partners[::-1]):
        theta = Theta(model.network)
        METHOD.start(model)(theta, {**pairs, "harmful": Batch(partners + harmful, "harmful")})
        found.append(theta.trace["attacked/safe"])
    assert found[0] == pytest.approx(found[1])
    adversary = METHOD.start(model).adversary
    with pytest.raises(SettingsError, match="pair not"):
        preferred_under(adversary, SAFE, Batch(HARMFUL.rows[:1]), name="x")


def test_what_makes_it_inert_or_impossible_is_said_before_compute():
    model = llama()
    assert METHOD.problems(model) == []
    assert [problem.where for problem in replace(METHOD, rho=0.0).problems(model)] == ["rho"]
    assert METHOD.mechanisms == (Patches(rank=METHOD.rank, radius=0.2, targets="attention"),)
    assert replace(METHOD, rho=0.0).mechanisms == ()
    for block in model.network.model.layers:
        block.self_attn.o_proj = nn.Identity()
        block.self_attn.q_proj = block.self_attn.k_proj = block.self_attn.v_proj = nn.Identity()
    assert [problem.where for problem in METHOD.problems(model)] == ["model"]
    for bad in ({"rho": -1}, {"lam": -1}, {"beta": -0.1}, {"adversary_lr": 0}, {"adversary_steps": 0}, {"width": 0}):
        with pytest.raises(SettingsError):
            replace(METHOD, **bad)


def test_the_divergence_is_from_the_model_as_it_was():
    model = llama()
    duel, theta = METHOD.start(model), Theta(model.network)
    duel.defend(theta, DATA["alignment"], HARMFUL, SAFE)
    assert theta.trace["reverse-kl/alignment"] == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        weight = model.network.lm_head.weight
        weight.add_(0.3 * torch.cos(torch.arange(weight.numel()).float()).view_as(weight))
    duel.defend(theta, DATA["alignment"], HARMFUL, SAFE)
    want = Theta(model.network).value(kl(duel.before, "reverse"), DATA["alignment"])
    assert theta.trace["reverse-kl/alignment"] == pytest.approx(want)
    assert want > 0.01
