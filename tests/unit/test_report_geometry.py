"""What a page shows of a trap's geometry: a diagnostic, readable without seeing, with nothing in it that can act."""

from __future__ import annotations

import copy
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import made_up_geometry as made
from immunity.metrics.curves import curves
from immunity.report.charts import Dot, Frame, Line, specification
from immunity.report.geometry import geometry
from immunity.report.geometry_words import DIAGNOSTIC, LIMITS, NAMES, findings, interval, length, number, sentence
from immunity.report.look import look
from immunity.report.page import render
from read_page import HOSTILE, Elements, text

large_audit: Callable[..., dict[str, Any]] = runpy.run_path(
    str(Path(__file__).parents[1] / "fixtures" / "large_audit.py")
)["large_audit"]


@pytest.fixture(scope="module")
def page() -> str:
    return render(made.result())


def test_a_page_of_its_own_has_figures_tables_and_no_verdicts(page: str) -> None:
    seen = text(page)
    assert "Geometry around trap" in seen
    for word in ("Trap geometry", "What this does not show", "How it was made", "immunity probe trap"):
        assert word in seen
    ids = {attrs.get("id") for _, attrs in Elements(page).tags}
    assert "geometry" in ids
    assert not {"verdicts", "audit", "battery", "figures"} & ids
    targets = {
        attrs["href"][1:] for tag, attrs in Elements(page).tags if tag == "a" and str(attrs.get("href"))[0] == "#"
    }
    assert targets <= ids
    assert seen.count("t intervals") == 1
    for limit in LIMITS:
        assert " ".join(limit.split()) in seen


def test_it_says_that_it_is_a_diagnostic_and_that_the_loss_falls(page: str) -> None:
    seen = text(page)
    assert "A diagnostic, and no claim." in seen
    assert "Where a trap fires, the collapse loss falls" in seen
    assert "no attack was run" in seen
    assert seen.count("collapse loss, nats (low = fired)") == len(made.NAMES), "every axis says so"
    for word in ("pass", "resists", "protect", "immune "):
        assert not re.search(rf"\b{word}\b", seen), word


def test_every_panel_is_told_in_words(page: str) -> None:
    charts = [attrs for tag, attrs in Elements(page).tags if tag == "svg" and attrs.get("class") == "chart"]
    assert len(charts) == 2 * len(made.NAMES)
    first = str(charts[0]["aria-label"])
    assert first.startswith("Collapse loss against distance, down the harmful gradient.")
    assert re.search(r"trap, collapse loss: 12\.0 at the model, 0\.00 at 2; lowest 0\.00 at 2", first)
    assert "plain, collapse loss: 21.0 at the model, 21.0 at 2" in first
    assert all(len(str(attrs["aria-label"])) > 60 for attrs in charts)


def test_colours_are_the_pages_own(page: str) -> None:
    charts = re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)
    assert len(charts) == 2 * len(made.NAMES)
    for chart in charts:
        for colour in re.findall(r'(?:fill|stroke)="([^"]*)"', chart):
            assert colour in {"none", "transparent"} or colour.startswith("var(--"), colour
    assert 'stroke="var(--d1)"' in charts[0]
    assert 'stroke="var(--d0)"' in charts[0]


def test_what_the_tables_say(page: str) -> None:
    seen = text(page)
    assert "Down the harmful gradient trap 3 of 3 12.0 [12.0 to 12.0]" in seen
    assert "Down the harmful gradient plain 0 of 3 0.00 [0.00 to 0.00] none up to 2 –" in seen
    assert "Cosine of the harmful and benign gradients −0.60 [−0.60 to −0.60] 0.01 [0.01 to 0.01]" in seen
    assert "Curvature down the benign gradient 200.0" in seen
    assert "Its record says that the defence prepares for 6 Adam-like steps of 0.12." in seen
    assert "Not clear: down the benign gradient from 0." in seen


def test_an_audit_has_it_before_its_judges_and_only_if_it_was_measured() -> None:
    result = large_audit()
    audited = result["audit"]
    assert 'id="geometry"' not in render(result)
    shape = made.geometry(made.model("model", audited["model"]), made.model("baseline", audited["baseline"]))
    page = render({**result, "audit": {**audited, "geometry": shape}})
    section = page.split('id="audit"')[1].split("</section>")[0]
    assert section.index('id="lessons"') < section.index('id="geometry"') < section.index('id="judges"')
    assert '<a href="#geometry">Geometry</a>' in page
    assert "What the geometry does not show" in page
    seen = geometry({"audit": {**audited, "geometry": shape}}, look(result, curves(result)))
    assert seen is not None
    colours = look(result, curves(result)).colours
    assert [side.colour for side in seen.sides] == [colours[audited["model"]], colours[audited["baseline"]]]


def test_one_model_alone_and_one_draw_alone() -> None:
    result = made.result(geometry=made.geometry(made.model("model", "trap", draws=1)))
    seen = text(render(result))
    assert "beside" not in seen.split("Trap geometry")[0]
    assert "(in the one draw)" in seen
    assert "hardened" not in seen
    assert "Norm of the harmful gradient 10.0" in seen


