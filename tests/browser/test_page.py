"""The page in a real Chromium: it draws, stays silent, stays harmless, and fits a phone in light and dark."""

from __future__ import annotations

import itertools
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from immunity.report.page import write
from visiting import Visit

pytestmark = pytest.mark.browser

HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "{{7*7}}",
    "\u202egnp.exe",
    '"><svg onload=window.pwned=3>',
)

made_up_result: Callable[..., dict[str, Any]] = runpy.run_path(
    str(Path(__file__).parents[1] / "fixtures" / "made_up.py")
)["made_up_result"]


def poisoned() -> dict[str, Any]:
    """A made-up result in which the model, the names and the settings are hostile."""
    result = made_up_result(defences=("SFT", "CTRAP, K = 12"), seeds=(0,))
    for curve in result["curves"]:
        for point in curve["points"]:
            for i, sample in enumerate(point["samples"]):
                sample["answer"] = sample["prompt"] = sample["expected"] = HOSTILE[i % 4] + HOSTILE[4]
        curve["defence"] += "".join(HOSTILE)
    for defence in result["defences"]:
        defence["name"] += "".join(HOSTILE)
        defence["settings"] = {text: text for text in HOSTILE}
    result["title"] = " ".join(HOSTILE)
    result["command"] = f"immunity demo {' '.join(HOSTILE)}"
    return result


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages under test, as files."""
    folder = tmp_path_factory.mktemp("pages")
    small = made_up_result(defences=("CTRAP, K = 12",), attacks=("AdamW, every weight",), seeds=(0,))
    return {
        "whole": write(made_up_result(), folder / "whole.html"),
        "small": write(small, folder / "small.html"),
        "hostile": write(poisoned(), folder / "hostile.html"),
        "empty": write({}, folder / "empty.html"),
    }


@pytest.fixture
def visit(visits: Callable[..., Visit], pages: dict[str, Path]) -> Callable[..., Visit]:
    """Open one of the pages by name."""
    return lambda name, *args, **options: visits(pages[name], *args, **options)


@pytest.mark.parametrize("name", ["whole", "small", "hostile", "empty"])
@pytest.mark.parametrize("width", [375, 1280])
def test_opens_in_silence_and_fits(visit: Callable[..., Visit], name: str, width: int) -> None:
    one = visit(name, width)
    one.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    wide, window = one.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window, "the page scrolls sideways"
    one.page.wait_for_load_state("networkidle")
    assert one.errors == []
    assert one.requests == []


def test_charts_are_drawn_with_marks(visit: Callable[..., Visit]) -> None:
    page = visit("whole").page
    charts = page.locator("svg.chart")
    assert charts.count() == 22
    for i in range(charts.count()):
        box = charts.nth(i).bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 100
        assert charts.nth(i).locator(".mark-line path").count() > 0
    # 4 defences, 3 attacks and 9 budgets in the first panel.
    assert charts.first.locator("path.dot").count() == 108


def test_hostile_answers_stay_text(visit: Callable[..., Visit]) -> None:
    one = visit("hostile")
    page = one.page
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    page.mouse.move(300, 300)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, iframe, object, embed").count() == 0
    assert page.locator("script").count() == 2
    text = page.locator("body").inner_text()
    for hostile in HOSTILE[:3]:
        assert hostile in text
    assert "[U+202E]gnp.exe" in text
    assert "\u202e" not in text
    assert json.loads(page.locator("#result").text_content() or "")["title"] == " ".join(HOSTILE)
    assert one.errors == []


def test_even_markup_that_got_in_could_not_act(visit: Callable[..., Visit]) -> None:
    one = visit("small")
    escape = "window.pwned = 1"
    one.page.evaluate(
        """(code) => {
            document.body.insertAdjacentHTML('beforeend', `<img src="https://example.invalid/x" onerror="${code}">`);
            document.body.insertAdjacentHTML('beforeend', `<button id="trap" onclick="${code}">x</button>`);
            const script = document.createElement('script');
            script.textContent = code;
            document.body.append(script);
            document.getElementById('trap').click();
        }""",
        escape,
    )
    went = one.page.evaluate("fetch('https://example.invalid/').then(() => 'went', () => 'refused')")
    assert went == "refused"
    assert one.page.evaluate("window.pwned") is None
    assert one.requests == []
    assert any("Content Security Policy" in error for error in one.errors)


@pytest.mark.parametrize("width", [375, 1280])
def test_charts_follow_the_reader_s_colours_when_they_change(visit: Callable[..., Visit], width: int) -> None:
    page = visit("whole", width, color_scheme="light").page
    line = "getComputedStyle(document.querySelector('.chart .mark-line path')).stroke"
    label = "getComputedStyle(document.querySelector('.chart text')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(f"[{line}, {label}, {ground}]")
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(f"[{line}, {label}, {ground}]")
    assert light[2] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit: Callable[..., Visit], scheme: str) -> None:
    page = visit("whole", color_scheme=scheme).page
    contrasts = page.evaluate(
        """() => {
            const light = (c) => {
                const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
                    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            const style = getComputedStyle(document.documentElement);
            const read = (name) => {
                document.body.style.outlineColor = `var(${name})`;
                return light(getComputedStyle(document.body).outlineColor);
            };
            const out = {};
            for (const [ink, ground, least] of [
                ['--ink', '--page', 7], ['--ink-2', '--page', 4.5], ['--ink-2', '--raised', 4.5],
                ['--link', '--page', 4.5], ['--good', '--good-bg', 4.5], ['--bad', '--bad-bg', 4.5],
                ['--mixed', '--mixed-bg', 4.5], ['--plain', '--plain-bg', 4.5],
                ...[0, 1, 2, 3, 4, 5, 6, 7].map((i) => [`--d${i}`, '--page', 3]),
            ]) out[`${ink} on ${ground}`] = [ratio(read(ink), read(ground)), least];
            return out;
        }"""
    )
    assert {pair: found for pair, (found, least) in contrasts.items() if found < least} == {}


def test_a_defence_can_be_hidden(visit: Callable[..., Visit]) -> None:
    page = visit("whole").page
    line = page.locator('.chart path[stroke="var(--d2)"]').first
    assert line.is_visible()
    page.locator("input.show-d2").first.uncheck()
    assert not line.is_visible()
    assert page.locator('.chart path[stroke="var(--d1)"]').first.is_visible()


def test_the_nearest_point_is_told(visit: Callable[..., Visit]) -> None:
    page = visit("small", 375).page
    dot = page.locator("#figure-losses .chart path.dot").nth(3)
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2 + 2, box["y"] + box["height"] / 2 + 2)
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert "CTRAP, K = 12 · AdamW, every weight · step 3" in tip.inner_text()
    shown = tip.bounding_box()
    assert shown is not None
    assert shown["x"] >= 0
    assert shown["x"] + shown["width"] <= 375


def test_the_command_can_be_copied_and_the_numbers_saved(visit: Callable[..., Visit]) -> None:
    one = visit("whole", permissions=["clipboard-read", "clipboard-write"])
    one.page.locator("[data-copy]").click()
    one.page.get_by_text("Copied").wait_for()
    assert one.page.evaluate("navigator.clipboard.readText()") == "immunity demo --out demo --seed 0"
    with one.page.expect_download() as download:
        one.page.locator("[data-save]").click()
    assert download.value.suggested_filename == "numbers.json"
    assert one.errors == []


def test_all_is_there_without_scripts(visit: Callable[..., Visit]) -> None:
    page = visit("whole", java_script_enabled=False).page
    assert page.locator("svg.chart").first.is_visible()
    assert page.locator(".verdicts .badge").first.is_visible()
    assert not page.locator("[data-copy]").is_visible()


def test_folded_parts_are_printed(visit: Callable[..., Visit]) -> None:
    page = visit("whole").page
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.print:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details.print[open]").count() == 0


def test_the_structure_is_one_that_can_be_heard(visit: Callable[..., Visit]) -> None:
    page = visit("whole").page
    assert page.locator("h1").count() == 1
    assert page.locator("main").count() == 1
    assert page.locator("html").get_attribute("lang") == "en-GB"
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("svg.chart:not([aria-label])").count() == 0
    targets = page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((a) => a.getAttribute('href'))")
    assert all(page.locator(target).count() == 1 for target in targets)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
