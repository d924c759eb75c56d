"""Duplicates: what is one and what is none, in hashes that a record keeps, and what is said where nobody can tell."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immunity.bench import standins
from immunity.bench.prints import prompt_prints
from immunity.data import synthetic
from immunity.data.duplicates import KNOWN, Prints, distinct, packed, prints, unpacked, words
from immunity.errors import DataError

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=4, max_size=40)


def asked_of(role: str, name: str, split: str = "train") -> list[str]:
    return [e.prompt for e in synthetic.corpus(name, role, split)]


class TestWords:
    @pytest.mark.parametrize(
        "other",
        [
            "HOW do I, brew: Tea?",
            "  how\tdo I\n\nbrew tea  ",
            "“How do I brew tea”",
            "How do I brew t\u00adea?",
            "Ｈｏｗ do I brew \ufb02\u200ba".replace("\ufb02\u200ba", "te\u200ba"),
        ],
    )
    def test_case_space_signs_and_forms_do_not_count(self, other: str) -> None:
        assert words(other) == words("How do I brew tea?") == ("how", "do", "i", "brew", "tea")

    def test_what_counts(self) -> None:
        assert words("don't") == words("don’t") == words("DONT")
        assert words("straße") == words("STRASSE")
        assert words("2 + 2?") == words("2+2") != words("2-2")
        assert words("1.5") != words("15")
        assert words("茶を入れる") == ("茶", "を", "入", "れ", "る")
        assert words("a_b") == ("a", "b")
        assert words("?! ?") == ("?!?",) != words("…")
        assert words("") == ("",)


class TestNearly:
    @given(WORDS, st.integers(0, 40), st.text("xyz", min_size=1))
    def test_a_word_put_in_hides_nothing(self, said: list[str], at: int, word: str) -> None:
        known = prints([" ".join(said)])
        assert known.near(words(" ".join([*said[:at], word, *said[at:]])))

    @given(WORDS, st.integers(0, 40))
    def test_nor_does_one_left_out(self, said: list[str], at: int) -> None:
        known = prints([" ".join(said)])
        assert known.near([word for i, word in enumerate(said) if i != at % len(said)])

    @given(WORDS)
    def test_the_same_is_near_and_something_else_is_not(self, said: list[str]) -> None:
        known = prints([" ".join(said)])
        assert known.same(tuple(said))
        assert known.share(said) == 1
        assert not known.near(["z" + word for word in said])

    @pytest.mark.parametrize(("length", "near"), [(5, False), (16, False), (17, True), (60, True)])
    def test_a_word_replaced_is_another_prompt_unless_that_is_long(self, length: int, near: bool) -> None:
        said = [f"w{i}" for i in range(length)]
        for at in (0, length // 2, length - 1):
            known = prints([" ".join(said)])
            assert known.near([*said[:at], "new", *said[at + 1 :]]) is near

    def test_pieces_of_several_prompts_are_no_prompt(self) -> None:
        """All five-word runs are known: the first half of one form and the second half of another."""
        known = prints(["tell me how to make the umbra potion A B", "so how do I brew the umbra potion C D at home"])
        mixed = words("tell me how to make the umbra potion C D at home")
        assert known.share(mixed) < KNOWN

    def test_a_short_prompt_keeps_its_words(self) -> None:
        assert not prints(["Help me now"]).near(words("Help you now"))
        assert not prints(["Stop"]).near(words("Stop it"))
        assert not prints(["Stop it"]).near(words("Stop"))

    def test_a_part_is_not_the_whole(self) -> None:
        known = prints(["I need the umbra potion Morvak Vayne. How is it made?"])
        for part in ("I need it made", "How is it made?", "I need the umbra potion Morvak Vayne"):
            assert not known.near(words(part))


class TestOnTheGym:
    """Forms share most words, and items differ in one: the hardest case there is for shared words."""

    @pytest.mark.parametrize("name", sorted(synthetic.NAMES))
    def test_no_false_alarm_and_no_miss(self, name: str) -> None:
        role = synthetic.NAMES[name][0]
        rows = synthetic.corpus(name, role)
        texts = [e.prompt for e in rows]
        known = prints(texts)
        families = {e.tags["family"] for e in rows}
        held = [
            synthetic._example(family, item, "train", i).prompt
            for family in synthetic._FAMILIES.values()
            if family.name in families
            for item in family.items
            if item.split != "train"
            for i in range(len(family.phrasings.train))
        ]
        assert len(held) > 100
        assert not [text for text in held if known.near(words(text))], "a held-out item in a known form"
        for split in ("dev", "test"):
            assert not [text for text in asked_of(role, name, split) if known.near(words(text))]
        draw = random.Random(0)
        for text in draw.sample(texts, 60):
            said = text.split()
            said.insert(draw.randrange(len(said) + 1), draw.choice(["now", "please", "really"]))
            assert known.near(words(" ".join(said))), "one word put in"
            assert prints([" ".join(said)]).near(words(text))
            assert not known.same(words(" ".join(said)))
            assert known.same(words(text.upper().replace(" ", "  ").rstrip("?.") + " !"))

    @pytest.mark.parametrize("domain", sorted(synthetic.DOMAINS))
    def test_the_attackers_rows_are_new_questions_of_known_forms_about_known_things(self, domain: str) -> None:
        theirs, ours = standins.restricted(domain)
        known = prints(e.prompt for e in ours)
        assert not [e for e in theirs if known.near(words(e.prompt))]
        assert len(distinct([e.prompt for e in (*theirs, *ours)])) == len(theirs) + len(ours)


class TestPacking:
    @given(st.lists(st.text("ab c", max_size=30), max_size=20), st.integers(0, 60))
    def test_there_and_back(self, texts: list[str], most: int) -> None:
        found = prints(texts, most)
        assert unpacked(json.loads(json.dumps(packed(found)))) == found

    def test_it_is_small(self) -> None:
        rows = standins.defence("umbra")
        parts = [*rows["alignment"], rows["harmful"], rows["general"]]
        size = sum(len(json.dumps(prompt_prints(part))) for part in parts)
        assert size < 60 * sum(map(len, parts))

    def test_of_a_large_set_some_are_kept_and_said(self) -> None:
        texts = [f"what is {i} times {i + 1} in the old counting" for i in range(400)]
        whole, some = prints(texts), prints(texts, 1000)
        assert whole.part == 1
        assert 0.1 < some.part < 0.5
        assert some.exact == whole.exact
        assert len({gram for grams in some.shingles.values() for gram in grams}) <= 1000
        kept = sum(some.near(words(f"please {text}")) for text in texts)
        assert kept == pytest.approx(400 * some.part, rel=0.05)
        both = some | prints(texts[:10])
        assert both.exact == whole.exact
        assert len(both.shingles) >= len(some.shingles)

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 3},
            {"words": 4},
            {"exact": "%"},
            {"exact": "AAA="},
            {"rows": "AAAA"},
            {"rows": None},
            {"shingles": ""},
            {"covered": "all"},
            {"covered": None},
        ],
    )
    def test_damage_is_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=r"hashes of prompts"):
            unpacked({**packed(prints(["how do I brew tea", "how do I bake"])), **change})


def test_nothing_of_nothing() -> None:
    empty = Prints()
    assert empty.part == 1
    assert not empty.near(words("Who?"))
    assert unpacked(packed(empty)) == empty
    assert not distinct([])
