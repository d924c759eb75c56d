"""The page of a battery in a real Chromium, as large as it gets: silent, narrow enough, whole on paper."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from immunity.report.page import write
from visiting import OPEN, Visit

pytestmark = pytest.mark.browser

large_battery: Callable[..., dict[str, Any]] = runpy.run_path(
    str(Path(__file__).parents[1] / "fixtures" / "large_battery.py")
)["large_battery"]


@pytest.fixture(scope="module")
def battery_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 attacks on 3 models."""
    return write(large_battery(), tmp_path_factory.mktemp("battery") / "report.html")


@pytest.fixture
def visit(visits: Callable[..., Visit], battery_page: Path) -> Callable[..., Visit]:
    """Open the page."""
    return partial(visits, battery_page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_folded_and_unfolded_it_fits_in_silence(visit: Callable[..., Visit], width: int, scheme: str) -> None:
    one = visit(width, color_scheme=scheme)
    folded = one.page.evaluate("document.documentElement.scrollHeight")
    assert folded < 25_000, "a mile of page"
    one.page.evaluate(OPEN)
    wide, window = one.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window, "the page scrolls sideways"
    assert one.errors == []
    assert one.requests == []


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_in_a_card_is_cut_or_lies_over_another(visit: Callable[..., Visit], width: int) -> None:
    page = visit(width).page
    assert page.locator("#battery .card").count() == 3
    over = page.evaluate(
        """() => [...document.querySelectorAll('.card, .card *, .tried td, .tried td *')]
            .filter((e) => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
                && getComputedStyle(e).display !== 'inline').map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert over == []
    right = page.evaluate(
        """() => [...document.querySelectorAll('.card')].filter((card) =>
            [...card.querySelectorAll('*')].some((e) =>
                e.getBoundingClientRect().right > card.getBoundingClientRect().right + 1)).length"""
    )
    assert right == 0


def test_on_a_phone_each_result_says_whose_it_is(visit: Callable[..., Visit]) -> None:
    page = visit(375).page
    cell = page.locator(".tried td").first
    assert cell.locator(".who").is_visible()
    assert cell.locator(".badge").is_visible()
    assert cell.locator(".whisker").bounding_box()["width"] > 250
    assert not visit(1280).page.locator(".tried td .who").first.is_visible()


def test_the_bar_is_as_long_as_the_harm(visit: Callable[..., Visit]) -> None:
    page = visit().page
    peak = float(page.locator(".tried td .peak b").first.inner_text())
    bar, track = (
        page.locator(f".tried td .whisker .{part}").first.bounding_box()["width"] for part in ("bar", "track")
    )
    assert bar / track == pytest.approx(peak, abs=0.02)


def test_the_source_opens_with_the_keyboard(visit: Callable[..., Visit]) -> None:
    page = visit().page
    first = page.locator(".tried .source").first
    assert not first.locator("p").is_visible()
    first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert first.locator("p").is_visible()


def test_a_budget_can_be_read_off_the_envelope(visit: Callable[..., Visit]) -> None:
    page = visit(375).page
    dot = page.locator("#battery .chart path.dot").first
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator("#tip").is_visible()
    assert "ε = " in page.locator("#tip").inner_text()


def test_a_chart_is_drawn_when_its_attack_is_opened(visit: Callable[..., Visit]) -> None:
    page = visit().page
    folded = page.locator("#figures details").nth(3)
    assert not folded.locator("svg.chart").first.is_visible()
    folded.locator("summary").click()
    box = folded.locator("svg.chart").first.bounding_box()
    assert box["width"] > 300
    assert box["height"] > 150


def test_flags_are_reached_from_the_card(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.locator("#battery .card a.badge").first.click()
    assert page.evaluate("location.hash") == "#flags-1"
    assert page.locator("#flags-1").is_visible()


def test_the_structure_is_one_that_can_be_heard(visit: Callable[..., Visit]) -> None:
    page = visit().page
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.tagName[1]))")
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("svg.chart:not([aria-label])").count() == 0
    targets = set(page.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map((a) => a.getAttribute('href'))"))
    assert all(page.locator(target).count() == 1 for target in targets)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))


def test_on_paper_every_attack_and_reason_is_there(visit: Callable[..., Visit]) -> None:
    page = visit().page
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator(".tried tbody tr:visible").count() == 41
    assert page.locator("#not-run").is_visible()
    assert not page.locator("nav").is_visible()
