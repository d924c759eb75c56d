"""The page of an audit in a real Chromium: silent, narrow enough, whole on paper; its links unfold what they name."""

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

large_audit: Callable[..., dict[str, Any]] = runpy.run_path(
    str(Path(__file__).parents[1] / "fixtures" / "large_audit.py")
)["large_audit"]


@pytest.fixture(scope="module")
def audit_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(large_audit(), tmp_path_factory.mktemp("audit") / "report.html")


@pytest.fixture
def visit(visits: Callable[..., Visit], audit_page: Path) -> Callable[..., Visit]:
    """Open the page."""
    return partial(visits, audit_page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_folded_and_unfolded_it_fits_in_silence(visit: Callable[..., Visit], width: int, scheme: str) -> None:
    one = visit(width, color_scheme=scheme)
    assert one.page.evaluate("document.documentElement.scrollHeight") < 15_000
    one.page.evaluate(OPEN)
    wide, window = one.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window, "the page scrolls sideways"
    assert one.errors == []
    assert one.requests == []


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_cut_squeezed_or_lies_over_another(visit: Callable[..., Visit], width: int) -> None:
    page = visit(width).page
    assert page.locator("#audit .card").count() == 4
    over = page.evaluate(
        """() => [...document.querySelectorAll('#audit .card, #audit .card *, .matrix td, .matrix td *, .forest *')]
            .filter((e) => e.offsetParent && e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 1
                && getComputedStyle(e).display !== 'inline' && !e.closest('thead'))
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert over == []
    squeezed = page.evaluate(
        """() => [...document.querySelectorAll('#audit .who, #audit .what, #audit .outcome')]
            .filter((e) => e.offsetParent && e.getBoundingClientRect().width < 60)
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert squeezed == []


def test_a_dot_stands_in_or_out_of_the_band_as_its_verdict_says(visit: Callable[..., Visit]) -> None:
    page = visit(375).page
    for verdict, inside in (("good", True), ("bad", False)):
        bar = page.locator(f".forest .bar.{verdict}").first
        line, band = (bar.locator(f".{part}").bounding_box() for part in ("line", "band"))
        found = line["x"] >= band["x"] - 1 and line["x"] + line["width"] <= band["x"] + band["width"] + 1
        assert found == inside


def test_the_strip_leads_to_the_cards(visit: Callable[..., Visit]) -> None:
    page = visit(375).page
    page.locator(".strip a").nth(3).click()
    assert page.evaluate("location.hash") == "#condition-trainability"
    assert page.locator("#condition-trainability").is_visible()


@pytest.mark.parametrize("link", ['#audit a[href^="#flags-"]', 'nav a[href="#tried"]', 'nav a[href="#numbers"]'])
def test_a_link_unfolds_what_it_names(visit: Callable[..., Visit], link: str) -> None:
    page = visit().page
    target = page.locator(link).get_attribute("href")
    assert not page.locator(target).is_visible()
    page.locator(link).click()
    page.wait_for_function("(t) => document.querySelector(t).checkVisibility()", arg=target)
    assert page.locator(target).is_visible()


def test_a_budget_can_be_read_off_the_survival(visit: Callable[..., Visit]) -> None:
    page = visit(375).page
    dot = page.locator("#audit .chart path.dot").first
    dot.scroll_into_view_if_needed()
    box = dot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "survives" in page.locator("#tip").inner_text()


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


def test_on_paper_every_claim_is_there(visit: Callable[..., Visit]) -> None:
    page = visit().page
    total = page.locator("#audit .card .claims li").count()
    assert page.locator("#audit .card .claims li:visible").count() < total
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("#audit .card .claims li:visible").count() == total
    assert page.locator("#battery").is_visible()
    assert not page.locator("nav").is_visible()
