from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.api.conftest import new_run, run, server
from tests.api.server import Server

__all__ = ["new_run", "run", "server"]

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Complaints:
    """Errors on the browser's console, but for those that a test expects."""

    def __init__(self) -> None:
        self.expected = "$."  # a pattern that nothing matches
        self.found: list[str] = []

    def hear(self, text: str) -> None:
        if not re.match(self.expected, text):
            self.found.append(text)


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


@pytest.fixture
def page(server: Server, browser: Browser, complaints: Complaints) -> Iterator[Page]:
    """Closed before its server stops."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(15_000)
    page = context.new_page()
    page.on("console", lambda message: complaints.hear(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.hear(str(error)))
    yield page
    context.close()
    assert complaints.found == []
