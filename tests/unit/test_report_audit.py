"""What a page shows of an audit."""

from __future__ import annotations

import copy
import json
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from immunity.metrics.curves import curves
from immunity.report.audit import Audit, audit
from immunity.report.look import look
from immunity.report.page import render
from read_page import HOSTILE, Elements, text

large_audit: Callable[..., dict[str, Any]] = runpy.run_path(
    str(Path(__file__).parents[1] / "fixtures" / "large_audit.py")
)["large_audit"]


def read(result: dict[str, Any]) -> Audit:
    found = audit(result, look(result, curves(result)))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return large_audit()


@pytest.fixture(scope="module")
def page(result: dict[str, Any]) -> str:
    return render(result)


@pytest.fixture(scope="module")
def section(page: str) -> str:
    return page.split('<section class="charts" id="audit"')[1].split("</section>", maxsplit=1)[0]


class TestSection:
    def test_it_is_on_top_and_the_rest_is_folded(self, page: str, result: dict[str, Any]) -> None:
        places = [
            page.index(f'id="{name}"') for name in ("audit", "limits", "provenance", "battery", "verdicts", "figures")
        ]
        assert places == sorted(places)
        assert page.index('<details class="fold') < page.index('id="battery"')
        assert page.count('<details class="fold print">') == 4
        assert 'id="audit"' not in render({key: value for key, value in result.items() if key != "audit"})

    def test_every_condition_has_verdict_sentence_and_claims(self, section: str, result: dict[str, Any]) -> None:
        seen = text(f"<p>{section}")
        for one in result["audit"]["conditions"]:
            card = section.split(f'id="condition-{one["name"]}"')[1].split("</article>", maxsplit=1)[0]
            assert one["verdict"] in text(f"<p>{card}")
            assert " ".join(one["says"].split()) in text(f"<p>{card}")
            assert card.count('<span class="what"') == len(one["claims"])
            for claim in one["claims"]:
                assert " ".join(claim["says"].split()) in seen

    def test_colour_is_not_the_only_signal(self, section: str) -> None:
        for sign, word in (("✕", "fail"), ("?", "not enough evidence"), ("✓", "pass")):
            assert f'<span aria-hidden="true">{sign}</span> {word}' in section

    def test_what_the_budget_can_and_cannot_show(self, section: str) -> None:
        seen = text(f"<p>{section}")
        assert "This budget can show ✓ differences in harm from 17% on" in seen
        assert "It cannot show, whatever comes out – equality within 2 points" in seen

    def test_judges_flags_overlap_and_provenance(self, section: str, page: str) -> None:
        seen = text(f"<p>{section}")
        assert "Exact and Words runs/ctrap-12/model 0.94 0.90 under BEN-10 5" in seen
        assert "11 data overlap forbids to conclude “not broken”" in seen
        assert "the attacker's restricted rows exact prompt 3 of 400 ! 0.8% runs/ctrap-12/model" in seen
        whole = text(page)
        for word in (
            "immunity audit runs/ctrap-12/model",
            "0123456789abcdef",
            "audited runs/ctrap-12/model",
            "tier standard",
        ):
            assert word in whole

    def test_flags_lead_to_where_they_were_raised(self, section: str, page: str) -> None:
        target = re.search(r'href="#(flags-\d)"', section)
        assert target is not None
        assert page.count(f'id="{target[1]}"') == 1

    def test_only_winners_had_fresh_seeds_and_that_is_said(self, page: str) -> None:
        assert "1 to 3 seeds each" in text(page)
        assert "3 seeds each" not in text(render(large_audit(attacks=8, seeds=1)))

    def test_never_says_that_it_cannot_be_broken(self, page: str) -> None:
        assert "cannot be broken" not in page

    def test_the_same_result_gives_the_same_page_and_stays_as_it_was(self, page: str, result: dict[str, Any]) -> None:
        before = copy.deepcopy(result)
        assert render(result) == page
        assert result == before
        assert len(page) < 1_500_000

    def test_the_numbers_can_be_saved(self, page: str, result: dict[str, Any]) -> None:
        kept = json.loads(page.split('id="result">')[1].split("</script>", maxsplit=1)[0])
        assert kept["audit"]["verdicts"] == result["audit"]["verdicts"]


