"""A browser for the tests of pages. Each page is held to: no error on its console, no request to another host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from support.pages import OpenPage
from support.served_page import served

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
AXE = Path(__file__).parent / "axe" / "axe.min.js"


@pytest.fixture(scope="session")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """Chromium, as the option says."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=request.config.getoption("--chromium"), args=ARGUMENTS, handle_sigint=False
        )
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """Serve the page of a client until the end of the test; returns its address."""
    with ExitStack() as stack:
        yield lambda client: stack.enter_context(served(client))


@pytest.fixture
def open_page(browser: Browser, serve: object) -> Iterator[OpenPage]:
    """Open pages, and see at the end that all were quiet and asked nobody but their own server."""
    opened: list[tuple[Page, str, tuple[str, ...], list[str], list[str]]] = []

    def open_address(address: str, *, width: int = 1280, scheme: Any = "light", expected: tuple[str, ...] = ()) -> Page:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        opened.append((page, address, expected, said, asked))
        page.goto(address)
        return page

    yield open_address
    for page, address, expected, said, asked in opened:
        page.close()
        bad = [message for message in said if not any(part in message for part in expected)]
        assert bad == []
        hosts = {urlsplit(url).netloc for url in asked if not url.startswith("data:")}
        assert hosts == {urlsplit(address).netloc}


@pytest.fixture
def inaccessible() -> Callable[[Page], list[str]]:
    """What axe-core finds on a page that is serious or worse, one line each."""

    def find(page: Page) -> list[str]:
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 10
        return [
            f"{each['id']}: {each['help']}: {[node['html'][:200] for node in each['nodes'][:3]]}"
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        ]

    return find
