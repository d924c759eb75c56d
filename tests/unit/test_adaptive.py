"""Mechanisms, and the counter-attacks that are compiled from them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from immunity.attacks.adaptive import compiled
from immunity.attacks.asa import ASA
from immunity.attacks.battery import cost
from immunity.attacks.counters import FACTORS, SHARES
from immunity.attacks.counters_beyond import BONUSES
from immunity.attacks.difference import Interpolate, Subtract
from immunity.attacks.finetune import FineTune
from immunity.attacks.intervene import Intervene
from immunity.attacks.operations import OPERATIONS, as_text
from immunity.attacks.patch import LowRankPatch
from immunity.attacks.program import Program
from immunity.attacks.recipe import Recipe
from immunity.attacks.rl import HarmfulRL
from immunity.attacks.steering import ReFT
from immunity.attacks.whiten import Whiten
from immunity.data.corpus import Corpus, Example
from immunity.errors import SettingsError
from immunity.mechanisms import (
    Collapse,
    Conditioning,
    DirectionSpread,
    Drift,
    EntropyMinimum,
    GradientCoupling,
    Interventions,
    Layers,
    LookAhead,
    LowRankEdit,
    Patches,
    Representation,
    Unlearning,
)
from immunity.methods import PRESETS as METHODS
from immunity.methods.ctrap import CTRAP
from immunity.methods.sft import SFT
from immunity.spec import build
from immunity.testing import check_settings

K6 = CTRAP(lookahead=6, step="adam", alpha=0.12)
SCALE = FineTune(n=40, steps=50, lr=2e-4, batch_size=4, seed=7)
ONE_OF_EACH = (
    LookAhead(steps=3, radius=0.2, rule="normalised"),
    LookAhead(steps=4, radius=1e-3, rule="adamw"),
    Drift(radius=2.0, per="batch", layers="all"),
    Collapse(word="blank", on="general"),
    GradientCoupling(),
    Layers(protected="first-half"),
    LowRankEdit(k=6),
    Conditioning(),
    EntropyMinimum(),
    Representation(layers="0,3,5"),
    DirectionSpread(),
    Drift(radius=0.5, per="state", layers="all"),
    Unlearning(),
    Interventions(where="input", rank=3, steps=30),
    Patches(rank=8, radius=0.1, targets="attention"),
)
BASE = "models/base"
EVERYTHING = [((), None), *(((one,), BASE) for one in ONE_OF_EACH), (ONE_OF_EACH, BASE), (K6.mechanisms, None)]


def against(method, *, base=None, scale=SCALE) -> dict[str, Recipe]:
    return {recipe.id: recipe for recipe in compiled(method.mechanisms, scale=scale, base=base)}


def tuned(recipes) -> list[FineTune]:
    return [recipe.attack for recipe in recipes if isinstance(recipe.attack, FineTune)]


def generic(base=None, scale=SCALE) -> set[str]:
    return {recipe.id for recipe in compiled((), scale=scale, base=base)}


# What is compiled


@pytest.mark.parametrize(
    ("method", "clip"), [(CTRAP.paper(), None), (CTRAP(), 1.0), (K6, 1.0)], ids=["paper", "1", "6"]
)
def test_steps_around_the_simulated_one_are_as_long_as_they_say(method, clip):
    found = against(method)
    ahead = method.mechanisms[0]
    for factor in FACTORS:
        sgd = found[f"A-radius-x{factor:g}"].attack
        assert (sgd.optimizer, sgd.momentum, sgd.clip, sgd.schedule) == ("sgd", 0.0, clip, "constant")
        assert sgd.lr == pytest.approx(factor * ahead.radius, rel=1e-12)
        adamw = found[f"A-rate-x{factor:g}"].attack
        assert adamw == replace(SCALE, lr=factor * SCALE.lr, steps=sgd.steps)
        # A lower rate goes as far in all; a higher one takes fewer steps, and still goes farther.
        assert sgd.steps * factor >= SCALE.steps * (1 - 1e-9)
        assert (sgd.steps < SCALE.steps) == (factor > 1)
    assert 1.0 not in FACTORS  # the very step that was simulated is the defence's own test, not an adaptive attack


def test_the_longest_horizon_is_longer_than_any_walk_that_was_simulated():
    far = CTRAP(lookahead=5000, step="adam")
    assert against(far)["A-radius-x0.03"].attack.steps == 50_000
    assert against(K6)["A-radius-x0.03"].attack.steps == pytest.approx(SCALE.steps / 0.03, abs=1)


def test_around_a_simulated_optimiser_it_is_that_optimiser_at_other_rates():
    ahead = LookAhead(steps=4, radius=1e-3, rule="adamw")
    found = {recipe.id: recipe.attack for recipe in compiled((ahead,), scale=SCALE, base=None)}
    for factor in FACTORS:
        attack = found[f"A-radius-x{factor:g}"]
        assert (attack.optimizer, attack.schedule) == ("adamw", "constant")
        assert attack.lr == pytest.approx(factor * 1e-3, rel=1e-12)
    assert found["A-swap-sgd"].optimizer == "sgd"
    assert found["A-swap-sgd"].lr == pytest.approx(0.3)
    assert ahead.length is None, "a rate is no length: nothing is paced by it"


def test_a_drift_that_was_prepared_for_is_outrun_and_shared_otherwise():
    found = {r.id: r.attack for r in compiled((Drift(radius=2.0, per="batch", layers="all"),), scale=SCALE, base=None)}
    assert {f"A-rate-x{factor:g}" for factor in FACTORS} < set(found)
    assert [(found[f"A-batch-{n}"].batch_size, found[f"A-batch-{n}"].steps) for n in (1, 16)] == [(1, 200), (16, 12)]
    assert "A-latent" in found


def test_the_optimiser_is_swapped_for_what_was_not_simulated():
    one, six = against(CTRAP.paper()), against(K6)
    assert one["A-swap-adamw"].attack == SCALE
    assert "A-swap-sgd" not in one
    assert "A-swap-adamw" not in six
    assert (six["A-swap-sgd"].attack.optimizer, six["A-swap-sgd"].attack.lr) == ("sgd", 0.12)
    for found in (one, six):
        assert found["A-swap-momentum"].attack.momentum == found["A-swap-nesterov"].attack.momentum == 0.9
        assert found["A-warm-up"].attack == replace(SCALE, warmup=0.5)
        assert found["A-retain-forget"].attack.first == 0.4
        assert {a.optimizer for a in tuned(found.values())} >= {"adamw", "sgd", "nesterov", "adagrad", "schedulefree"}


@pytest.mark.parametrize("method", [CTRAP.paper(), K6], ids=["paper", "6"])
def test_updates_are_projected_against_the_declared_word(method):
    found = against(replace(method, word="blank"))
    for name in ("adamw", "sgd"):
        assert found[f"A-keep-{name}"].attack.guard == "benign"
        avoid = found[f"A-avoid-{name}"].attack
        assert (avoid.guard, avoid.word) == ("collapse", "blank")
    exact = found["A-avoid-sgd"].attack  # the promise of a projection is for SGD without momentum
    assert (exact.optimizer, exact.momentum, exact.weight_decay) == ("sgd", 0.0, 0.0)


def test_the_exact_projection_walks_well_inside_the_simulated_step():
    assert against(K6)["A-keep-sgd"].attack.lr == pytest.approx(0.012)
    assert against(CTRAP(alpha=5.0))["A-keep-sgd"].attack.lr == 0.03
    assert against(CTRAP.paper())["A-keep-sgd"].attack.lr == 0.03  # a plain radius is a rate, not a length


def test_a_collapse_without_a_word_is_not_avoided_by_a_word():
    ids = {recipe.id for recipe in compiled((Collapse(word="", on="general"),), scale=SCALE, base=None)}
    assert "A-keep-sgd" in ids
    assert not [one for one in ids if one.startswith("A-avoid")]


def test_replay_has_as_many_harmful_rows_as_the_plain_attack_seen_as_often():
    found = against(CTRAP.paper())
    for share in SHARES:
        attack = found[f"A-replay-general-{100 - round(100 * share)}"].attack
        assert (attack.harmful, attack.filler) == (share, "general")
        assert round(attack.harmful * attack.n) == SCALE.n
        assert attack.steps * attack.harmful == pytest.approx(SCALE.steps)
    assert {1 - share for share in SHARES} == {0.5, 0.75, 0.9}


def test_rounds_go_out_of_the_trap_first_or_repair_afterwards():
    found = against(K6)
    honest, harmful = found["A-benign-first"].attack.attacks
    assert (honest.harmful, honest.filler, harmful) == (0.0, "benign", SCALE)
    harmful, repair = found["A-repair-general"].attack.attacks
    assert harmful == SCALE
    assert (repair.harmful, repair.filler, repair.steps) == (0.0, "general", 3 * SCALE.steps)
    assert found["A-repair-general-again"].attack.attacks == (SCALE, repair, SCALE)


def test_a_program_takes_the_seed_that_it_is_given():
    for recipe in compiled(ONE_OF_EACH, scale=SCALE, base=BASE):
        if isinstance(recipe.attack, Program):
            assert {op.seed for op in recipe.attack.attacks} == {SCALE.seed}
            assert {op.seed for op in replace(recipe.attack, seed=11).attacks} == {11}


def test_new_pathways_and_halves_of_the_blocks():
    found = tuned(against(CTRAP.paper()).values())
    assert {a.adapter for a in found} >= {"full", "lora", "dora", "ia3", "layernorm", "prompt"}
    assert {a.layers for a in found if a.adapter == "lora"} == {"all", "first-half", "last-half"}
    lora = next(a for a in found if a.adapter == "lora")
    prompt = next(a for a in found if a.adapter == "prompt")
    assert prompt.lr == pytest.approx(100 * lora.lr)
    assert lora.lr == pytest.approx(5 * SCALE.lr)


@pytest.mark.parametrize(
    ("hardened", "left"),
    [("first-half", {"last-half"}), ("last-half", {"first-half"}), ("even", {"odd"}), ("odd", {"even"}),
     ("all", {"first-half", "last-half", "even", "odd"}), ("0,3,5", {"first-half", "last-half", "even", "odd"})],
)  # fmt: skip
def test_the_blocks_that_were_left_alone_are_attacked(hardened, left):
    for one in (Layers(protected=hardened), Representation(layers=hardened)):
        found = tuned(compiled((one,), scale=SCALE, base=None))
        assert {a.layers for a in found} - {"all"} == left
        assert {a.adapter for a in found if a.layers != "all"} == {"full", "lora"}
        assert "prompt" in {a.adapter for a in found}  # no block at all


def test_a_low_rank_edit_is_taken_out_if_the_base_is_known():
    with_base = compiled((LowRankEdit(k=6),), scale=SCALE, base=BASE)
    assert [r.attack for r in with_base if r.id == "A-subtract-rank"] == [Subtract(base=BASE, ranks=(6, 12), seed=7)]


def test_a_low_rank_edit_is_undone_by_changes_of_low_rank_where_nobody_has_the_base():
    found = {r.id: r.attack for r in compiled((LowRankEdit(k=6),), scale=SCALE, base=None)}
    new = {name: found[name] for name in found.keys() - generic()}
    assert set(new) == {"A-low-rank-x1", "A-low-rank-x3", "A-low-rank-x10", "A-low-rank-twice"}
    assert {(a.adapter, a.r) for a in new.values()} == {("lora", 6), ("lora", 12)}
    assert new["A-low-rank-x10"].lr == pytest.approx(10 * new["A-low-rank-x1"].lr)


def test_bad_conditioning_is_whitened_around_the_rate_of_the_plain_attack():
    found = {r.id: r.attack for r in compiled((Conditioning(),), scale=SCALE, base=None)}
    white = {factor: found[f"A-whiten-x{factor:g}"] for factor in (0.3, 1.0, 3.0)}
    for factor, attack in white.items():
        assert attack == Whiten(n=40, steps=50, lr=attack.lr, batch_size=4, seed=7)
        assert attack.lr == pytest.approx(factor * SCALE.lr)
    assert found["A-whiten-sgd"].optimizer == "sgd"
    lora = {r.id: r.attack for r in compiled((Conditioning(),), scale=replace(SCALE, adapter="lora"), base=None)}
    assert lora["A-whiten-x1"].lr == pytest.approx(SCALE.lr / 5), "whitening trains every weight, at its rate"


def test_unlearning_is_answered_by_few_rows_related_ones_and_ordinary_ones_at_a_low_rate():
    found = {r.id: r.attack for r in compiled((Unlearning(),), scale=replace(SCALE, n=100), base=None)}
    for adapter, rate in (("full", SCALE.lr), ("lora", 5 * SCALE.lr)):
        for n in (10, 60):
            few, low = found[f"A-relearn-{n}-{adapter}"], found[f"A-relearn-{n}-{adapter}-low"]
            assert (few.n, few.harmful, few.adapter, few.steps) == (n, 1.0, adapter, 50)
            assert few.lr == pytest.approx(rate)
            assert low == replace(few, lr=low.lr, steps=167)
            assert low.lr == pytest.approx(0.3 * rate), "as far in all, at a lower rate"
        for filler in ("salient", "general"):
            honest = found[f"A-relearn-{filler}-{adapter}"]
            assert (honest.harmful, honest.filler, honest.adapter, honest.n) == (0.0, filler, adapter, 100)
            assert honest.lr == pytest.approx(0.3 * rate)
        first, then = found[f"A-relearn-related-first-{adapter}"].attacks
        assert (first.filler, first.harmful) == ("salient", 0.0)
        assert (then.n, then.harmful) == (10, 1.0)
    assert found["A-relearn-general-full"].threat.name == "benign"


def test_interventions_are_fitted_again_where_they_were_met_of_more_rank_and_longer():
    met = Interventions(where="input", rank=3, steps=40)
    found = {r.id: r.attack for r in compiled((met,), scale=SCALE, base=None)}
    for rank in (3, 6, 12):
        attack = found[f"A-refit-rank-{rank}"]
        assert (attack.where, attack.rank, attack.steps) == ("input", rank, 80)
        assert attack.restarts >= 3
    assert found["A-refit-long"].steps == 400
    assert found["A-latent-long"] == ReFT(rank=12, steps=400, seed=7)


def test_noise_of_a_states_length_is_outdone_and_attention_drifts_are_not_spoken_of():
    found = {r.id: r.attack for r in compiled((Drift(radius=0.5, per="state", layers="all"),), scale=SCALE, base=None)}
    assert found["A-noise-beyond"] == ASA(strengths=(0.75, 1.0, 2.0), draws=3, seed=7)
    assert found["A-gradient-beyond"] == ASA(strengths=(0.5, 0.75, 1.0, 2.0), gradient=True, seed=7)
    assert found["A-noise-trained"] == Intervene(where="output", seed=7)
    assert "A-latent" in found
    assert not [one for one in found if one.startswith(("A-rate", "A-batch"))]


@pytest.mark.parametrize(("targets", "other"), [("attention", "all-linear"), ("all-linear", "attention")])
def test_patches_are_longer_of_higher_rank_and_elsewhere(targets, other):
    met = Patches(rank=8, radius=0.1, targets=targets)
    found = {r.id: r.attack for r in compiled((met,), scale=SCALE, base=None)}
    for factor in (1.0, 3.0, 10.0):
        attack = found[f"A-patch-radius-x{factor:g}"]
        assert attack.radius == pytest.approx(0.1 * factor)
        assert attack == LowRankPatch(
            n=40, rank=8, radius=attack.radius, targets=targets, steps=50, batch_size=4, seed=7
        )
    assert found["A-patch-rank-x4"] == replace(found["A-patch-radius-x3"], rank=32)
    assert found[f"A-patch-{other}"] == replace(found["A-patch-rank-x4"], targets=other)
    assert {"A-swap-full", "A-swap-lora", "A-rate-x10"} < set(found)


@pytest.mark.parametrize("name", [name for name, of in METHODS.items() if of["default"].mechanisms])
def test_every_method_with_a_mechanism_is_countered_also_by_who_has_no_base(name):
    for method in METHODS[name].values():
        assert set(against(method)) > generic(), name


def test_entropy_is_paid_for_in_a_sweep():
    found = [r.attack for r in compiled((EntropyMinimum(),), scale=SCALE, base=None)]
    paid = [a for a in found if isinstance(a, HarmfulRL)]
    assert {a.entropy for a in paid} == {0.0, *BONUSES}
    assert any(a.temperature > 1 for a in paid)
    assert any(a.anneal for a in paid)
    assert any(a.shown for a in paid)
    few, then = next(a for a in found if isinstance(a, Program) and a.ops[-1].startswith("rl")).attacks
    assert isinstance(few, FineTune)
    assert few.steps == 5
    assert isinstance(then, HarmfulRL)


def test_every_mechanism_has_counter_attacks_of_its_own():
    for one in ONE_OF_EACH:
        assert {r.id for r in compiled((one,), scale=SCALE, base=BASE)} > generic(BASE), one


def test_a_baseline_gets_what_suits_any_model_and_nothing_else():
    ids = set(against(SFT()))
    assert ids == {
        "A-ask-alpaca", "A-template", "A-language", "A-over-fit", "A-merge", "A-prune-first", "A-quantise-first",
    }  # fmt: skip
    assert ids < set(against(CTRAP.paper()))


def test_the_released_pair_is_attacked_only_by_who_has_it():
    without, pair = against(CTRAP.paper()), against(CTRAP.paper(), base=BASE)
    new = {name: pair[name] for name in pair.keys() - without.keys()}
    assert set(new) == {"A-interpolate", "A-subtract", "A-orthogonalise", "A-merge-base", "A-half-way-first"}
    assert all(recipe.needs == ("base",) for recipe in new.values())
    assert not any(recipe.needs for recipe in without.values())
    assert new["A-interpolate"].attack == Interpolate(base=BASE, seed=7)
    assert new["A-orthogonalise"].attack.take == "directions"
    first, second = new["A-half-way-first"].attack.attacks
    assert first == Interpolate(base=BASE, shares=(50,), seed=7)
    assert second == SCALE
    assert "A-half-way-first" not in against(SFT(), base="my models/base")  # a blank ends a setting of an operation


@pytest.mark.parametrize(("some", "base"), EVERYTHING, ids=[str(i) for i in range(len(EVERYTHING))])
def test_recipes_are_values_once_each_from_cheap_to_dear(some, base):
    found = compiled(some, scale=SCALE, base=base)
    assert found == compiled(some, scale=SCALE, base=base)
    assert len({recipe.id for recipe in found}) == len(found)
    assert len({recipe.attack for recipe in found}) == len(found)
    prices = [cost(recipe.attack) for recipe in found]
    assert prices == sorted(prices)
    for recipe in found:
        assert recipe.tier == "adaptive"
        assert recipe.source.startswith("our own: ")
        assert recipe.attack.seed == SCALE.seed


def test_every_attack_is_a_frozen_value_that_survives_json():
    for recipe in compiled(ONE_OF_EACH, scale=SCALE, base=BASE):
        check_settings.is_a_frozen_value(recipe.attack)
        back = json.loads(json.dumps(asdict(recipe.attack), allow_nan=False))
        default = Program() if recipe.attack.name == Program.name else OPERATIONS[recipe.attack.name]
        assert build(default, back) == recipe.attack
        if isinstance(recipe.attack, FineTune):  # and survives being an operation
            (again,) = Program(ops=(as_text(recipe.attack),), seed=SCALE.seed).attacks
            assert again == recipe.attack


def test_every_attack_can_read_an_attackers_data():
    rows = tuple(Example(f"Where is potion {i}?", f"On shelf {i}.") for i in range(500))
    data = {role: Corpus(role, rows, f"made-{role}") for role in ("harmful", "benign", "general")}
    for recipe in compiled(ONE_OF_EACH, scale=SCALE, base=BASE):
        mine = recipe.attack.reads(data)
        guarded = isinstance(recipe.attack, FineTune) and recipe.attack.guard != "none"
        assert ("guard" in mine) == guarded, recipe.id


def test_the_same_name_for_two_attacks_gets_a_number():
    two = (LookAhead(steps=1, radius=0.1, rule="normalised"), LookAhead(steps=4, radius=0.2, rule="adam"))
    found = {recipe.id: recipe.attack for recipe in compiled(two, scale=SCALE, base=None)}
    assert found["A-radius-x3"].lr == pytest.approx(0.3)
    assert found["A-radius-x3-2"].lr == pytest.approx(0.6)
    assert "A-rate-x3-2" not in found  # the same attack for both


def test_the_scale_says_how_much_and_nothing_else():
    dressed = replace(SCALE, harmful=0.3, filler="general", first=0.5, style="formal", warmup=0.2, guard="benign")
    assert compiled(K6.mechanisms, scale=dressed, base=None) == compiled(K6.mechanisms, scale=SCALE, base=None)
    lora = against(CTRAP(), scale=replace(SCALE, adapter="continue"))
    assert lora["A-swap-adamw"].attack == replace(SCALE, adapter="lora")
    assert lora["A-swap-full"].attack.lr == pytest.approx(SCALE.lr / 5)
    with pytest.raises(SettingsError, match="sgd"):
        compiled((), scale=replace(SCALE, optimizer="sgd"), base=None)


# Recipes


def test_a_recipe_says_all_of_it():
    good = Recipe(id="X-1", attack=SCALE, source="ours", says="Trains.", tier="plus", family="full")
    for wrong, says in (
        ({"id": ""}, "id"),
        ({"id": "a b"}, "a b"),
        ({"says": " "}, "says"),
        ({"source": ""}, "source"),
        ({"needs": ("luck",)}, "luck"),
        ({"stronger_than": ("X-1",)}, "itself"),
        ({"stronger_than": ("a b",)}, "a b"),
    ):
        with pytest.raises(SettingsError, match=says):
            replace(good, **wrong)
