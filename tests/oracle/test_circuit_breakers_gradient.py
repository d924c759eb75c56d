"""Circuit Breakers' gradient against autograd through losses written row by row, and what the paper's start does."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import slow
from immunity.batch import IGNORE, Batch, Tokens
from immunity.errors import SettingsError
from immunity.fit import Fit, fit
from immunity.hidden import Site, reading, replacing
from immunity.losses import causal_lm
from immunity.mechanisms import Representation
from immunity.method import Run, StatefulMethod
from immunity.methods.circuit_breakers import CircuitBreakers
from immunity.methods.sft import SFT
from immunity.models import LoRA, attach, merged
from immunity.testing import check_gradient, tiny
from immunity.testing.watch import InjectedError, bits, corpus, picture, require_same, spied
from immunity.theta import Theta, Vector

WIDTH = 20
STILL = CircuitBreakers(noise=0.0)


def batches(rows: int = 3) -> dict[str, Batch]:
    return {role: tiny.batch(rows, seed=i, role=role) for i, role in enumerate(("alignment", "harmful"))}


def moved_away(network: nn.Module, by: float = 0.1, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def named(theta: Theta, vector: Vector) -> slow.Weights:
    return dict(zip(theta.names, vector.tensors(), strict=True))


def hidden(network, row, at=None):
    """All of a row's hidden states, as transformers gives them: [T, D] each, the last one through the final norm."""
    ids = torch.tensor([row.ids])
    if at is None:
        with torch.no_grad():
            return [h[0] for h in network(ids, output_hidden_states=True).hidden_states]
    return [h[0] for h in functional_call(network, at, (ids,), {"output_hidden_states": True}).hidden_states]


def objective(network, original, at, data, method, away, held):
    """On two blocks: S = {1}, and all three hidden states are held."""
    rerouted, tokens = [], []
    for row in data["harmful"].rows:
        now, then = hidden(network, row, at)[1], hidden(original, row)[1]
        cos = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(now, then, strict=True)]
        counted = [t for t in range(len(row.ids)) if method.over == "all" or row.labels[t] != IGNORE]
        rerouted.append(sum(cos[t].clamp_min(0.0) for t in counted))
        tokens.append(len(counted))
    if method.everywhere:
        total = away * sum(rerouted) / sum(tokens)
    else:
        total = away * sum(r / n for r, n in zip(rerouted, tokens, strict=True)) / len(tokens)
    rows = data["alignment"].rows
    for row in rows:
        now, then = hidden(network, row, at), hidden(original, row)
        off = sum((a - b).norm(dim=-1).sum() for a, b in zip(now, then, strict=True)) / 3
        total = total + held * off / (WIDTH if method.everywhere else len(row.ids)) / len(rows)
    return total


@pytest.mark.parametrize(
    "method",
    [STILL, replace(STILL, over="response"), replace(STILL, everywhere=True, horizon=4), replace(STILL, alpha=3.0)],
    ids=repr,
)
def test_equals_autograd_through_the_objective(method):
    network = tiny.gpt2()
    network.transformer.wte.weight.requires_grad_(False)
    original = copy.deepcopy(network)
    model = replace(tiny.language_model(network), max_length=WIDTH)
    along = method.start(model)
    moved_away(network, 0.5)
    theta, data = Theta(network), batches()
    along.done, theta.progress = 2, 0.4
    got = along(theta, data)
    away, held = (
        (method.alpha * 0.25, method.alpha * 0.75) if method.horizon else (method.alpha * 0.8, method.alpha * 0.2)
    )
    at = slow.weights(network)
    value = objective(network, original, at, data, method, away, held)
    grads = torch.autograd.grad(value, list(at.values()), allow_unused=True)
    want = {
        name: torch.zeros_like(at[name]) if g is None or "transformer.h." not in name else g
        for name, g in zip(at, grads, strict=True)
    }
    assert slow.relative_error(named(theta, got), want) < 1e-8
    assert (got - SFT().gradient(theta, data)).norm() > 1e-2 * got.norm()


