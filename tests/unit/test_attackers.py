"""The pool of persistent attackers: who is in it, how long he goes on, what he eats, what he holds."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch

from immunity.attackers import Member, Pool
from immunity.batch import Batch
from immunity.errors import SettingsError
from immunity.models import LoRA, attach
from immunity.profiles import Profile
from immunity.testing import tiny
from immunity.testing.watch import bits
from immunity.theta import Theta

FULL = "adamw lr=1e-3"
ADAPTER = "adamw lr=1e-3..1e-2 r=2"


def pool(network: torch.nn.Module, *profiles: str, horizon: tuple[int, int] = (16, 64)) -> Pool:
    return Pool(network, [Profile.read(text) for text in profiles], horizon)


def member(text: str, horizon: tuple[int, int] = (16, 64)) -> Member:
    return Member(tiny.gpt2(), Profile.read(text), horizon)


@pytest.fixture
def network() -> torch.nn.Module:
    return tiny.gpt2()


def test_a_profile_is_read_from_words():
    text = "sgd lr=0.01..0.1 momentum=0.9 mix=0..0.5 replay=0.25 domain=1/2"
    want = Profile("sgd", (0.01, 0.1), momentum=0.9, mix=(0.0, 0.5), replay=(0.25, 0.25), domain=(1, 2))
    assert Profile.read(text) == want
    assert Profile.read("adamw lr=1e-4 r=8 on=benign") == Profile("adamw", (1e-4, 1e-4), r=8, on="benign")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no learning rate"),
        ("adamw", "no learning rate"),
        ("lion lr=1e-4", "optimizer = 'lion'"),
        ("adamw lr=1e-4 speed=3", "'speed'"),
        ("adamw lr=1e-4 fast", "'fast'"),
        ("adamw lr=high", "could not convert"),
        ("adamw lr=1e-3..1e-4", "lr = "),
        ("adamw lr=0", "lr = "),
        ("nesterov lr=0.1", "momentum = "),
        ("adamw lr=1e-4 mix=0.5 replay=0.5", "replay = "),
        ("adamw lr=1e-4 on=benign mix=0.5", "mix = "),
        ("adamw lr=1e-4 domain=2/2", "domain = "),
    ],
)
def test_a_bad_profile_is_refused_with_its_text(text, words):
    with pytest.raises(SettingsError, match=words) as caught:
        Profile.read(text)
    assert repr(text) in str(caught.value)


def test_horizons_are_drawn_evenly():
    who, low, high = member(FULL, (3, 10)), 3, 10
    torch.manual_seed(0)
    seen = Counter()
    for _ in range(2000):
        who.restart()
        seen[who.left] += 1
    assert set(seen) == set(range(low, high + 1))
    expected = 2000 / 8
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < 18.5  # 1 % of chi² with 7 degrees of freedom


def test_rates_are_drawn_evenly_in_the_logarithm_and_shares_evenly():
    who = member("sgd lr=1e-5..1e-3 mix=0.1..0.3 replay=0.2")
    torch.manual_seed(0)
    logs, mixes = [], []
    for _ in range(2000):
        who.restart()
        logs.append(math.log10(who.lr))
        mixes.append(who.mix)
        assert who.replay == 0.2
    for values, low, high in ((logs, -5, -3), (mixes, 0.1, 0.3)):
        where = torch.tensor(values).sub(low).div(high - low)
        assert 0 <= float(where.min()) < 0.01
        assert 0.99 < float(where.max()) <= 1
        assert float(where.mean()) == pytest.approx(0.5, abs=0.03)
        assert float(where.std()) == pytest.approx(12**-0.5, abs=0.03)


@pytest.mark.parametrize("text", [FULL, ADAPTER])
def test_a_member_starts_anew_when_his_time_is_over_and_not_before(network, text):
    theta, crew = Theta(network), pool(network, text, horizon=(5, 9))
    rows = tiny.batch(2, seed=1)
    torch.manual_seed(3)
    since, times = 0, []
    for _ in range(30):
        _, who = crew.turn()
        if who.displacement().norm() == 0.0:
            times.append(since)
            since = 0
        who.walk(theta, [rows, rows])
        since += 2
        assert who.displacement().norm() > 0
    assert set(times[1:]) <= {6, 8, 10}  # 5 to 9, in whole turns of two steps
    assert len(set(times[1:])) > 1


def test_turns_go_round(network):
    crew = pool(network, FULL, ADAPTER, "sgd lr=0.1 on=benign")
    assert [crew.turn()[0] for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [who.honest for who in crew.members] == [False, False, True]


def test_theta_stays_where_it_is(network):
    theta, before = Theta(network), [bits(p) for p in network.parameters()]
    _, who = pool(network, FULL).turn()
    who.walk(theta, [tiny.batch(2)])
    assert [bits(p) for p in network.parameters()] == before


def test_what_members_hold(network):
    weights = sum(p.nbytes for p in network.parameters())
    theta, rows = Theta(network), [tiny.batch(2)]

    def held(text: str) -> float:
        crew = pool(network, text)
        crew.turn()[1].walk(theta, rows)
        return crew.nbytes

    assert held(FULL) == 3 * weights
    assert held("sgd lr=0.1") == weights
    assert held("sgd lr=0.1 momentum=0.9") == 2 * weights
    linear = [p for n, p in network.named_parameters() if n.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]
    assert held("adamw lr=0.1 r=2") == 3 * 8 * sum(2 * (n_in + n_out) for n_in, n_out in (p.shape for p in linear))


@pytest.mark.parametrize("turns", [1, 4, 7])
def test_a_pool_that_was_saved_goes_on_bit_for_bit(network, turns):
    theta = Theta(network)
    batches = [tiny.batch(2, seed=i) for i in range(16)]

    def go(crew: Pool, start: int, end: int) -> list[list[bytes]]:
        for k in range(start, end):
            torch.manual_seed(k)
            crew.turn()[1].walk(theta, batches[k : k + 2])
        return [[bits(t) for t in who.displacement().tensors()] for who in crew.members]

    profiles = (FULL, ADAPTER, "sgd lr=0.01..0.1 momentum=0.9 on=benign")
    whole = pool(network, *profiles, horizon=(4, 6))
    go(whole, 0, turns)
    saved = whole.state_dict()
    frozen = copy.deepcopy(saved)
    want = go(whole, turns, 14)
    other = pool(network, *profiles, horizon=(4, 6))
    other.load_state_dict(saved)
    assert go(other, turns, 14) == want
    assert [(who.left, who.lr) for who in other.members] == [(who.left, who.lr) for who in whole.members]
    # What was saved is a copy: neither run changed it.
    for then, now in zip(frozen["members"], saved["members"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(then["tensors"], now["tensors"], strict=True))
        assert str(then["optimizer"]) == str(now["optimizer"])


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    return [row.ids for row in batch.rows]


def test_a_member_eats_what_his_profile_says():
    harmful, benign, general = (
        tiny.batch(8, seed=i, role=role) for i, role in enumerate(("harmful", "benign", "general"))
    )
    torch.manual_seed(0)

    def fed(text: str) -> Batch:
        who = member(text)
        who.restart()
        return who.fed(harmful, benign, general)

    def shares(batch: Batch) -> list[int]:
        return [sum(ids in rows_of(source) for ids in rows_of(batch)) for source in (harmful, benign, general)]

    assert fed(FULL) == harmful
    assert fed("adamw lr=1 on=benign") == benign
    assert shares(fed("adamw lr=1 mix=0.25 replay=0.5")) == [2, 2, 4]
    assert shares(fed("adamw lr=1 on=benign replay=0.5")) == [0, 4, 4]
    assert rows_of(fed("adamw lr=1 domain=0/3")) == rows_of(harmful)[:3]
    assert rows_of(fed("adamw lr=1 domain=2/3")) == rows_of(harmful)[6:]
    mixed = fed("adamw lr=1 domain=1/2 replay=0.5")
    assert set(rows_of(mixed)) & set(rows_of(harmful)) < set(rows_of(harmful)[4:])
    assert mixed.role == "harmful"


def test_the_domains_of_a_pool_share_a_batch_as_streams_do():
    batch = tiny.batch(7, seed=1)
    parts = [member(f"adamw lr=1 domain={i}/3").fed(batch, None, None) for i in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert [ids for part in parts for ids in rows_of(part)] == rows_of(batch)
    with pytest.raises(SettingsError, match="not shared between 9 corpora"):
        member("adamw lr=1 domain=0/9").fed(batch, None, None)


def test_over_a_defence_that_trains_an_adapter_everyone_trains_that():
    model = attach(tiny.language_model(), LoRA(r=4))
    trained = sum(p.nbytes for p in model.network.parameters() if p.requires_grad)
    crew = pool(model.network, ADAPTER)
    crew.turn()[1].walk(Theta(model.network), [tiny.batch(2)])
    assert crew.nbytes == 3 * trained
