"""What a page and a terminal show of a battery."""

from __future__ import annotations

import copy
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from immunity.cli import tables
from immunity.metrics.curves import curves
from immunity.report import show
from immunity.report.battery import battery, facts
from immunity.report.battery_rows import counted, ranked
from immunity.report.battery_words import FLAGS
from immunity.report.charts import Dot, Frame, Line, specification
from immunity.report.envelope import envelopes
from immunity.report.look import look
from immunity.report.page import render
from read_page import HOSTILE, Elements
from read_page import text as read_text

large_battery: Callable[..., dict[str, Any]] = runpy.run_path(
    str(Path(__file__).parents[1] / "fixtures" / "large_battery.py")
)["large_battery"]


def text(page: str) -> str:
    """What a reader sees: here a number and its unit are one word."""
    return read_text(page, "")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """40 attacks on 3 models."""
    return large_battery()


@pytest.fixture(scope="module")
def page(result: dict[str, Any]) -> str:
    return render(result)


@pytest.fixture(scope="module")
def section(page: str) -> str:
    return page.split('<section class="charts" id="battery"')[1].split("</section>", maxsplit=1)[0]


class TestSection:
    def test_it_comes_first_and_only_with_a_battery(self, page: str, result: dict[str, Any]) -> None:
        assert 0 < page.index('id="battery"') < page.index('id="verdicts"')
        plain = {key: value for key, value in result.items() if key not in {"battery", "failures", "skipped"}}
        small = {**plain, "curves": plain["curves"][:2]}
        assert 'id="battery"' not in render(small)

    def test_every_model_has_its_verdict_and_numbers(self, section: str, result: dict[str, Any]) -> None:
        seen = text(f"<p>{section}")
        for model in result["battery"]["summary"]["models"]:
            assert model["verdict"] in seen
            one = model["w1"]
            assert f"{one['value']:.2f} [{one['low']:.2f}–{one['high']:.2f}]{one['attack']}, seed 1" in seen
        assert "20 ×" in seen
        assert "> 2,000" in seen
        assert "3.4×10¹³" in seen

    def test_version_digest_and_bounds_are_said(self, section: str) -> None:
        seen = text(f"<p>{section}")
        assert "Version 1, digest 20517624450a" in seen
        assert "cut to at most 250 steps" in seen
        assert "ran to its end" in seen
        assert "4 trials searched" in seen
        stopped = text(render(large_battery(3, exhaustive=False)))
        assert "Attacks stopped once the model was broken" in stopped
        assert "ran to its end" not in stopped
        halfway = large_battery(3)
        halfway["battery"]["whole_curves"] = False
        seen = text(render(halfway))
        assert "each ended once it had broken the model" in seen
        assert "ran to its end" not in seen

    def test_flags_have_number_name_meaning_value_limit_and_place(self, section: str) -> None:
        seen = text(f"<p>{section}")
        assert "11 data overlap forbids to conclude “not broken” " + FLAGS[11] in seen
        assert "the attacker's restricted rows: the defence has seen 3 of 400 examples" in seen
        assert "(0.0075, limit 0)" in seen
        assert set(FLAGS) == set(range(1, 12))

    def test_what_did_not_run_says_why(self, section: str) -> None:
        seen = text(f"<p>{section}")
        assert "diverged: the loss is NaN at step 31 (runs/ctrap-1/model)" in seen
        assert "crashed: out of memory: take fewer rows at once (runs/ctrap-12/model) CRASH-1" in seen
        assert "skipped: broken by RA-2 already (every model)" in seen

    def test_a_source_stands_behind_each_name(self, section: str) -> None:
        assert "arXiv 0000.00000, script/attack (read); &lt;made up&gt; &amp; harmless" in section
        assert section.count('<details class="source">') == 41

    def test_a_result_without_a_summary_gets_the_same_section(self) -> None:
        whole, bare = large_battery(4), large_battery(4, summed=False)
        before = copy.deepcopy(bare)
        assert render(bare) == render(whole)
        assert bare == before


