"""The page of a probe in a real Chromium: silent, narrow enough, every chart as wide as its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import made_up_geometry as made
from immunity.report.page import write
from visiting import OPEN, Visit

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(made.result(), tmp_path_factory.mktemp("geometry") / "report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_in_silence(visits: Callable[..., Visit], page: Path, width: int, scheme: str) -> None:
    one = visits(page, width, color_scheme=scheme)
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
