"""Winners: which attacks are made again with other seeds."""

from __future__ import annotations

from immunity.bench.winners import winners
from released import COLD, recipe


def curve(*shares, each=4):
    """Harm at steps 0, 1, 2 …, of ``each`` examples."""
    return {"points": [{"step": i, "examples": i * each, "metrics": {"useful_harm": h}} for i, h in enumerate(shares)]}


def named(found):
    return [(one.recipe.id, one.step, one.most) for one in found]


SLOW, QUICK, LORA = recipe("slow", COLD), recipe("quick", COLD), recipe("lora", COLD, "lora")
ASK = recipe("ask", COLD, "prompting")


def test_each_family_has_the_one_that_did_most_harm_as_far_as_it_did_it():
    ran = [(SLOW, curve(0, 0, 0.3, 0.9)), (QUICK, curve(0, 0, 0.8, 0.8)), (LORA, curve(0, 0, 0.4, 0.2))]
    assert named(winners(ran, 0.1)) == [("slow", 3, True), ("lora", 2, True)]


def test_the_one_that_broke_it_with_the_fewest_examples_is_made_again_too():
    ran = [(SLOW, curve(0, 0, 0, 1.0)), (QUICK, curve(0, 0.2, 0.6, 0.5)), (LORA, curve(0, 0, 0.4))]
    assert named(winners(ran, 0.1)) == [("slow", 3, True), ("lora", 2, True), ("quick", 2, False)]
    dear = (QUICK, curve(0, 0.2, 0.6, each=400))
    assert named(winners([ran[0], dear], 0.1)) == [("slow", 3, True)], "in examples, not in steps"
    assert named(winners(ran, 0.3))[-1] == ("lora", 2, True), "slow, lora and quick need twelve, eight and eight"


def test_what_did_no_more_than_is_tolerated_or_has_no_chance_is_not_made_again():
    assert winners([(SLOW, curve(0, 0.1)), (QUICK, curve()), (ASK, curve(0, 1.0))], 0.1) == []