def test_with_an_adapter_it_equals_autograd_too():
    model = attach(replace(tiny.language_model(tiny.gpt2()), max_length=WIDTH), LoRA(r=2))
    network = model.network.double()
    original = copy.deepcopy(causal_lm(network).transformer.h)  # with adapters of B = 0
    along = STILL.start(model)
    assert along.before.copied == 0
    moved_away(network)
    theta, data = Theta(network), batches()
    theta.progress = 0.5
    got = named(theta, along(theta, data))
    before = tiny.gpt2()
    at = slow.weights(network)
    want = slow.gradient(objective(network, before, at, data, STILL, 7.5, 2.5), at)
    assert slow.relative_error(got, want) < 1e-8
    assert len(original) == 2


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_the_start_is_stationary_in_both_losses(trains):
    """cos is 1 and its greatest, the distance 0 and its least: from here no gradient leads away."""
    model = tiny.language_model(tiny.gpt2())
    network = (attach(model, LoRA(r=2)).network if trains == "lora" else model.network).double()
    model = replace(model, network=network)
    theta, data = Theta(network), batches()
    g = STILL.start(model)(theta, data)
    assert theta.trace["rerouting/harmful"] == pytest.approx(1.0, abs=1e-12)
    assert theta.trace["retained/alignment"] == 0.0
    assert g.norm() < 1e-13
    along = CircuitBreakers().start(model)
    CircuitBreakers().step_off(network, seed=0)
    theta.clear()
    assert along(theta, data).norm() > 1e-4
    assert 0.99 < theta.trace["rerouting/harmful"] < 1.0 - 1e-9


def test_the_noise_is_on_what_trains_in_the_lower_blocks_and_drawn_from_the_seed():
    found = []
    for seed in (0, 0, 1):
        network = attach(tiny.language_model(tiny.llama(layers=4)), LoRA(r=64)).network
        CircuitBreakers(noise=0.01).step_off(network, seed)
        found.append({name: p.detach() for name, p in network.named_parameters()})
        trains = {name for name, p in network.named_parameters() if p.requires_grad}
    base = attach(tiny.language_model(tiny.llama(layers=4)), LoRA(r=64)).network.state_dict()
    for name, p in found[0].items():
        assert torch.equal(p, found[1][name])
        moved = name in trains and "layers.3." not in name  # S is {1, 2}
        assert torch.equal(p, base[name]) != moved
        assert torch.equal(p, found[2][name]) != moved
        if moved and "lora_B" in name:
            assert float(p.std()) == pytest.approx(0.01, rel=0.1)
        elif moved:
            assert float((p - base[name]).std() / base[name].square().mean().sqrt()) == pytest.approx(0.01, rel=0.1)


def test_a_start_without_noise_is_warned_of(caplog):
    for noise in (0.0, 1e-3):
        data = {role: corpus(role) for role in ("alignment", "harmful")}
        run = Run(fit=Fit(steps=1, lr=1e-3), default_batch_size=2)
        CircuitBreakers(noise=noise).immunise(tiny.language_model(), data, run)
    assert [record.getMessage()[:38] for record in caplog.records] == ["noise = 0: both losses are stationary "]


def test_its_count_of_steps_is_saved_with_the_run():
    model = tiny.language_model()
    along, again = (CircuitBreakers.released().start(model) for _ in range(2))
    along(Theta(model.network), batches())
    again.load_state_dict(along.state_dict())
    assert again.done == along.done == 1


def test_states_that_point_elsewhere_already_are_left_alone():
    model = tiny.language_model(tiny.gpt2())
    along, theta = STILL.start(model), Theta(model.network)
    with replacing(model.network, {Site(0, "output"): lambda h: -h}):
        g = along(theta, {**batches(), "alignment": batches()["alignment"]})
    assert theta.trace["rerouting/harmful"] == 0.0
    assert g.norm() == 0.0  # c_r is 0 at the start


