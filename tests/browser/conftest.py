"""The browser that all tests of pages share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from visiting import ARGS, Visit


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    """Debian's Chromium, headless."""
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(chromium), headless=True, args=ARGS)
        yield found
        found.close()


@pytest.fixture
def visits(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Open a page, so many pixels wide; closed again after the test."""
    opened: list[Visit] = []

    def go(page: Path, width: int = 1280, **options: Any) -> Visit:
        opened.append(Visit(browser, page, viewport={"width": width, "height": 900}, **options))
        return opened[-1]

    yield go
    for one in opened:
        one.context.close()