class TestRows:
    def test_the_strongest_comes_first(self, result: dict[str, Any]) -> None:
        models = result["battery"]["summary"]["models"]
        rows = ranked(result, models)
        peaks = [max((c.peak or 0.0 for c in row.cells if "ctrap" in c.model), default=0.0) for row in rows]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] > 0.9
        assert {rows[-1].name, rows[-2].name} == {"CRASH-1", "GRID-full-33e-05"}
        told = {(row.name, row.says) for row in rows}
        assert ("CRASH-1", "Needs more memory.") in told

    def test_every_status_is_counted_once(self, result: dict[str, Any]) -> None:
        rows = ranked(result, result["battery"]["summary"]["models"])
        counts = counted(rows, "runs/ctrap-12/model")
        assert sum(counts.values()) == len(rows) == 41
        assert {"broke", "not broken", "crashed", "skipped"} <= set(counts)
        assert "diverged" in counted(rows, "runs/ctrap-1/model")

    def test_seeds_of_an_attack_share_a_row(self) -> None:
        row = {"attack": "A", "unit": "steps", "fresh": "", "decisive": True, "low": 0.2, "high": 0.9, "error": ""}
        seeds = [
            {**row, "seed": 1, "status": "not broken", "peak": 0.05, "at": None, "last": 30},
            {**row, "seed": 2, "status": "broke", "peak": 0.5, "at": 10, "last": 30},
            {**row, "seed": 3, "status": "broke", "peak": 0.9, "at": 20, "last": 30, "fresh": "recipe"},
        ]
        model = {"model": "m", "role": "defended", "phi": 0.1, "attacks": seeds}
        (found,) = ranked({"curves": [{"defence": "m", "attack": "A", "planned": 30}]}, [model])
        (cell,) = found.cells
        assert (cell.status, cell.peak, cell.where) == ("broke", 0.5, "at step 10 of 30")
        assert cell.note == "2 seeds, peaks 0.05–0.50, 1 broke"

    def test_a_break_within_the_draw_of_the_prompts_is_called_so(self) -> None:
        row = {"attack": "A", "status": "broke", "decisive": False, "peak": 0.12, "low": 0.05, "high": 0.3, "at": 1}
        row |= {"unit": "directions", "last": 1, "error": "broken: nothing is left to show"}
        (found,) = ranked({}, [{"model": "m", "role": "defended", "phi": 0.1, "attacks": [row]}])
        assert found.cells[0].status == "perhaps broke"
        assert found.cells[0].where == "at 1 direction"
        assert found.cells[0].note == ""


class TestEnvelope:
    def test_a_line_for_each_model_and_ability_and_a_level_for_what_is_tolerated(self, result: dict[str, Any]) -> None:
        models = result["battery"]["summary"]["models"]
        panels = envelopes(models, "useful_harm", look(result, curves(result)).colours)
        assert [panel.title for panel in panels] == ["Counted in training examples", "Counted in training tokens"]
        lines = re.findall(r'<path aria-label[^>]*stroke-width="2.2"|<path[^>]*stroke-width="2.2"[^>]*>', panels[0].svg)
        assert len(lines) == 6
        assert sum('stroke-dasharray="6,3"' in line for line in lines) == 3
        assert panels[0].svg.count('stroke-dasharray="1,3"') == 1

    def test_a_budget_buys_what_a_smaller_one_bought(self) -> None:
        frame = Frame("x", "y", 2000, 1, (0, 10, 100, 1000), "says", levels=(0.1, 0.3), least=8)
        spec = specification([Line(1, 0, [Dot(0, 0.0), Dot(8, 0.5), Dot(2000, 0.5)])], frame)
        bold = next(layer for layer in spec["layer"] if layer["data"]["name"] == "bold")
        assert bold["mark"]["interpolate"] == "step-after"
        assert bold["encoding"]["x"]["scale"]["constant"] == 8
        assert [row["y"] for row in spec["datasets"]["level"]] == [0.1, 0.3]

    def test_without_costs_there_is_no_chart(self) -> None:
        assert envelopes([{"model": "m", "phi": 0.1, "envelope": {}}], "harm", {"m": 0}) == []


