"""A real Chromium for tests that look at pages."""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium():
    """A browser, driven by Playwright. For a fixture of a module: while it is open Playwright's event loop
    runs in this thread, and tests of others that call ``asyncio.run`` could not."""
    pytest.importorskip("playwright", reason="Playwright is not installed: no page was looked at")
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        why = "there is no Chromium: no page was looked at; .ci/browser installs one"
        if os.geteuid() == 0 and Path("/etc/debian_version").exists():
            pytest.fail(why)  # here it can be had, and a test that never runs proves nothing
        pytest.skip(why)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()
