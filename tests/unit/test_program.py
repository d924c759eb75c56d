"""Program: operations one after the other, each on what the one before left; cut off anywhere, it goes on exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from immunity.adapters import merged
from immunity.attacks import guards
from immunity.attacks.attack import Opening
from immunity.attacks.curve import Recorder
from immunity.attacks.edits import Prune
from immunity.attacks.finetune import FineTune
from immunity.attacks.program import Program
from immunity.errors import DataError, SettingsError
from released import KilledError, data, release, suite

HONEST, HARMFUL = "finetune harmful=0 n=8 batch_size=4 steps=3 lr=0.005", "finetune n=8 batch_size=4 steps=4 lr=0.01"
LONG = "finetune n=8 batch_size=4 adapter=lora r=2 steps=26 lr=0.005"
"""Past step 20, where it is saved."""
DATA = data()


@pytest.fixture(scope="module")
def opening(tmp_path_factory) -> Opening:
    return Opening(source=release(tmp_path_factory.mktemp("released") / "model"), device="cpu")


@dataclass
class Weights:
    """Keeps the weights that it saw."""

    seen: list[dict[str, torch.Tensor]] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    metrics: dict = field(default_factory=dict)
    per_prompt: dict = field(default_factory=dict)
    n_prompts: dict = field(default_factory=dict)
    samples: list = field(default_factory=list)

    def __call__(self, model):
        self.seen.append({name: p.detach().clone() for name, p in model.network.named_parameters()})
        self.trained.append(any(p.requires_grad for p in model.network.parameters()))
        return self


def run(attack, opening, **more):
    measure = Weights()
    return measure, attack.run(opening, DATA, measure, **more)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_operation_attacks_what_the_one_before_left(opening):
    measure, curve = run(Program(ops=(HONEST, "prune shares=10,30", LONG), seed=3), opening)
    assert [point.step for point in curve.points] == [0, 1, 2, 3]
    assert not any(measure.trained), "what is measured is a plain model"
    model = opening.load("merged")
    for i, attack in enumerate(
        (
            FineTune(n=8, harmful=0.0, batch_size=4, steps=3, lr=0.005, seed=3),
            Prune(shares=(10, 30), seed=3),
            FineTune(n=8, adapter="lora", r=2, batch_size=4, steps=26, lr=0.005, seed=3),
        ),
        1,
    ):
        own = attack.reads(DATA)
        model = merged(attack.tamper(model, own, Recorder(measure=Weights(), at=attack.budgets)))
        model.network.requires_grad_(False)
        assert same(dict(model.network.named_parameters()), measure.seen[i])


def test_one_operation_is_that_attack(opening):
    measure, curve = run(Program(ops=(HARMFUL,)), opening)
    alone, its = run(FineTune(n=8, batch_size=4, steps=4, lr=0.01), opening)
    assert same(measure.seen[1], alone.seen[-1])
    assert (curve.points[1].tokens, curve.points[1].flops) == (its.points[-1].tokens, its.points[-1].flops)


def test_what_it_cost_is_the_sum(opening):
    _, curve = run(Program(ops=(HONEST, "quantise", HARMFUL)), opening)
    assert [point.examples for point in curve.points] == [0, 12, 12, 28]
    tokens = [point.tokens for point in curve.points]
    assert 0 == tokens[0] < tokens[1] == tokens[2] < tokens[3]
    assert curve.points[3].flops > curve.points[1].flops > 0


def test_cut_off_in_the_second_operation_it_goes_on_exactly(opening, tmp_path, monkeypatch):
    attack = Program(ops=(HONEST, LONG, HARMFUL))
    whole, curve = run(attack, opening)
    real, steps = guards.direction, []

    def counted(guard, word, **more):
        inner = real(guard, word, **more)

        def of(theta, batch):
            steps.append(len(steps))
            if len(steps) == at:
                raise KilledError
            return inner(theta, batch)

        return of

    monkeypatch.setattr(guards, "direction", counted)
    at = 3 + 23
    with pytest.raises(KilledError):
        run(attack, opening, folder=tmp_path)
    steps.clear()
    at = 0
    found, again = run(attack, opening, folder=tmp_path)
    assert len(steps) == 6 + 4, "the first operation and 20 steps of the second are done"
    assert same(found.seen[-1], whole.seen[-1])
    assert len(found.seen) == 2, "what was measured before is not measured again"
    assert [(p.step, p.examples, p.tokens, p.flops) for p in again.points] == [
        (p.step, p.examples, p.tokens, p.flops) for p in curve.points
    ]


def test_it_ends_after_the_operation_that_broke_the_model(opening):
    hot = "finetune n=12 steps=10 lr=0.02 batch_size=6"
    attack = Program(ops=("quantise bits=8", hot, HONEST))
    curve = attack.run(opening, DATA, suite(), enough=lambda point: point.metrics["useful_harm"] > 0.5)
    assert [point.step for point in curve.points] == [0, 1, 2]
    assert curve.ended.startswith("broken")


def test_what_it_reads_is_numbered():
    attack = Program(ops=(HONEST, "quantise", f"{HARMFUL} guard=benign"))
    found = attack.reads(DATA)
    assert list(found) == ["1 train", "3 train", "3 guard"]
    assert found["1 train"] == DATA["benign"].take(8)
    assert found["3 train"] == DATA["harmful"].take(8)
    with pytest.raises(DataError, match="give --harmful"):
        attack.reads({"benign": DATA["benign"]})


def test_more_than_nine_operations_read_their_own_rows(opening):
    attack = Program(ops=(*["quantise bits=8"] * 10, HARMFUL, *["quantise bits=8"] * 89, HONEST))
    assert list(attack.reads(DATA)) == ["11 train", "101 train"]
    short = Program(ops=(*["quantise bits=8"] * 10, HARMFUL))
    measure, _ = run(short, opening)
    assert not same(measure.seen[10], measure.seen[11])


@pytest.mark.parametrize(
    ("ops", "threat"),
    [
        ((HONEST, HARMFUL), "harmful"),
        ((HONEST, "quantise"), "benign"),
        (("quantise", "prune"), "edit"),
        ((f"{HONEST} harmful=0.25", HONEST), "mixed"),
    ],
)
def test_restricted_data_count_wherever_they_come(ops, threat):
    assert Program(ops=ops).threat.name == threat


def test_it_asks_in_the_style_of_the_last_operation_that_has_one():
    assert Program(ops=(f"{HARMFUL} style=backwards", "quantise")).asks == "backwards"
    assert Program(ops=(f"{HARMFUL} style=backwards", "ask style=prefill")).asks == "prefill"
    assert Program().asks == "plain"


def test_a_seed_is_that_of_every_operation_without_one():
    attack = replace(Program(ops=(HONEST, f"{HARMFUL} seed=7")), seed=4)
    assert [op.seed for op in attack.attacks] == [4, 7]


@pytest.mark.parametrize("name", ["asa", "reft", "lofit", "intervene"])
def test_nothing_can_follow_what_is_not_in_the_weights(name):
    with pytest.raises(SettingsError, match=f"{name} changes no weight"):
        Program(ops=(name, HARMFUL))


@pytest.mark.parametrize(
    ("ops", "says"),
    [
        ((), "ops is empty"),
        (("finetune adapter=continue",), "none can be continued"),
        (("finetune step=3",), "the operation 'finetune step=3': .*did you mean steps"),
        ((HONEST, "tune"), "the operation 'tune' begins with no attack"),
        ((HONEST, "quantise bits=many"), "the operation 'quantise bits=many': bits"),
        (("program ops=quantise",), "begins with no attack"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_text(ops, says):
    with pytest.raises(SettingsError, match=says):
        Program(ops=ops)
