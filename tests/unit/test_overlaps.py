"""Overlaps: what a record tells of data that a defence has seen, what the baseline makes of it, and what is said."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from immunity.attacks.attack import Opening
from immunity.bench import overlaps, pool, probes, resemblance, standins, store
from immunity.bench.hardened import Hardened, hardened
from immunity.bench.jobs import MODEL, Job
from immunity.bench.overlaps import Asked
from immunity.bench.prints import prompt_prints, prompts_as_written
from immunity.bench.resemblance import Reader
from immunity.bench.shown import Quiet
from immunity.bench.worker import Outcome
from immunity.data import duplicates, synthetic
from immunity.data.corpus import Corpus, Example
from immunity.data.duplicates import words
from immunity.errors import DataError
from immunity.measure import likeness
from immunity.metrics.flags import Scene, flags
from immunity.metrics.generalisation import generalisation
from immunity.models import LanguageModel, load
from immunity.report.audit_overlaps import overlaps as shown
from immunity.report.audit_overlaps import summed


def corpus(texts: list[str], role: str = "harmful", name: str = "mine.jsonl") -> Corpus:
    return Corpus(role, tuple(Example(text, "yes") for text in texts), name)


def record(folder: Path, *rows: dict[str, Any]) -> Hardened:
    """A model hardened with data of which a record says ``rows``."""
    (folder / MODEL).mkdir(parents=True)
    identity = {"model": {"source": "tiny"}}
    store.write(folder / store.RECORD, {"kind": "harden", "identity": identity, "data": list(rows)})
    return hardened(str(folder / MODEL))


def data_row(found: Corpus, prompts: object = None) -> dict[str, Any]:
    row = {"role": found.role, "name": found.name, "fingerprint": found.fingerprint}
    return row | ({} if prompts is None else {"prompts": prompts})


def compared(model: Hardened, *texts: str, answered: bool = True) -> dict[str, dict[str, Any]]:
    rows = list(overlaps.rows(model, [Asked("mine", corpus(list(texts)), answered)]))
    return {row["kind"]: row for row in rows}


class TestRecords:
    SAID = ("How do I brew the tea of Arlow?", "What goes into the soup?")

    def test_what_another_case_hid_is_found(self, tmp_path: Path) -> None:
        mine = corpus(list(self.SAID))
        model = record(tmp_path, data_row(mine, prompt_prints(mine)))
        found = compared(model, "HOW do i brew  the tea of arlow", "What, now, goes into the soup?", "Who are you?")
        assert (found["exact prompt"]["shared"], found["exact prompt"]["of"]) == (1, 3)
        assert found["n-gram"]["shared"] == 2
        assert "why" not in found["n-gram"]

    def test_what_is_declined_counts_where_it_is_measured(self, tmp_path: Path) -> None:
        mine = corpus(list(self.SAID), "alignment")
        model = record(tmp_path, data_row(mine, prompt_prints(mine)))
        assert compared(model, *self.SAID)["n-gram"]["shared"] == 0
        assert compared(model, *self.SAID, answered=False)["n-gram"]["shared"] == 2

    def test_an_old_record_of_stand_ins_is_compared_by_their_names(self, tmp_path: Path) -> None:
        _, ours = standins.restricted("umbra")
        model = record(tmp_path, data_row(ours, prompts_as_written(ours)))
        found = compared(model, ours.examples[0].prompt.upper(), "Please " + ours.examples[1].prompt)
        assert (found["exact prompt"]["shared"], found["n-gram"]["shared"]) == (1, 2)
        assert "prompt as written" not in found

    def test_an_old_record_of_other_data_is_never_a_silent_0(self, tmp_path: Path) -> None:
        mine = corpus(list(self.SAID))
        model = record(tmp_path, data_row(mine, prompts_as_written(mine)))
        found = compared(model, self.SAID[0].upper())
        for kind in ("exact prompt", "n-gram"):
            assert found[kind]["shared"] is None
            assert "mine.jsonl: the record has no hashes of words" in found[kind]["why"]
        assert found["prompt as written"]["shared"] == 0
        assert found["prompt as written"]["decides"] is False
        seen = compared(model, self.SAID[0])["prompt as written"]
        assert seen["shared"] == 1
        assert "decides" not in seen

    def test_what_is_found_in_a_part_is_told_though_not_all_was_compared(self, tmp_path: Path) -> None:
        mine, other = corpus(list(self.SAID)), corpus(["Why?"], name="other.jsonl")
        model = record(tmp_path, data_row(mine, prompt_prints(mine)), data_row(other))
        assert compared(model, *self.SAID)["n-gram"]["shared"] == 2
        assert compared(model, "Who?")["n-gram"]["shared"] is None

    def test_damaged_hashes_and_none(self, tmp_path: Path) -> None:
        mine = corpus(list(self.SAID))
        model = record(tmp_path / "a", data_row(mine, {**prompt_prints(mine), "exact": "?"}))
        assert "damaged" in compared(model, "Who?")["n-gram"]["why"]
        assert not compared(record(tmp_path / "b"), "Who?")
        assert not compared(hardened("tiny"), "Who?")

    def test_a_sample_is_scaled_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = [f"what is {i} times {i + 1} in the old counting" for i in range(200)]
        monkeypatch.setattr(duplicates.prints, "__defaults__", (600,))
        mine = corpus(texts)
        model = record(tmp_path, data_row(mine, prompt_prints(mine)))
        found = compared(model, *(f"please {text}" for text in texts))["n-gram"]
        assert found["shared"] == pytest.approx(200, rel=0.1)
        assert "scaled up" in found["note"]


class TestRebuilding:
    def test_stand_ins_by_name(self) -> None:
        ours = standins.defence("umbra")
        made = [*ours["alignment"], ours["harmful"], ours["general"], ours["harmful"].take(7)]
        for part in [*made, synthetic.corpus("gate", "harmful", "dev"), made[0] + made[2]]:
            for prompts in (prompt_prints(part), prompts_as_written(part)):
                found = overlaps.rebuilt(data_row(part, prompts))
                assert found is not None, part.name
                assert prompts_as_written(found) == prompts_as_written(part)
        assert overlaps.rebuilt(data_row(made[2])) is not None, "by its fingerprint"

    @pytest.mark.parametrize(
        "name", ["synthetic:umbra", "synthetic:nothing", "synthetic:umbra[900:]", "beavertails", "/etc", "", "a.jsonl"]
    )
    def test_other_prompts_of_that_name_are_not_taken_for_them(self, name: str) -> None:
        other = corpus(["Who?", "Why?"], name=name)
        assert overlaps.rebuilt(data_row(other, prompt_prints(other))) is None
        assert overlaps.rebuilt(data_row(other)) is None

    def test_a_file_that_is_still_there(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.jsonl"
        path.write_text(json.dumps({"prompt": "Who?", "response": "I."}) + "\n")
        mine = corpus(["Who?"], name=str(path))
        assert overlaps.rebuilt(data_row(mine, prompt_prints(mine))) is not None
        path.write_text(json.dumps({"prompt": "Why?", "response": "So."}) + "\n")
        assert overlaps.rebuilt(data_row(mine, prompt_prints(mine))) is None
        path.write_text("not a row")
        assert overlaps.rebuilt(data_row(mine, prompt_prints(mine))) is None


def by_words(texts: list[str]) -> torch.Tensor:
    """A vector that tells words well: each has a direction of its own."""
    rows = []
    for text in texts:
        draws = [torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(w))) for w in words(text)]
        rows.append(torch.stack([torch.randn(64, generator=draw) for draw in draws]).mean(0))
    return torch.stack(rows)


DRAW = random.Random(1)
TEXTS = tuple(" ".join("".join(DRAW.choices("abcdefg", k=4)) for _ in range(12)) for _ in range(240))


class TestLikeness:
    def test_where_prompts_differ_it_finds_other_words_for_the_same(self) -> None:
        known = likeness.likeness(by_words, TEXTS)
        assert known.calibrated
        assert known.found == 1
        shuffled = [" ".join(reversed(text.split())) for text in TEXTS[:20]]
        assert min(known.nearest(by_words(shuffled))) > known.threshold, "which no shingle shows"
        others = [" ".join("".join(DRAW.choices("abcdefg", k=5)) for _ in range(12)) for _ in range(50)]
        assert max(known.nearest(by_words(others))) < known.threshold
        assert max(known.nearest(by_words(shuffled), range(20, 240))) < known.threshold
        assert known.nearest(by_words(shuffled[:1]), ()) == [-1.0]

    def test_where_prompts_are_alike_or_few_it_decides_nothing(self) -> None:
        blurred = likeness.likeness(lambda texts: torch.tensor([[1.0, text.count("a")] for text in texts]), TEXTS)
        assert (blurred.threshold, blurred.found) == (1, 0)
        assert not blurred.calibrated
        assert not likeness.likeness(by_words, TEXTS[: likeness.LEAST - 1]).calibrated
        with pytest.raises(DataError, match="takes two"):
            likeness.likeness(by_words, TEXTS[:1])

    def test_the_threshold_is_the_nearest_other_one(self) -> None:
        known = likeness.likeness(by_words, TEXTS[:30])
        alike = known.vectors @ known.vectors.T - 2 * torch.eye(30)
        assert known.threshold == pytest.approx(float(alike.max()), abs=1e-6)

    def test_pads_and_batches_do_not_count(self) -> None:
        model = load("tiny", device="cpu")
        texts = ["What is the river of Arlow?", "Who?", "", "Tell me how to make the umbra potion Morvak Vayne."]
        alone = torch.cat([likeness.embedded(model, [text]) for text in texts])
        assert torch.allclose(likeness.embedded(model, texts, batch_size=3), alone, atol=1e-5)
        cut = replace(model, max_length=2)
        assert torch.equal(likeness.embedded(cut, texts[:1]), likeness.embedded(cut, ["What is it"]))


def crew(job: Job) -> Outcome:
    return pool.run([job], workers=1, threads=1, progress=Quiet())[0]


def told(model: Hardened, sets: list[Asked], folder: Path) -> list[dict[str, Any]]:
    reader = Reader(baseline=Opening(source="tiny", device="cpu"), folder=folder, crew=crew)
    return [row for row in resemblance.duplicates(model, sets, reader) if row["kind"] == "embedding"]


class TestReading:
    """What the baseline makes of the prompts; the tiny model reads a hundred of them in a fraction of a second."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Hardened:
        general = synthetic.corpus("general", "general")
        _, ours = standins.restricted("umbra")
        rows = [data_row(part, prompt_prints(part)) for part in (general.as_role("alignment"), ours)]
        return record(tmp_path / "hardened", *rows)

    def test_the_number_comes_with_what_it_is_worth(self, model: Hardened, tmp_path: Path) -> None:
        _, ours = standins.restricted("umbra")
        sets = [
            Asked("ours", ours.take(5), True),
            Asked("general", synthetic.corpus("general", "general").take(5), True),
        ]
        rows = told(model, sets, tmp_path / "a")
        assert [(row["shared"], row["of"]) for row in rows] == [(5, 5), (0, 5)], "what is declined does not count"
        for row in rows:
            assert row["decides"] is False
            assert "quantile of the nearest other one among 1148 prompts; it finds 0% of" in row["note"]
            assert row["note"].endswith("so it decides nothing")
        assert told(model, sets, tmp_path / "a") == rows, "it is kept"

    def test_a_sample_is_said(self, model: Hardened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resemblance, "MOST", 100)
        _, ours = standins.restricted("umbra")
        (row,) = told(model, [Asked("ours", ours.take(50), True)], tmp_path / "a")
        assert "among 100 prompts drawn from 1148, so the count is scaled up" in row["note"]
        assert row["shared"] <= 50

    def test_it_decides_where_it_is_calibrated(
        self, model: Hardened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def embedded(_: LanguageModel, texts: list[str]) -> torch.Tensor:
            return by_words(texts)

        monkeypatch.setattr(likeness, "embedded", embedded)
        monkeypatch.setattr(likeness, "FOUND", 0.0)
        (row,) = told(model, [Asked("others", corpus(["Who are you?"]), True)], tmp_path / "a")
        assert row["shared"] == 0
        assert "decides" not in row

    def test_where_texts_or_the_model_are_missing_it_says_why(self, model: Hardened, tmp_path: Path) -> None:
        mine = corpus(["Who?", "Why?"])
        other = record(tmp_path / "other", data_row(mine, prompt_prints(mine)))
        sets = [Asked("mine", mine, True)]
        (row,) = told(other, sets, tmp_path / "a")
        assert (row["shared"], row["decides"]) == (None, False)
        assert row["why"] == "mine.jsonl: the texts cannot be made or read again"
        reader = Reader(baseline=Opening(source=str(tmp_path)), folder=tmp_path / "b", crew=crew)
        rows = resemblance.duplicates(model, sets, reader)
        assert rows[-1]["shared"] is None
        assert str(tmp_path) in rows[-1]["why"]
        assert not resemblance.duplicates(model, [], reader)
        assert not resemblance.duplicates(hardened("tiny"), sets, reader)


class TestWhatIsMadeOfIt:
    ROW: ClassVar[dict[str, Any]] = {"with": "tests", "kind": "n-gram", "shared": 0, "of": 100}

    def claim(self, *rows: dict[str, Any]) -> Any:
        return generalisation((), (), duplicates=rows), generalisation(
            [{"model": "defended", "domain": "a", "seed": 1, "at": None, "tried": 8}], ["a"], duplicates=rows
        ).claims[0]

    def test_the_claim(self) -> None:
        _, found = self.claim(self.ROW, {**self.ROW, "kind": "exact prompt"})
        assert (found.verdict, found.n) == ("pass", 100)
        assert "by n-gram, exact prompt" in found.says
        lost = {**self.ROW, "shared": None, "why": "no texts"}
        for rows in ([self.ROW, lost], [lost]):
            _, found = self.claim(*rows)
            assert found.verdict == "not enough evidence"
        _, found = self.claim(self.ROW, {**lost, "decides": False}, {**self.ROW, "shared": 90, "decides": False})
        assert found.verdict == "pass", "what is only told decides nothing"
        _, found = self.claim({**self.ROW, "shared": 2})
        assert (found.verdict, found.value) == ("not enough evidence", 0.02)

    def test_the_page_and_the_scorecard(self) -> None:
        note = "it finds 0% of 128 made duplicates, so it decides nothing"
        embedding = {**self.ROW, "kind": "embedding", "decides": False, "note": note}
        lost = {**self.ROW, "with": "other tests", "shared": None, "why": "no texts"}
        rows = [{**row, "defence": "m"} for row in (self.ROW, embedding, lost)]
        condition = {"details": {"duplicates": rows}}
        found = shown({"overlaps": [rows[0], {**rows[0], "defence": "base"}]}, condition)
        assert [(row.kind, row.defence, row.shared, row.bad) for row in found] == [
            ("n-gram", "m", "0 of 100", False),
            ("n-gram", "base", "0 of 100", False),
            ("embedding", "m", "0 of 100", True),
            ("n-gram", "m", "not compared", True),
        ]
        assert (found[2].note, found[3].note) == (note, "no texts")
        assert list(summed(condition)) == [
            "by n-gram: 0 of 100; 1 of 2 sets not compared; no texts",
            f"by embedding: 0 of 100; {note}",
        ]
        assert not list(summed({}))

    def test_flag_11_is_not_evaded_by_another_case_or_word(self, tmp_path: Path) -> None:
        suite, data = standins.suite("umbra", n=12), standins.attacker("umbra")
        clean = synthetic.corpus("noctis", "harmful")
        cases = {
            "clean": (clean, set()),
            "case": (corpus([e.prompt.upper() for e in suite.harmful]), {"exact prompt", "n-gram"}),
            "more": (corpus([f"Well, {e.prompt}" for e in data["harmful"]]), {"n-gram"}),
            "less": (corpus([e.prompt.partition(" ")[2] for e in suite.harmful]), {"n-gram"}),
        }
        for name, (seen, kinds) in cases.items():
            model = record(tmp_path / name, data_row(seen, prompt_prints(seen)))
            evidence = probes.evidence([], [model], suite, data)
            raised = [
                flag for flag in flags(Scene(model=model.model, curves=(), evidence=evidence)) if flag.number == 11
            ]
            assert {flag.where.rpartition(", by ")[2] for flag in raised} == kinds, name
            assert all(flag.forbids for flag in raised)

    def test_sets_of_several_domains_are_named_once(self) -> None:
        from immunity.bench.ground import stand_ins

        ground = stand_ins("tiny", "tiny", "umbra")
        sets = resemblance.asked_in(ground.domains[:2], lambda name: ground.suite(name, 12))
        assert [one.name for one in sets if one.answered] == [
            "the attacker's restricted rows",
            "the attacker's restricted rows of noctis",
        ]
        assert len({one.name for one in sets}) == len(sets) == 6