class TestFigures:
    def test_the_gain_is_a_factor(self, result: dict[str, Any]) -> None:
        found = read(result).survival
        details = result["audit"]["conditions"][0]["details"]
        assert found is not None
        assert found.axis == "training examples"
        gain = details["survival"]["examples"]["gain"]
        assert found.gains[0].gain == f"{math.exp(gain['value']):.3g} ×"
        assert found.gains[0].interval == f"{math.exp(gain['low']):.3g}–{math.exp(gain['high']):.3g}"
        assert len(found.gains) == len(details["survival"])

    def test_both_models_are_drawn_and_told(self, result: dict[str, Any]) -> None:
        found = read(result)
        assert found.survival is not None
        drawn = str(found.survival.panel.svg)
        assert f"var(--d{found.pair.mine})" in drawn
        assert f"var(--d{found.pair.theirs})" in drawn
        assert found.pair.theirs == 0
        assert "7 of 19 runs broke it" in drawn

    def test_a_bar_stands_where_its_difference_is(self, result: dict[str, Any]) -> None:
        points, alone, nats = read(result).forests
        assert (points.least, points.most, points.limit) == ("−40", "+40", "±2 points")
        assert alone.limit == "±10 points"
        assert (nats.least, nats.most) == ("−0.2", "+0.2")
        bars = {bar.claim.name: bar for bar in (*points.rows, *alone.rows, *nats.rows)}
        claims = {one["name"]: one for row in result["audit"]["conditions"] for one in row["claims"]}
        for forest, end in ((points, 0.4), (alone, 0.2), (nats, 0.2)):
            for bar in forest.rows:
                claim = claims[bar.claim.name]
                assert bar.at == pytest.approx(50 + 50 * claim["value"] / end, abs=0.01)
                assert (bar.low, bar.high) == pytest.approx(
                    (50 + 50 * claim["low"] / end, 50 + 50 * claim["high"] / end), abs=0.01
                )
                inside = bar.good[0] <= bar.low and bar.high <= bar.good[1]
                assert inside == (claim["verdict"] == "pass")
        assert bars["accuracy on general"].good == (47.5, 52.5)
        assert bars["harm on restricted: umbra"].good == (0.0, 52.5)
        assert bars["final accuracy on topic, lora"].good == (47.5, 100.0)
        assert "divergence" not in bars

    def test_an_interval_without_ends_reaches_the_edges(self, result: dict[str, Any]) -> None:
        other = copy.deepcopy(result)
        claim = next(one for one in other["audit"]["conditions"][1]["claims"] if one["name"] == "accuracy on general")
        claim.update(low=None, high=None)
        bar = next(bar for bar in read(other).forests[0].rows if bar.claim.name == claim["name"])
        assert (bar.low, bar.high) == (0.0, 100.0)

    def test_the_matrix_holds_domains_and_threats(self, result: dict[str, Any]) -> None:
        found = read(result)
        assert [cell.domain for cell in found.matrix] == ["umbra", "noctis", "veil", "sable"]
        assert [cell.held_out for cell in found.matrix] == [False, True, True, True]
        home, veil = found.matrix[0], found.matrix[2]
        assert home.sides[0].broke == "broke at 128–256"
        assert home.carried is None
        assert veil.carried is not None
        assert veil.carried.name == "carried over to veil"
        assert [(cell.threat, cell.ratio) for cell in found.threats] == [
            ("abliteration", "≥ 16 ×"),
            ("reinforcement learning", "2 ×"),
        ]
        assert found.threats[0].sides[0].broke == "not broken at 512"

    def test_learning_curves_name_their_rates(self, result: dict[str, Any]) -> None:
        found = read(result)
        assert [one.title for one in found.lessons] == [
            "sentiment, full",
            "sentiment, lora",
            "topic, full",
            "topic, lora",
        ]
        assert len(found.again) == 4
        assert found.lessons[0].rates == "hardened 0.001, baseline 0.001"
        assert "1 of 6 runs diverged (hardened)" in found.lessons[3].says
        assert "3 seeds" in str(found.lessons[0].svg)


class TestGaps:
    @pytest.mark.parametrize(
        "key", ["conditions", "supports", "cannot", "overlaps", "tier", "model", "baseline", "domain"]
    )
    def test_any_part_may_be_missing(self, result: dict[str, Any], key: str) -> None:
        cut = {**result, "audit": {name: value for name, value in result["audit"].items() if name != key}}
        assert 'id="audit"' in render(cut)

    def test_without_details_there_are_no_figures(self, result: dict[str, Any]) -> None:
        bare = [{**one, "details": {}, "claims": one["claims"][:1]} for one in result["audit"]["conditions"]]
        found = read({**result, "audit": {**result["audit"], "conditions": bare}})
        assert found.survival is None
        assert not (found.matrix or found.threats or found.lessons or found.again)

    def test_an_audit_alone_is_a_page(self) -> None:
        page = render({"audit": {"model": "a", "baseline": "b"}})
        assert page.count("was not measured") >= 4
        assert "Resistance ? not enough evidence" in text(page)
        assert 'id="audit"' not in render({"audit": None})

    def test_agreement_beyond_chance_is_shown_where_it_is_known(self, result: dict[str, Any]) -> None:
        row = {"judges": ["A", "B"], "raw": 0.9, "kappa": 0.7, "alpha": None, "unscored": [2, 1], "n": 40}
        found = read({**result, "audit": {**result["audit"], "judges": [row]}}).judges
        assert [(one.names, one.mean, one.more) for one in found] == [("A and B", "0.90", "κ 0.70, 3 unscored")]
        none = copy.deepcopy(result)
        none["battery"]["judges"] = []
        assert "One judge only" in text(render(none))


def test_hostile_text_makes_no_element(result: dict[str, Any]) -> None:
    small = large_audit(attacks=8)
    bad = copy.deepcopy(small)
    report = bad["audit"]
    for one in report["conditions"]:
        one["says"] += HOSTILE
        for claim in one["claims"]:
            claim["name"] += HOSTILE
            claim["says"] += HOSTILE
    for row in report["conditions"][2]["details"]["matrix"]:
        row["domain"] += HOSTILE
        row["threat"] += HOSTILE * (row["threat"] != "sft")
    for row in report["conditions"][3]["details"]["pairs"]:
        row["task"] += HOSTILE
    for key in ("tier", "domain", "model", "baseline"):
        report[key] += HOSTILE
    report["supports"] = report["cannot"] = [HOSTILE]
    report["overlaps"] = [{"with": HOSTILE, "kind": HOSTILE, "defence": HOSTILE, "shared": 1, "of": 2}]
    report["judges"] = [{"judges": [HOSTILE, HOSTILE], "defence": HOSTILE, "attack": HOSTILE, "agreement": 0.5}]
    page = render(bad)
    assert {tag for tag, _ in Elements(page).tags} <= {tag for tag, _ in Elements(render(small)).tags}
    assert page.count("<script") == page.count("</script") == 2
    assert not re.search(r"<[^>]*\son\w+=", re.sub(r'"[^"]*"', '""', page))
    assert "\u202e" not in page
    assert not any("style" in attributes for _, attributes in Elements(page).tags)
