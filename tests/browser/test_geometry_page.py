"""The page of a probe in a real Chromium: silent, narrow enough, every chart as wide as its place."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

import made_up_geometry as made
from immunity.report.page import write

pytestmark = pytest.mark.browser

_PAGES: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("test_page.py")))
Visit = _PAGES["Visit"]
OPEN = "document.querySelectorAll('details').forEach((d) => { d.open = true })"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(made.result(), tmp_path_factory.mktemp("geometry") / "report.html")


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(chromium), headless=True, args=_PAGES["ARGS"])
        yield found
        found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_in_silence(browser: Browser, page: Path, width: int, scheme: str) -> None:
    one = Visit(browser, page, viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        one.page.evaluate(OPEN)
        wide, window = one.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window, "the page scrolls sideways"
        charts = one.page.evaluate(
            "[...document.querySelectorAll('svg.chart')].map((e) => e.getBoundingClientRect().width)"
        )
        assert len(charts) == 2 * len(made.NAMES)
        assert min(charts) > 250
        touching = one.page.evaluate(
            """() => [...document.querySelectorAll('svg.chart .role-axis-label')].flatMap((axis) => {
                const boxes = [...axis.querySelectorAll('text')].map((t) => t.getBoundingClientRect())
                return boxes.slice(1).filter((b, i) => b.left < boxes[i].right && b.top < boxes[i].bottom - 1
                    && boxes[i].top < b.bottom - 1).map((b) => b.left)
            })"""
        )
        assert touching == [], "labels of an axis touch"
        assert one.errors == []
        assert one.requests == []
    finally:
        one.context.close()
