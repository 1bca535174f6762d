"""Pages in a browser: how tests open one, and wait for what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from support.daemon import eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDTHS = (1280, 768, 400)


class OpenPage(Protocol):
    """Open an address; `expected` are parts of messages that the console may have."""

    def __call__(
        self, address: str, *, width: int = 1280, scheme: str = "light", expected: tuple[str, ...] = ()
    ) -> Page: ...


def until(page: Page, condition: str) -> None:
    """Wait until an expression of JavaScript holds. Playwright's own wait needs `eval`, which the page forbids."""
    eventually(lambda: page.evaluate(condition), what=condition)


def shown(page: Page) -> None:
    """Wait until the live page shows a map and checkpoints."""
    until(page, "document.querySelector('canvas.map')?.height > 1 && document.querySelector('[data-row]') !== null")


def fits(page: Page) -> bool:
    """Whether nothing makes the page wider than its window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))