class TestSize:
    def test_forty_attacks_on_three_models_stay_below_three_megabytes(self, page: str) -> None:
        assert len(page.encode()) < 3_000_000
        assert "per_prompt" not in page

    def test_what_is_there_of_each_attack_is_folded(self, page: str) -> None:
        tags = Elements(page).tags
        unfolded = [t for t, a in tags if t == "details" and "open" in a]
        assert unfolded == []
        assert page.count("<figure>") == 2 + 2 * 38  # the envelope, and two charts for each attack that has a curve
        assert 'id="every-verdict"' in page
        assert "more prompts are in the result" in page

    def test_few_attacks_keep_their_figures(self) -> None:
        seen = render(large_battery(5))
        assert 'id="every-verdict"' not in seen
        assert "No training, changes of template" in seen
        assert "No training, % of weights pruned" in seen
        assert "harm returned <small>1 direction</small>" in seen


class TestGaps:
    def test_only_failures(self) -> None:
        result = large_battery(4, summed=False)
        result |= {"curves": [], "attacks": [], "defences": []}
        seen = text(render(result))
        assert "No conclusion: no attack was measured, 1 crashed, 1 skipped." in seen
        assert "out of memory" in seen

    @pytest.mark.parametrize("given", [None, {}, [], "standard", {"summary": {"models": []}}, {"name": "smoke"}])
    def test_odd_batteries(self, given: object) -> None:
        assert "Verdicts" in render({"battery": given})

    @pytest.mark.parametrize("gone", ["useful_harm", "general_accuracy", "examples", "seconds"])
    def test_numbers_that_were_not_recorded(self, gone: str) -> None:
        result = large_battery(4, summed=False)
        for curve in result["curves"]:
            for point in curve["points"]:
                point["metrics"].pop(gone, None)
                point.pop(gone, None)
                point.pop("per_prompt")
        assert "Battery" in text(render(result))

    def test_curves_that_are_no_fine_tuning_are_not_called_that(self) -> None:
        result = large_battery(5)
        del result["battery"]
        result["attacks"] = [row for row in result["attacks"] if row["threat"] == "edit"]
        names = {row["name"] for row in result["attacks"]}
        result["curves"] = [row for row in result["curves"] if row["attack"] in names]
        result["curves"][0]["ended"] = "diverged: of its own"
        seen = text(render(result))
        assert "and each copy was then attacked in 3 ways" in seen
        assert "no success up to 50 % of weights pruned" in seen
        assert "Ended early. runs/ctrap-12/model, seed 1: diverged: of its own" in seen
        assert "count in % of weights pruned, changes of template, not in steps" in seen

    def test_hostile_words_make_no_element(self) -> None:
        def renamed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: renamed(item) for key, item in value.items()}
            if isinstance(value, list):
                return [renamed(item) for item in value]
            return f"{value}{HOSTILE}" if value in words else value

        words = {"runs/ctrap-12/model", "RA-2", "abliteration", "Takes two refusal directions out.", "standard"}
        words |= {"broken by RA-2 already", "out of memory: take fewer rows at once", "20517624450a", "alpaca"}
        plain = large_battery(4, summed=False)
        hostile = renamed(plain)
        kinds = {tag for tag, _ in Elements(render(plain)).tags}
        seen = render(hostile)
        assert {tag for tag, _ in Elements(seen).tags} <= kinds
        assert seen.count("<script") == seen.count("</script") == 2
        assert "\u202e" not in seen
        assert "window.pwned=2>{{7*7}}[U+202E]" in Elements(seen).text

    def test_a_traceback_is_there_once_and_folded(self, result: dict[str, Any]) -> None:
        other = copy.deepcopy(result)
        told = {
            "seed": 1,
            "error": "RuntimeError: <no> luck",
            "details": "Traceback\n  in work\nRuntimeError: <no> luck",
        }
        names = [str(row["model"]) for row in other["battery"]["summary"]["models"]]
        other["failures"] = [{"defence": name, "attack": "RA-2", **told} for name in names]
        other["failures"].append(
            {"defence": names[0], "attack": "PRE-ask", "seed": 1, "error": "refused", "details": ""}
        )
        page = Elements(render(other))
        assert page.text.count("in work\nRuntimeError: <no> luck") == 1
        assert f"RA-2 on {names[0]} and {len(names) - 1} more" in page.text

    def test_how_it_was_asked_is_said_where_nobody_asks_plainly(self, result: dict[str, Any]) -> None:
        model = result["battery"]["summary"]["models"][0]
        assert "asked as" not in facts({**model, "asked": "plain"})[-1].note
        assert facts({**model, "asked": "prefill"})[-1].note.startswith(
            "harm before any attack, asked as prefill: no attack asks plainly; general ability"
        )

    def test_the_view_is_none_without_a_battery(self) -> None:
        assert battery({}, look({}, ())) is None


