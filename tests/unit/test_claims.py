"""Claims and conditions: three verdicts, and no failure by chance alone."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from immunity.metrics.claims import Claim, Verdict3, condition, corrected, held, together, unmeasured


def claim(verdict: Verdict3, p_fail: float | None = None) -> Claim:
    return Claim(name="c", says=f"It is {verdict}.", verdict=verdict, details={"p_fail": p_fail})


class TestVerdicts:
    @pytest.mark.parametrize(
        ("verdicts", "expected"),
        [
            (["pass", "pass"], "pass"),
            (["pass", "not enough evidence"], "not enough evidence"),
            (["pass", "not enough evidence", "fail"], "fail"),
            ([], "not enough evidence"),
        ],
    )
    def test_together(self, verdicts: list[Verdict3], expected: str) -> None:
        assert together([claim(v) for v in verdicts]) == expected

    @pytest.mark.parametrize(
        ("low", "high", "most", "expected"),
        [
            (0.0, 0.1, True, "pass"),
            (0.0, 0.2, True, "not enough evidence"),
            (0.11, 0.2, True, "fail"),
            (None, 0.05, True, "pass"),
            (None, None, True, "not enough evidence"),
            (0.1, None, False, "pass"),
            (0.0, 0.09, False, "fail"),
            (0.05, None, False, "not enough evidence"),
        ],
    )
    def test_an_interval_against_a_limit(
        self, low: float | None, high: float | None, most: bool, expected: str
    ) -> None:
        assert held(low, high, 0.1, most=most) == expected


class TestHolm:
    def test_one_of_many_may_look_like_a_failure_by_chance(self) -> None:
        found = condition("stability", [claim("fail", 0.04), *(claim("pass", 0.9) for _ in range(9))], {})
        assert found.verdict == "not enough evidence"
        assert "by chance" in found.claims[0].says
        assert found.claims[0].details["p_fail_holm"] == pytest.approx(0.4)

    def test_a_sure_failure_stays_one(self) -> None:
        found = condition("stability", [claim("fail", 0.0001), *(claim("pass", 0.9) for _ in range(9))], {})
        assert found.verdict == "fail"
        assert found.says.startswith("No stability (1 of 10 claims fails).")

    def test_what_is_seen_needs_no_test(self) -> None:
        assert condition("resistance", [claim("fail"), claim("pass", 0.9)], {}).verdict == "fail"

    def test_across_a_scorecard(self) -> None:
        one = condition("stability", [claim("fail", 0.03)], {})
        two = condition("trainability", [claim("pass", 0.9), claim("pass", 0.8)], {})
        assert one.verdict == "fail"
        assert [c.verdict for c in corrected([one, two])] == ["not enough evidence", "pass"]
        assert corrected([two])[0] == two


class TestWords:
    def test_nothing_was_measured(self) -> None:
        assert condition("resistance", [], {}).says == "Resistance was not measured."
        assert condition("resistance", [], {}, nothing="No attack.").says == "No attack."
        assert unmeasured("c", "no data").says == "Not enough evidence: no data."

    def test_json(self) -> None:
        made = asdict(condition("stability", [claim("pass", 0.9)], {"a": [1]}))
        assert json.loads(json.dumps(made, allow_nan=False))["claims"][0]["verdict"] == "pass"