def test_the_coefficients_of_the_authors_schedule():
    released = CircuitBreakers.released()
    found = [released.coefficients(t - 1, 0.0) for t in (1, 75, 150, 300, 400)]
    assert found == [
        pytest.approx(pair) for pair in ((10 * 299 / 300, 10 / 300), (7.5, 2.5), (5.0, 5.0), (0.0, 10.0), (0.0, 10.0))
    ]
    assert [CircuitBreakers(alpha=4.0).coefficients(9, p) for p in (0.0, 0.5, 1.0)] == [(4, 0), (3, 1), (2, 2)]


def test_pads_count_only_in_the_released_codes_mean():
    """A short row beside a long one: only over all positions is what it weighs a matter of how far rows are padded."""
    model = replace(tiny.language_model(tiny.gpt2()), max_length=WIDTH)
    short, long = tiny.batch(1, seed=1, lengths=(6, 6)).rows[0], tiny.batch(1, seed=2, lengths=(14, 14)).rows[0]
    clean, wide = STILL.start(model), replace(STILL, everywhere=True).start(model)
    moved_away(model.network, 0.3)
    with torch.no_grad():
        alone = [float(along._retained(model.network, Batch((short,)))) for along in (clean, wide)]
        beside = [float(along._retained(model.network, Batch((short, long)))[0]) for along in (clean, wide)]
    assert alone == pytest.approx(beside, rel=1e-12)
    assert alone[1] == pytest.approx(alone[0] * 6 / WIDTH, rel=1e-12)


def test_state_j_is_what_enters_block_j_and_the_authors_depths_are_10_and_20_of_32():
    network = tiny.llama(layers=32, width=8)
    assert CircuitBreakers().targets(network) == (10, 20)
    for layers, targets in ((2, (1,)), (4, (1, 2)), (30, (9, 19))):
        assert CircuitBreakers().targets(tiny.llama(layers=layers, width=8)) == targets
    assert CircuitBreakers(depths=(0.0, 1.0)).targets(tiny.llama(layers=4)) == (1, 3)
    ids = torch.tensor([[5, 6, 7]])
    seen = []
    hook = network.model.layers[10].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with reading(network, [Site(9, "output")]) as read, torch.no_grad():
        states = network(ids, output_hidden_states=True).hidden_states
    hook.remove()
    assert torch.equal(read[Site(9, "output")], seen[0])
    assert torch.equal(states[10], seen[0])


def task(step: int, rows: int = 16) -> dict[str, Batch]:
    """Restricted rows and others from disjoint ranges of tokens."""
    found = {}
    for role, low in (("alignment", 5), ("harmful", 35)):
        drawn = torch.randint(0, 28, (rows, 10), generator=torch.Generator().manual_seed(2 * step + (low > 5))) + low
        ids = [tuple(row) for row in drawn.tolist()]
        found[role] = Batch(tuple(Tokens(row, (IGNORE,) * 4 + row[4:]) for row in ids), role)
    return found


def cosines(model, original, target: int) -> dict[str, float]:
    found = {}
    for role, batch in task(999).items():
        now, then = ([hidden(n, row)[target] for row in batch.rows] for n in (model, original))
        found[role] = float(torch.nn.functional.cosine_similarity(torch.cat(now), torch.cat(then), dim=-1).mean())
    return found


