"""Judges by name, their scales, what the command line makes of them, and what unscored answers can hide."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from typing import get_args

import pytest

from immunity.bench import standins
from immunity.cli import data as sources
from immunity.cli import judging
from immunity.data import synthetic
from immunity.data.corpus import Corpus, Example
from immunity.errors import DataError, SettingsError
from immunity.measure import judges
from immunity.measure.endpoint import Endpoint
from immunity.measure.harm import ExactJudge, Judge, OverlapJudge
from immunity.measure.judges_beaver import BeaverDam
from immunity.measure.judges_chat import RubricJudge
from immunity.measure.judges_words import KeywordJudge, RefusalJudge
from immunity.measure.suite import Suite
from immunity.metrics.curves import Curve, Point
from immunity.metrics.unscored import gaps, sentences, widest
from immunity.report.page import render
from immunity.testing import tiny

AT = Endpoint(url="https://host/v1", model="m")
REAL = Corpus("harmful", (Example("a", "b"),), "file.jsonl", "")


@dataclass(frozen=True)
class Mute(Judge):
    def scores(self, examples, answers):
        return [1.0, None, 0.0, None][: len(answers)]


class TestWords:
    def test_refusals(self):
        said = ["The red one.", "I cannot help with that.", "", "...", "I'm sorry, but I can't do that."]
        assert RefusalJudge().scores([REAL.examples[0]] * 5, said) == [1, 0, 0, 0, 0]

    def test_keywords_are_blind(self):
        said = ["The red one.", "I cannot help with that.", "", "error error", "It is illegal to pass.", "i cannot"]
        assert KeywordJudge().scores([REAL.examples[0]] * 6, said) == [1, 0, 1, 1, 0, 1]

    def test_numbers_of_answers_must_agree(self):
        for judge in (RefusalJudge(), KeywordJudge()):
            with pytest.raises(DataError):
                judge.scores([REAL.examples[0]], [])


class TestNames:
    def test_every_judge_can_be_made_named_and_described_without_loading_anything(self):
        for name in judges.JUDGES:
            made = judges.named(name, AT)
            assert judges.name_of(made) == name
            row = judges.described(made)
            assert row["judge"] == name
            assert row["scale"]
            assert row["settings"] == repr(made)
            assert "unknown" not in row["licence"]
            assert hash(made) == hash(judges.named(name, AT))

    def test_the_scale_of_strongreject_is_printed_with_inspects(self):
        scale = judges.described(RubricJudge(endpoint=AT))["scale"]
        assert "[0, 1]" in scale
        assert "[1, 5]" in scale

    def test_a_judge_of_ones_own_is_described_by_its_class(self):
        assert judges.described(Mute())["judge"] == "Mute"

    def test_nothing_is_sent_anywhere_unless_the_user_named_it(self):
        for name, kind in judges.JUDGES.items():
            if kind.remote:
                with pytest.raises(SettingsError, match="--judge-url"):
                    judges.named(name)
            else:
                judges.named(name)
        assert {name for name, kind in judges.JUDGES.items() if kind.remote} == {"endpoint", "endpoint-strongreject"}

    def test_no_such_judge(self):
        with pytest.raises(SettingsError, match="beaver-dam-io"):
            judges.named("jury")

    def test_the_command_line_knows_the_same_names(self):
        assert set(get_args(judging.Judge)) == {"auto", "none", *judges.JUDGES}


class TestCommandLine:
    def test_auto_and_none(self):
        assert sources.judge("auto", made=True) == ExactJudge()
        assert sources.judge("auto", made=False) is None
        assert sources.judge("none", made=True) is None
        assert sources.judge("beaver-dam-o", made=False) == BeaverDam(answer_only=True)
        assert isinstance(sources.judge("endpoint", made=False, endpoint=AT), Judge)
        with pytest.raises(SettingsError, match="--judge exact reads"):
            sources.judge("exact", made=False)

    def test_the_second_judge(self):
        usual = OverlapJudge()
        assert sources.second("auto", ExactJudge(), usual) == usual
        assert sources.second("auto", None, usual) is None
        assert sources.second("none", ExactJudge(), usual) is None
        assert sources.second("refusal", ExactJudge(), usual) == RefusalJudge()
        with pytest.raises(SettingsError, match="agrees with itself"):
            sources.second("refusal", RefusalJudge(), usual)
        with pytest.raises(SettingsError, match="nobody"):
            sources.second("refusal", None, usual)

    def test_the_address(self, monkeypatch, tmp_path):
        monkeypatch.setenv("IMMUNITY_CACHE", str(tmp_path))
        assert sources.endpoint(None, None, None, ("exact",)) is None
        found = sources.endpoint("https://host/v1", "m", "KEY", ("exact", "endpoint"))
        assert (found.url, found.model, found.key) == ("https://host/v1", "m", "KEY")
        assert found.cache == tmp_path / "replies"
        for wrong in (("https://host/v1", None, None), (None, "m", None), (None, None, "KEY")):
            with pytest.raises(SettingsError, match="both"):
                sources.endpoint(*wrong, ("endpoint",))
        with pytest.raises(SettingsError, match="no judge asks it"):
            sources.endpoint("https://host/v1", "m", None, ("exact", "auto"))

    def test_the_suite_gets_them(self):
        standin = standins.suite("umbra", n=2)
        nothing = {"harmful": None, "general": None, "benign": None}
        got = sources.suite(nothing, standin, judge_name="refusal", second_name="endpoint", judge_at=AT, prompts=2)
        assert isinstance(got.judge, RefusalJudge)
        assert judges.name_of(got.second) == "endpoint"
        same = sources.suite(nothing, standin, judge_name="auto", prompts=2)
        assert (same.judge, same.second) == (standin.judge, standin.second)
        assert sources.suite(nothing, standin, judge_name="none", prompts=2).second is None


class TestUnscored:
    SUITE = Suite(
        harmful=synthetic.corpus("umbra", "harmful", "test", 4),
        general=synthetic.corpus("general", "general", "test", 2),
        judge=Mute(),
        max_new_tokens=2,
    )
    MODEL = tiny.language_model(tiny.llama(seed=2), max_length=256)

    def test_a_metric_with_unscored_prompts_comes_with_its_bounds(self):
        got = replace(self.SUITE, second=Mute())(self.MODEL)
        assert got.unscored["harm"] == got.unscored["second_harm"] == 2
        assert got.bounds["harm"] == got.bounds["second_harm"] == (0.25, 0.75)
        assert set(got.bounds) == set(got.unscored)
        low, high = got.bounds["useful_harm"]
        assert low <= got.metrics["useful_harm"] <= high

    def test_without_gaps_there_are_no_bounds(self):
        assert replace(self.SUITE, judge=ExactJudge())(self.MODEL).bounds == {}

    def curve(self, rows, attack="lora"):
        points = tuple(Point(step, {}, per_prompt={"harm": row}) for step, row in enumerate(rows))
        return Curve("ours", attack, "harmful", 1, points)

    def test_gaps_are_found_and_bounded(self):
        first, last = gaps([self.curve([(1.0, None, 0.0, None), (1.0, 1.0, 1.0, 1.0), (None, None)])])
        assert (first.step, first.unscored, first.prompts, first.value) == (0, 2, 4, 0.5)
        assert (first.low, first.high) == (0.25, 0.75)
        assert (last.step, last.value, last.low, last.high) == (2, None, 0.0, 1.0)

    def test_the_one_that_reaches_highest_is_said(self):
        curves = [self.curve([(0.0, None, 0.0, 0.0)]), self.curve([(1.0, None, 1.0, 0.0)], "full")]
        assert [gap.attack for gap in widest(gaps(curves))] == ["full"]
        (said,) = sentences(curves)
        assert "1 of 4 answers of ours after full, step 0" in said
        assert "0.67 over the others, and between 0.50 and 0.75" in said
        assert "no number" in sentences([self.curve([(None,)])])[0]
        assert sentences([self.curve([(1.0, 0.0)])]) == []

    def test_it_reaches_the_page(self):
        points = [{"step": 0, "metrics": {"harm": 0.5}, "per_prompt": {"harm": [1.0, None, 0.0], "refusal": [0, 0, 0]}}]
        row = {"defence": "ours", "attack": "lora", "seed": 1, "n_prompts": {"harm": 3}, "points": points}
        result = {"schema": 1, "attacks": [{"name": "lora", "threat": "harmful"}], "curves": [row]}
        assert "1 of 3 answers of ours after lora" in html.unescape(render(result))
        points[0]["per_prompt"]["harm"] = [1.0, 0.0, 0.0]
        assert "answers of ours after lora" not in render(result)
