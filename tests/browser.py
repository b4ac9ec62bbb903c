"""A headless Chromium, for tests of the page. They are skipped where there is none."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@contextmanager
def chromium():
    """A browser of Playwright's, until the end of the block."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with Playwright")
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"the page is tested in Chromium, and none of {', '.join(_NAMES)} is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        yield browser
        browser.close()