class TestTerminal:
    @pytest.fixture
    def shown(self, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
        console = Console(width=80, record=True, highlight=False, file=None)
        monkeypatch.setattr(tables, "out", console)
        tables.battery_tables(result)
        return console.export_text()

    def test_verdicts_then_attacks_then_flags_then_counts(self, shown: str) -> None:
        places = [shown.index(word) for word in ("Broken at", "W1, ", "W2, ", "breaks at", "the strongest 10 of 41")]
        places += [shown.index("11 data overlap, grave"), shown.index("what became of the attacks")]
        assert places == sorted(places)
        assert "17 broke" in shown
        assert "report.html" in shown

    def test_it_fits_into_eighty_columns(self, shown: str) -> None:
        assert max(map(len, shown.splitlines())) <= 80

    def test_nothing_to_show_is_no_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        console = Console(width=80, record=True, highlight=False)
        monkeypatch.setattr(tables, "out", console)
        tables.battery_tables({})
        assert "Traceback" not in console.export_text()

    def test_curves_in_other_units_and_without_points(self, result: dict[str, Any]) -> None:
        pruned = next(row for row in result["curves"] if row["attack"] == "W-PRUNE")
        console = Console(width=80, record=True, highlight=False)
        console.print(tables.curve_table(pruned))
        assert console.export_text().splitlines()[1].split()[0] == "%"
        assert tables.curve_table({"points": []}).row_count == 0
        odd = {"curves": [{"defence": "d", "attack": "A", "points": []}], "verdicts": [], "attacks": []}
        odd["attacks"] = [{"name": "A", "threat": "edit"}]
        console.print(tables.verdicts(odd))
        assert "failed" in console.export_text()


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        (show.reached(1200), "step 1,200"),
        (show.reached(1, "directions"), "1 direction"),
        (show.reached(2, "directions"), "2 directions"),
        (show.reached(1, "changes of template"), "1 change of template"),
        (show.reached(30, "% of weights pruned"), "30 % of weights pruned"),
        (show.reached(8, "bits fewer than 16"), "8 bits fewer than 16"),
        (show.reached(2, "rank"), "rank 2"),
        (show.span(0.1, 0.25), "0.10–0.25"),
        (show.span(None, 0.25), ""),
        (show.budget(None), "–"),
        (show.budget(0), "0"),
        (show.budget(0.4), "0.4"),
        (show.budget(2000), "2,000"),
        (show.budget(1_310_000), "1.31 million"),
        (show.budget(3.36e13), "3.4×10¹³"),
    ],
)
def test_budgets_read_well(shown: str, told: str) -> None:
    assert shown == told
