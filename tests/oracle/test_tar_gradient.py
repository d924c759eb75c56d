"""TAR's gradient against deep copies that torch's AdamW trains, and losses by explicit loops over full logits."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

import slow
from immunity.batch import IGNORE, Batch
from immunity.errors import SettingsError
from immunity.losses import nll
from immunity.methods.sft import SFT
from immunity.methods.tar import TAR
from immunity.models import LoRA, attach
from immunity.testing import tiny
from immunity.testing.watch import picture, require_same
from immunity.theta import Theta, Vector
from immunity.trajectories import switched

WIDTH = 20
SMALL = TAR(lookahead=4, every=2, lrs=(1e-2,), mapping_steps=0, switch=0.0)


def batches(method: TAR, rows: int = 3) -> dict[str, Batch]:
    return {role: tiny.batch(rows * n, seed=i, role=role) for i, (role, n) in enumerate(method.reads.items())}


def trained(network: nn.Module, seed: int = 1) -> None:
    """As if after some steps: elsewhere than where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def wide(row, everywhere: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([row.ids])
    if not everywhere:
        return ids, torch.ones_like(ids)
    more = WIDTH - len(row.ids)
    return functional.pad(ids, (0, more)), functional.pad(torch.ones_like(ids), (0, more))


def entropy(network: nn.Module, batch: Batch, everywhere: bool, kind: str = "entropy") -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        ids, mask = wide(row, everywhere)
        logits = network(input_ids=ids, attention_mask=mask).logits[0]
        if not everywhere:
            logits = logits[[t - 1 for t in range(1, len(row.ids)) if row.labels[t] != IGNORE]]
        p = logits.softmax(-1)
        each = (p * p.log()).sum(-1) if kind == "entropy" else -p.log().mean(-1) - math.log(p.shape[-1])
        total = total + each.mean()
    return total / len(batch)


def drifted(network: nn.Module, before: nn.Module, batch: Batch, norm: str, everywhere: bool) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in batch.rows:
        ids, mask = wide(row, everywhere)
        now, then = (
            m(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states for m in (network, before)
        )
        for a, b in zip(now, then, strict=True):
            off = ((a - b.detach())[0] ** 2).sum(-1)
            total = total + (off.sqrt() if norm == "norm" else off).mean() / len(now)
    return total / len(batch)


def dpo(network: nn.Module, before: nn.Module, safe: Batch, harmful: Batch) -> torch.Tensor:
    def said(model, row):
        logits = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        return sum(logits[t - 1, row.labels[t]] for t in range(1, len(row.ids)) if row.labels[t] != IGNORE)

    terms = []
    for s, h in zip(safe.rows, harmful.rows, strict=True):
        m = said(network, s) - said(network, h) - (said(before, s) - said(before, h)).detach()
        terms.append(-functional.logsigmoid(0.1 * m))
    return torch.stack(terms).mean()


def oracle(network: nn.Module, before: nn.Module, method: TAR, data: dict[str, Batch], meets: list[Batch], lr: float):
    """The sum over deep copies of the attacker, one for each measurement, plus the retain terms at θ."""
    aligned = data["alignment"].parts(method.reads["alignment"])[0]
    names, ps = zip(*network.named_parameters(), strict=True)
    kept = slow.mean_loss(network, dict(network.named_parameters()), aligned)
    if method.drift != "none":
        kept = kept + drifted(network, before, aligned, method.drift, method.everywhere)
    total = dict(zip(names, torch.autograd.grad(kept, ps), strict=True))
    attacker = copy.deepcopy(network)
    descent = torch.optim.AdamW(attacker.parameters(), lr=lr)  # PyTorch's defaults
    k_max = method.lookahead
    for i in range(k_max):
        descent.zero_grad()
        slow.mean_loss(attacker, dict(attacker.named_parameters()), meets[i]).backward()
        descent.step()
        if (i + 1) % method.every:
            continue
        stand = copy.deepcopy(attacker)
        there = list(stand.parameters())
        rows = data["heldout"]
        if method.outer == "dpo":
            loss = dpo(stand, before, data["safe"], rows)
        else:
            loss = entropy(stand, rows, method.everywhere, method.outer)
        weight = method.lam * math.exp((i - (k_max - 1)) / 16)
        for name, g in zip(names, torch.autograd.grad(loss, there), strict=True):
            total[name] = total[name] + weight * g
    return total


CASES = {
    "default": SMALL,
    "released": replace(TAR.released(), lookahead=4, every=2, mapping_steps=0, switch=0.0, lrs=(1e-2,)),
    "paper": replace(TAR.paper(), lookahead=6, every=3, mapping_steps=0, switch=0.0, lrs=(1e-2,)),
    "uniform": replace(SMALL, outer="uniform", drift="none", lam=1.0),
    "dpo": replace(SMALL, outer="dpo"),
    "switch": replace(SMALL, switch=1.0),
    "rates": replace(SMALL, lrs=(1e-4, 1e-2, 1e-3)),
}


@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
@pytest.mark.parametrize("micro", [None, 2])
def test_the_gradient_equals_deep_copies(method, micro):
    network, before = tiny.gpt2(), tiny.gpt2()
    along = method.start(tiny.language_model(network, max_length=WIDTH))
    trained(network)
    data = batches(method)
    torch.manual_seed(3)
    rate = method.lrs[int(torch.randint(len(method.lrs), ()))]
    harmful = data["harmful"].parts(method.lookahead)
    meets = switched(harmful, data["alignment"].parts(method.reads["alignment"])[1:], method.switch)
    if method.switch:
        assert 0 < sum(a is not b for a, b in zip(meets, harmful, strict=True)) < method.lookahead
    want = oracle(network, before, method, data, meets, rate)
    torch.manual_seed(3)
    theta = Theta(network, micro_batch=micro)
    got = dict(zip(theta.names, along(theta, data).tensors(), strict=True))
    assert slow.relative_error(got, want) < (1e-10 if micro is None else 1e-8)


def test_under_a_lora_defence_the_attacker_goes_on_with_the_adapter_and_the_original_is_the_adapter_off():
    model = attach(tiny.language_model(tiny.gpt2(), max_length=WIDTH), LoRA(r=2))
    along = SMALL.start(model)
    assert along.before.copied == 0
    theta, data = Theta(model.network), batches(SMALL)
    before = picture(model.network)
    g = along(theta, data)
    require_same(before, model.network, "TAR over LoRA")
    assert theta.trace["drift/alignment"] == 0.0
    assert 0 < g.norm() < math.inf
    plain = SFT().gradient(theta, data)
    assert (g - plain).norm() > 1e-3 * plain.norm()


def test_a_fresh_lora_attacker_is_for_a_defence_of_all_weights():
    method = replace(SMALL, attacker="lora", lam=1.0)
    full = tiny.language_model(tiny.gpt2(), max_length=WIDTH)
    assert not method.problems(full)
    theta, data = Theta(full.network), batches(method)
    torch.manual_seed(0)
    g = method.start(full)(theta, data)
    torch.manual_seed(0)
    assert (g - SMALL.start(full)(theta, data)).norm() > 1e-6
    adapted = attach(tiny.language_model(), LoRA(r=2))
    assert [p.where for p in method.problems(adapted)] == ["attacker"]


class Counting(Theta):
    """Lists its gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.seen: list[str] = []

    def grad(self, loss, batch) -> Vector:
        self.seen.append(f"{loss.name}/{batch.role}")
        return super().grad(loss, batch)


def test_a_step_of_the_papers_has_64_attacks_16_measurements_and_the_two_retain_terms():
    method = replace(TAR.paper(), mapping_steps=0, switch=0.0)
    network = tiny.gpt2()
    theta = Counting(network)
    method.start(tiny.language_model(network))(theta, batches(method, rows=1))
    assert {name: theta.seen.count(name) for name in theta.seen} == {
        "nll/harmful": 64,
        "negative-entropy/heldout": 16,
        "nll/alignment": 1,
        "drift/alignment": 1,
    }


def test_every_measurement_is_of_one_and_the_same_held_out_batch_and_no_attacker_sees_it():
    network, seen = tiny.gpt2(), []
    theta = Theta(network)
    real = theta.grad
    theta.grad = lambda loss, batch: (seen.append((loss.name, batch)), real(loss, batch))[1]
    data = batches(SMALL)
    SMALL.start(tiny.language_model(network))(theta, data)
    measured = [batch for name, batch in seen if name == "negative-entropy"]
    assert len(measured) == 2
    assert all(batch is data["heldout"] for batch in measured)
    assert not {row for name, batch in seen if name == "nll" for row in batch.rows} & set(data["heldout"].rows)


@pytest.mark.parametrize("outer", ["entropy", "dpo"])
def test_the_first_steps_go_to_the_initial_safeguard_and_the_count_is_saved(outer):
    method = replace(SMALL, mapping_steps=2, outer=outer)
    network = tiny.gpt2()
    model, data = tiny.language_model(network), batches(method)
    along = method.start(model)
    names = []
    for _ in range(3):
        theta = Counting(network)
        along(theta, data)
        names.append(set(theta.seen))
    mapped = {"nll/alignment", "nll/safe" if outer == "dpo" else "random-mapping/harmful"}
    assert names[:2] == [mapped, mapped]
    assert "nll/harmful" in names[2]
    again = method.start(model)
    again.load_state_dict(along.state_dict())
    theta = Counting(network)
    again(theta, data)
    assert "nll/harmful" in theta.seen


def test_without_attacker_drift_and_mapping_it_is_sft_bit_for_bit():
    method = replace(SMALL, lam=0.0, drift="none")
    network = tiny.gpt2()
    theta, data = Theta(network), batches(method)
    got, plain = method.start(tiny.language_model(network))(theta, data), theta.grad(nll, data["alignment"])
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), plain.tensors(), strict=True))
    assert [p.where for p in method.problems(tiny.language_model())] == ["lam"]
    assert not method.mechanisms


def test_an_attacker_who_switches_trains_on_retain_data_first_for_two_thirds_on_average():
    harmful, retain = [f"h{k}" for k in range(64)], ["r0", "r1", "r2"]
    torch.manual_seed(0)
    counts = []
    for _ in range(2000):
        met = switched(harmful, retain, 1.0)
        m = sum(name.startswith("r") for name in met)
        assert met == [retain[k % 3] for k in range(m)] + harmful[m:]
        counts.append(m)
    assert sum(counts) / 2000 == pytest.approx(42.2, abs=0.6)  # 64 · 2/3 = 42.7, and rounding down takes a half
    shares = [switched(harmful, retain, 1 / 3) == harmful for _ in range(2000)]
    assert sum(shares) / 2000 == pytest.approx(2 / 3, abs=0.04)
    assert switched(harmful, [], 1.0) == harmful


@pytest.mark.parametrize(
    "settings",
    [
        {"lam": -1.0},
        {"every": 3},
        {"lookahead": 0},
        {"lrs": ()},
        {"lrs": (0.0,)},
        {"switch": 1.5},
        {"mapping_steps": -1},
    ],
    ids=str,
)
def test_contradictory_settings_are_refused(settings):
    with pytest.raises(SettingsError):
        TAR(**settings)