def test_without_benign_data_their_directions_are_not_drawn() -> None:
    known = [name for name in made.NAMES if not name.startswith("benign")]
    page = render(made.result(geometry=made.geometry(made.model("model", "trap", names=known))))
    assert page.count('<svg class="chart"') == 2 * len(known)
    assert "Down the benign gradient" not in page


def test_both_ways_and_broken_numbers_are_drawn() -> None:
    one = made.model("model", "trap")
    for row in one["curves"]:
        row["points"].insert(0, {"distance": -1.0, "collapse": 13.0, "general": 0.2, "harmful": 2.0, "benign": 4.0})
        row["points"][-1] |= dict.fromkeys(("collapse", "general", "harmful", "benign"))
    page = render(made.result(geometry=made.geometry(one)))
    assert page.count('<svg class="chart"') == 2 * len(made.NAMES)
    assert "NaN" not in page


def test_nothing_in_it_can_act() -> None:
    one, other = made.model("model", HOSTILE), made.model("baseline", HOSTILE + "2")
    one["curves"] += [
        {**copy.deepcopy(row), "direction": HOSTILE} for row in one["curves"] if row["direction"] == "random"
    ]
    one["simulates"] = [{"steps": 2, "radius": 0.1, "rule": HOSTILE}]
    one["draws"][0]["norms"] = {**one["draws"][0]["norms"], HOSTILE: 1.0}
    page = render(made.result(title=HOSTILE, command=HOSTILE, geometry=made.geometry(one, other, word=HOSTILE)))
    elements = Elements(page)
    assert [tag for tag, _ in elements.tags].count("script") == 2
    assert not any(tag == "img" or name.startswith("on") for tag, attrs in elements.tags for name in attrs)
    assert "\u202e" not in page
    assert "{{7*7}}" in elements.text, "written as it is, not acted upon"


def test_what_is_no_geometry_is_none() -> None:
    for result in ({}, {"geometry": {}}, {"geometry": {"models": [{"name": "x"}]}}, {"audit": {"geometry": None}}):
        assert geometry(result, look({}, [])) is None


def test_sentences_of_basins_that_are_left_again() -> None:
    row = {
        "direction": "harmful-path", "n": 3, "fired": 3, "open": 1, "end": 0.8, "depth": {"mean": 13.9},
        "onset": {"mean": 0.0731}, "width": {"mean": 0.06}, "inside": {"mean": 0.54},
    }  # fmt: skip
    assert sentence(row, 3.667) == (
        "On a path of harmful steps the collapse loss falls below 3.67 at 0.0731 (in each of 3 draws), by 13.9 at the "
        "most, and comes back above it in 2 of 3: it is below it for 0.54 in all."
    )
    assert "comes back above it: it is" in sentence({**row, "open": 0}, 3.667)
    assert "(in 1 of 3 draws)" in sentence({**row, "fired": 1, "open": 1}, 3.667)
    still = {**row, "fired": 0, "onset": None, "depth": {"mean": 0.001}}
    assert sentence(still, 3.667).endswith("stays above 3.67 up to 0.8; it does not fall.")
    assert "beyond" in sentence({**row, "direction": "beyond"}, 1.0)


def test_findings_put_the_harmful_direction_first() -> None:
    said = list(findings(made.geometry()["models"][0]["summary"]))
    assert said[0].startswith("Down the harmful gradient")
    assert said[-1] == "The cosine of the harmful and the benign gradient is −0.60 [−0.60 to −0.60]."
    assert set(NAMES) == set(made.NAMES)
    assert "no claim" in DIAGNOSTIC


def test_numbers_as_people_read_them() -> None:
    assert (number(-0.001), number(-0.6), number(None), length(0.03513), length(2.0)) == (
        "0.00",
        "−0.60",
        "–",
        "0.0351",
        "2",
    )
    assert interval({"mean": 1.0, "low": None, "high": None, "n": 1}) == "1.00"
    assert interval(None) == "–"


def test_an_axis_of_small_numbers_has_labels_that_do_not_touch() -> None:
    dots = [Dot(x, x) for x in made.DISTANCES]
    frame = Frame("distance", "loss", 2.0, 5.0, (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 2.0), "Says.", linear_to=0.01)
    x = specification([Line(0, 0, dots)], frame)["layer"][0]["encoding"]["x"]
    assert x["scale"] == {"domain": [0.0, 2.0], "nice": False, "type": "symlog", "constant": 0.01}
    assert x["axis"]["format"] == "~g"
    assert x["axis"]["values"][0] == 0.0
    assert x["axis"]["values"][-1] == 2.0
    assert len(x["axis"]["values"]) < 7
    both = specification([Line(0, 0, dots)], frame._replace(x_min=-2.0, ticks=(-2.0, 0.0, 2.0)))
    assert both["layer"][0]["encoding"]["x"]["scale"]["domain"] == [-2.0, 2.0]
    assert both["layer"][0]["encoding"]["x"]["axis"]["values"] == [-2.0, 0.0, 2.0]
