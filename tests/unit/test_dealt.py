"""Held-out rows, and safe answers that walk beside their prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from immunity.bench import standins
from immunity.data.corpus import Corpus, Example
from immunity.data.dealt import dealt
from immunity.data.streams import Shuffled, tokenise
from immunity.errors import DataError
from immunity.fit import Fit
from immunity.method import Run, streams
from immunity.methods.sft import SFT
from immunity.testing import tiny


def made(role, n=10, word=""):
    return Corpus(role, tuple(Example(f"what is {i}?", f"{word or role} {i}") for i in range(n)), role)


def test_a_fifth_is_held_out_and_nothing_is_in_both():
    given = {"harmful": made("harmful"), "alignment": made("alignment")}
    found = dealt({"harmful", "heldout"}, given)
    assert len(found["harmful"]) == 8 and len(found["heldout"]) == 2
    assert found["harmful"].examples + found["heldout"].examples == given["harmful"].examples
    assert found["heldout"].role == "heldout"
    assert dealt({"harmful", "heldout"}, found) == found


def test_what_is_given_is_kept_and_what_is_not_read_is_not_made():
    given = {"harmful": made("harmful"), "heldout": made("heldout", 3)}
    assert dealt({"harmful", "heldout"}, given) == given
    assert dealt({"harmful"}, {"harmful": given["harmful"]}) == {"harmful": given["harmful"]}


def test_too_few_rows_to_hold_any_out():
    with pytest.raises(DataError, match="too few"):
        dealt({"heldout"}, {"harmful": made("harmful", 4)})


def test_safe_answers_come_in_the_order_of_the_prompts_they_answer():
    harmful, safe = made("harmful"), made("safe", 12)
    shuffled = Corpus("safe", safe.examples[::-1], "safe")
    found = dealt({"harmful", "safe"}, {"harmful": harmful, "safe": shuffled})
    assert [e.prompt for e in found["safe"]] == [e.prompt for e in harmful]
    held = dealt({"harmful", "heldout", "safe"}, {"harmful": harmful, "safe": shuffled})
    assert [e.prompt for e in held["safe"]] == [e.prompt for e in held["heldout"]]


def test_a_prompt_without_a_safe_answer_is_refused():
    with pytest.raises(DataError, match="2 of the 10 prompts"):
        dealt({"harmful", "safe"}, {"harmful": made("harmful"), "safe": made("safe", 8)})


def test_the_stand_ins_pair_up():
    data = standins.defence("umbra")
    assert [e.prompt for e in data["safe"]] == [e.prompt for e in data["harmful"]]
    assert all(a.response != b.response for a, b in zip(data["safe"], data["harmful"], strict=True))


@dataclass(frozen=True)
class Reads:
    """What a method reads, as far as streams are concerned."""

    reads: ClassVar[dict[str, int]] = {"alignment": 1, "harmful": 2, "safe": 2}


def test_streams_of_a_pair_are_in_step_and_others_are_not():
    model = tiny.language_model()
    data = {"alignment": made("alignment"), "harmful": made("harmful"), "safe": made("safe")}
    run = Run(fit=Fit(steps=1, lr=1.0, seed=3), default_batch_size=3)
    found = streams(Reads(), model, data, run)
    prompts = [
        {role: [row.ids[: row.labels.count(-100)] for row in found[role](step).rows] for role in ("harmful", "safe")}
        for step in range(6)
    ]
    assert all(one["harmful"] == one["safe"] for one in prompts)
    kept, taught = (tokenise(data[role], model.template, 64) for role in ("alignment", "harmful"))
    assert Shuffled(kept, 6, 3).indices(0) != Shuffled(taught, 6, 3).indices(0)


def test_sft_reads_no_more_than_before():
    assert set(SFT().reads) == {"alignment"}