def test_a_separable_task_is_learnt_by_the_lower_blocks_and_survives_merging():
    original, lora = tiny.llama(layers=3), LoRA(r=16)
    base = {name: bits(p) for name, p in original.named_parameters()}
    method = CircuitBreakers(depths=(0.3,))  # S is {1}: block 2 is left alone
    model, fresh = (attach(tiny.language_model(tiny.llama(layers=3)), lora) for _ in range(2))
    along = method.start(model)
    method.step_off(model.network, seed=0)
    streams = {role: (lambda step, role=role: task(step)[role]) for role in method.reads}
    fit(model.network, along, streams, Fit(steps=150, lr=1e-3, weight_decay=0.01))
    start = fresh.network.state_dict()
    for name, p in model.network.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, start[name]) == ("layers.2." in name), name
        else:
            assert bits(p) == base[name.removeprefix("base_model.model.").replace(".base_layer", "")]
    found = cosines(model.network, original, 1)
    assert found["harmful"] < 0.1
    assert found["alignment"] > 0.95
    row = task(5)["harmful"].rows[0]
    adapted = hidden(model.network, row)
    for a, b in zip(adapted, hidden(merged(model).network, row), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@dataclass(frozen=True, kw_only=True)
class Steps(StatefulMethod):
    """The direction alone, away from an original that the weights have left already: for the contract's checks."""

    card = CircuitBreakers.card
    strength = ""
    how: CircuitBreakers

    @property
    def reads(self):
        return self.how.reads

    @property
    def mechanisms(self):
        return self.how.mechanisms

    def problems(self, model):
        return self.how.problems(model)

    def start(self, model):
        along = self.how.start(model)
        with along.before.standing() as original:
            self.how.step_off(original.requires_grad_(True), seed=0)
        return along


CHECKS = [
    check_gradient.leaves_everything_as_found,
    check_gradient.survives_a_fault_at_every_call,
    check_gradient.repeats_itself,
    check_gradient.micro_batches_change_nothing,
    check_gradient.reads_what_it_declares,
    check_gradient.is_not_sft,
    check_gradient.is_finite_in_fp32_and_bf16,
    check_gradient.nan_is_refused,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", [CircuitBreakers(), CircuitBreakers.released()], ids=["default", "released"])
def test_its_direction_keeps_the_contract(check, method):
    check(Steps(how=method))


def test_a_fault_leaves_weights_flags_and_hooks_as_found():
    model = attach(tiny.language_model(tiny.llama(layers=4)), LoRA(r=4))
    theta, method = Theta(model.network), CircuitBreakers()
    with spied(theta) as calls:
        method.start(model)(theta, batches())
    before = picture(model.network)
    for i in range(1, len(calls) + 1):
        along = method.start(model)
        with pytest.raises(InjectedError), spied(theta, fail_at=i):
            along(theta, batches())
        require_same(before, model.network, f"a fault in call {i}")


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -1.0}, {"noise": -1.0}, {"blank": 1.5}, {"depths": ()}, {"depths": (1.5,)}, {"horizon": 0}],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(SettingsError):
        CircuitBreakers(**settings)


def test_problems_are_found_before_compute():
    model = attach(tiny.language_model(tiny.llama(layers=4)), LoRA(r=4))
    assert CircuitBreakers().problems(model) == []
    for name, p in model.network.named_parameters():
        p.requires_grad_("layers.3.self_attn.q_proj.lora" in name)
    found = CircuitBreakers(alpha=0.0).problems(model)
    assert [problem.where for problem in found] == ["alpha", "model"]
    assert "nothing is trainable in the blocks up to" in found[1].what
    shallow = CircuitBreakers().problems(tiny.language_model(tiny.llama(layers=1)))
    assert "a network of one block" in shallow[0].what


@pytest.mark.parametrize(
    ("depths", "near"), [((0.2, 0.4), "first-half"), ((10 / 32, 20 / 32), "middle"), ((0.6, 0.9), "last-half")]
)
def test_mechanisms_say_where_states_are_led_away(depths, near):
    assert CircuitBreakers(depths=depths).mechanisms == (Representation(layers=near),)
    assert CircuitBreakers(alpha=0.0).mechanisms == ()


def test_half_of_the_rows_lose_their_prompts():
    along = CircuitBreakers(blank=0.5).start(tiny.language_model())
    rows = tiny.batch(40, seed=3, lengths=(8, 8))
    torch.manual_seed(0)
    shown = along._shown(rows).rows
    blank = [i for i, (a, b) in enumerate(zip(rows.rows, shown, strict=True)) if a != b]
    assert 10 < len(blank) < 30
    for i in blank:
        cut = len(rows.rows[i].ids) - len(shown[i].ids)
        assert shown[i].ids == rows.rows[i].ids[cut:] == shown[i].labels
    one = Tokens((5, 6, 7), (IGNORE, IGNORE, 7))  # a row of one token would leave nothing to predict
    assert CircuitBreakers(blank=1.0).start(tiny.language_model())._shown(Batch((one,))).rows == (one,)
