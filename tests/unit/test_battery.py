"""Batteries: what is frozen stays frozen, every recipe can be run on the stand-ins, and no recipe gets stronger."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.attacks import battery
from immunity.attacks.asa import ASA
from immunity.attacks.ask import Ask
from immunity.attacks.battery import BATTERIES, bound, cascade, cost, lacking
from immunity.attacks.finetune import FineTune
from immunity.attacks.merge import Merge
from immunity.attacks.operations import OPERATIONS, as_text, operation
from immunity.attacks.program import Program
from immunity.attacks.recipe import Recipe
from immunity.attacks.rl import HarmfulRL
from immunity.attacks.source import both
from immunity.attacks.steering import LoFiT
from immunity.bench import standins
from immunity.data import synthetic
from immunity.errors import DataError, SettingsError
from immunity.optimizers import OPTIMIZERS
from released import corpus, data

DIGESTS = {
    1: {"smoke": "679673c6d79d", "standard": "23daf3eaf6bd", "plus": "0c12c55e7a8b"},
    2: {"smoke": "679673c6d79d", "standard": "23daf3eaf6bd", "plus": "abba762d89b8"},
}
"""Version -> what its batteries were. Numbers of one version are compared for years: never edit a row."""
DOMAINS = sorted(synthetic.DOMAINS)


def recipe(attack, name="X") -> Recipe:
    return Recipe(id=name, attack=attack, source="ours", says="For a test.", tier="plus", family="full")


def fitted(attack, most_steps=None, **rows):
    (one,) = bound((recipe(attack),), data(**rows), most_steps=most_steps)
    return one.attack


# What is frozen


def test_a_battery_is_what_its_version_says():
    found = {name: one.digest for name, one in BATTERIES.items()}
    frozen = DIGESTS.get(battery.VERSION)
    assert found == frozen, (
        f"the batteries are not those of version {battery.VERSION}. If that is meant: raise battery.VERSION, add here "
        f"{{{battery.VERSION + 1}: {found}}}, and say so in CHANGELOG.md under 'Numbers changed'. Old rows stay"
    )
    assert max(DIGESTS) == battery.VERSION


def test_a_digest_sees_every_setting():
    one = BATTERIES["smoke"]
    digests = {one.digest, replace(one, recipes=one.recipes[1:]).digest, replace(one, recipes=one.recipes[::-1]).digest}
    for i, row in enumerate(one.recipes):
        changed = replace(row, attack=replace(row.attack, seed=99))
        digests.add(replace(one, recipes=(*one.recipes[:i], changed, *one.recipes[i + 1 :])).digest)
    assert len(digests) == 3 + len(one.recipes)
    assert replace(one, says="other words").digest == one.digest


def test_every_id_is_one_attack_and_every_attack_has_one_id():
    rows = BATTERIES["plus"].recipes
    assert len({row.id for row in rows}) == len(rows)
    assert len({row.attack for row in rows}) == len(rows)
    ids = {row.id for row in rows}
    assert {other for row in rows for other in row.stronger_than} <= ids


def test_each_battery_holds_the_one_before_it():
    smoke, standard, plus = (set(BATTERIES[name].recipes) for name in ("smoke", "standard", "plus"))
    assert smoke < standard < plus
    for name, one in BATTERIES.items():
        assert one.name == name
        assert {row.tier for row in one.recipes} <= {"smoke", "standard", "plus"}
    assert {row.tier for row in smoke} == {"smoke"}
    assert {row.tier for row in standard - smoke} == {"standard"}
    assert {row.tier for row in plus - standard} == {"plus"}


def test_no_battery_of_that_name():
    assert battery.battery("smoke") is BATTERIES["smoke"]
    with pytest.raises(SettingsError, match="did you mean standard"):
        battery.battery("standards")


def test_both_are_the_same_but_for_what_is_trained():
    full, lora = both(recipe(FineTune(n=7, lr=3e-5)))
    assert (full.id, lora.id, lora.family) == ("X-full", "X-lora", "lora")
    assert replace(lora.attack, adapter="full", r=full.attack.r) == full.attack
    with pytest.raises(SettingsError, match="trains nothing"):
        both(recipe(Ask(style="prefill")))


# From cheap to dear


@pytest.mark.parametrize("name", BATTERIES)
def test_from_cheap_to_dear(name):
    prices = [cost(row.attack) for row in BATTERIES[name].recipes]
    assert prices == sorted(prices)
    assert all(price > 0 for price in prices)


def test_a_cascade_keeps_the_order_of_what_costs_the_same():
    tune = FineTune(steps=4, batch_size=8)
    rows = [
        recipe(attack, str(i))
        for i, attack in enumerate(
            [replace(tune, guard="benign"), tune, Ask(style="prefill"), replace(tune, lr=1e-5), Ask(template="alpaca")]
        )
    ]
    assert [row.id for row in cascade(rows)] == ["2", "4", "1", "3", "0"]


def test_costs():
    tune = FineTune(steps=4, batch_size=8)
    assert cost(tune) == 32
    assert cost(replace(tune, guard="benign")) == 64
    assert cost(Program(ops=("finetune steps=4 batch_size=8", "quantise"))) == 42
    assert cost(Merge(steps=3, batch_size=5)) == 15
    assert cost(HarmfulRL(steps=2, batch_size=3, group=4)) == 96
    assert cost(Ask(style="prefill")) < cost(ASA()) < cost(tune)


# Bound to data


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_recipe_can_be_run_on_the_stand_ins(domain):
    theirs = standins.attacker(domain)
    for row in bound(BATTERIES["plus"].recipes, theirs):
        assert lacking(row, theirs) == "", row.id
        row.attack.reads(theirs)
        if isinstance(row.attack, HarmfulRL):
            assert row.attack.reward == "exact"


@pytest.mark.parametrize("most_steps", [None, 3])
def test_nothing_gets_more_examples_or_steps_and_nothing_else_changes(most_steps):
    rows = BATTERIES["plus"].recipes
    found = bound(rows, standins.attacker("umbra"), most_steps=most_steps)
    assert [row.id for row in found] == [row.id for row in rows]
    for before, after in zip(rows, found, strict=True):
        assert replace(after, attack=before.attack) == before
        assert type(after.attack) is type(before.attack)
        pairs = [(before.attack, after.attack)]
        if isinstance(before.attack, Program):
            pairs = list(zip(before.attack.attacks, after.attack.attacks, strict=True))
        for mine, its in pairs:
            old, new = asdict(mine), asdict(its)
            changed = {key for key in old if old[key] != new[key]}
            assert changed <= {"n", "steps", "scale_steps", "reward"}, before.id
            for key in changed - {"reward"}:
                assert new[key] < old[key], before.id
            if most_steps is not None:
                assert all(new[key] <= most_steps for key in ("steps", "scale_steps") if key in new), before.id
            elif "steps" in changed:
                pytest.fail(f"{before.id}: steps stay unless they are capped")


@given(
    harmful=st.floats(0, 1),
    n=st.integers(1, 60),
    first=st.sampled_from([0.0, 0.4]),
    filler=st.sampled_from(["benign", "general"]),
    rows=st.tuples(*[st.integers(1, 9)] * 3),
)
def test_what_is_bound_can_be_read_or_says_why_not(harmful, n, first, filler, rows):
    try:
        attack = FineTune(n=n, harmful=harmful, first=first, filler=filler)
    except SettingsError:
        return
    sizes = dict(zip(("harmful", "benign", "general"), rows, strict=True))
    found = fitted(attack, **sizes)
    assert found.n <= n
    if lacking(recipe(found), data(**sizes)):
        few = min(sizes["harmful"] / harmful if harmful else n, sizes[filler] / (1 - harmful) if harmful < 1 else n)
        assert round(harmful * int(few)) in {0, int(few)}, "it could have been mixed from fewer"
    else:
        assert {len(corpus) for role, corpus in found.reads(data(**sizes)).items() if role == "train"} == {found.n}


def test_as_many_examples_as_both_shares_allow():
    assert fitted(FineTune(n=1000, harmful=0.1)).n == 13  # 12 honest rows are nine tenths of 13
    assert fitted(FineTune(n=1000), harmful=7).n == 7
    assert fitted(FineTune(n=5), harmful=7).n == 5
    assert fitted(FineTune(n=1000, first=0.4), harmful=9, benign=4).n == 4
    assert fitted(FineTune(n=1000, harmful=0.0, filler="salient"), benign=6).n == 6
    assert fitted(HarmfulRL(n=64), harmful=9) == HarmfulRL(n=9, reward="exact")
    assert fitted(Merge(n=50), benign=8) == Merge(n=8)
    assert fitted(LoFiT(), most_steps=3) == LoFiT(steps=3, scale_steps=3)
    program = fitted(Program(ops=("finetune harmful=0 n=50", "finetune n=50")), most_steps=4, benign=5)
    assert [(op.n, op.steps) for op in program.attacks] == [(5, 4), (12, 4)]


def test_too_few_rows_for_a_mix_skip_it_and_not_the_battery():
    attack = FineTune(n=1000, harmful=0.1)
    (found,) = bound((recipe(attack),), data(benign=3))
    assert "asked for 100 examples of the role 'harmful', it has 12" in lacking(found, data(benign=3))


def test_real_prompts_are_not_rewarded_by_a_key():
    theirs = {**data(), "harmful": corpus("harmful", name="theirs.jsonl")}
    (found,) = bound((recipe(HarmfulRL(n=4)),), theirs)
    assert found.attack.reward == "overlap"


def test_nothing_can_be_run_without_restricted_rows():
    with pytest.raises(DataError, match="give --harmful"):
        bound(BATTERIES["smoke"].recipes, {"benign": corpus("benign")})


def test_what_is_missing_is_said():
    (found,) = bound((recipe(FineTune(n=4, harmful=0.0)),), {"harmful": corpus("harmful")})
    assert "give --benign" in lacking(found, {"harmful": corpus("harmful")})


# Attacks as lines of text


@pytest.mark.parametrize("row", BATTERIES["plus"].recipes, ids=lambda row: row.id)
def test_every_attack_is_a_line_of_text(row):
    for attack in row.attack.attacks if isinstance(row.attack, Program) else (row.attack,):
        assert operation(as_text(attack), attack.seed) == attack


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_name_alone_is_the_default(name):
    assert as_text(OPERATIONS[name]) == name
    assert operation(name, 1) == OPERATIONS[name]
    assert operation(name, 5) == replace(OPERATIONS[name], seed=5)
    assert operation(f"{name} seed=4", 5) == replace(OPERATIONS[name], seed=4)


SETTINGS = {
    "n": st.integers(1, 5000),
    "harmful": st.sampled_from([0.0, 1.0]),
    "filler": st.sampled_from(["benign", "general", "identity", "salient"]),
    "first": st.floats(0, 1, exclude_max=True),
    "style": st.sampled_from(["plain", "opener", "backwards"]),
    "adapter": st.sampled_from(["full", "lora", "ia3", "prompt"]),
    "r": st.integers(1, 256),
    "layers": st.sampled_from(["all", "first-half", "0,3,5", "2"]),
    "steps": st.integers(1, 9999),
    "lr": st.floats(1e-12, 10),
    "batch_size": st.integers(1, 64),
    "weight_decay": st.floats(0, 1),
    "schedule": st.sampled_from(["constant", "linear", "cosine", "sgdr"]),
    "warmup": st.floats(0, 1, exclude_max=True),
    "clip": st.none() | st.floats(1e-3, 1e3),
    "guard": st.sampled_from(["none", "benign", "collapse"]),
    "word": st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=9),
    "template": st.sampled_from(["auto", "alpaca", "chatml"]),
    "seed": st.integers(0, 99),
    "micro_batch": st.none() | st.integers(1, 8),
    "autocast": st.sampled_from(["no", "bf16"]),
}


@given(
    st.fixed_dictionaries({}, optional=SETTINGS),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.floats(0.1, 0.99),
)
def test_every_fine_tune_is_a_line_of_text(settings, optimizer, momentum):
    attack = FineTune(**settings, optimizer=optimizer, momentum=momentum if optimizer in {"sgd", "nesterov"} else 0.0)
    line = as_text(attack)
    assert "\n" not in line
    assert operation(line, attack.seed) == attack
    if ";" not in line:  # what parts operations on the command line
        assert Program(ops=(line,), seed=attack.seed).attacks == (attack,)


def test_a_blank_would_end_a_value():
    with pytest.raises(SettingsError, match="word = 'two words'"):
        as_text(FineTune(word="two words"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("finetun steps=3", "'finetun steps=3' begins with no attack; did you mean finetune"),
        ("", "'' begins with no attack"),
        ("finetune step=3", "'finetune step=3': FineTune has no setting 'step'"),
        ("finetune steps=many", "'finetune steps=many': steps: "),
        ("finetune steps=0", "steps = 0 is out of range"),
        ("finetune steps", "'finetune steps': .*NAME=VALUE"),
    ],
)
def test_an_error_names_the_operation(text, says):
    with pytest.raises(SettingsError, match=says):
        operation(text, 1)
