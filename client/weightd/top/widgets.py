"""A widget that shows lines of styled text and draws only those that have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from weightd.top.lines import Glyphs, Line

if TYPE_CHECKING:
    from textual import events

STYLES: Mapping[str, Style] = {
    name: Style.parse(style)
    for name, style in {
        "": "",
        "title": "bold",
        "head": "bold underline",
        "dim": "dim",
        "good": "green",
        "warn": "magenta",
        "bad": "bold red",
        "selected": "reverse",
        "load": "cyan",
        "pinned": "magenta",
        "leased": "green",
        "idle": "blue",
        "in flight": "cyan",
        "holes": "",
        "pool": "",
        "free": "dim",
        "others": "red",
        "green": "green",
        "cyan": "cyan",
        "yellow": "magenta",
        "red": "red",
    }.items()
}
"""Styles of spans. All are colours of the terminal's own palette that can be read on a light and on a dark ground."""


class LinesView(Widget):
    """Shows lines, one below the other. It is as high as they are, unless its style says otherwise."""

    DEFAULT_CSS = "LinesView { height: 1; }"

    class Clicked(Message):
        """A click on a line, by its number from 0."""

        def __init__(self, view: LinesView, line: int) -> None:
            super().__init__()
            self.view = view
            self.line = line

        @property
        def control(self) -> LinesView:
            """The view that was clicked."""
            return self.view

    def __init__(self, glyphs: Glyphs, *, id: str | None = None, fitted: bool = True) -> None:
        super().__init__(id=id)
        self._glyphs = glyphs
        self._fitted = fitted
        self._lines: list[Line] = []
        self.display = not fitted

    def show(self, lines: Sequence[Line]) -> None:
        """Replace the lines."""
        before, self._lines = self._lines, list(lines)
        if self._fitted and len(lines) != len(before):
            self.styles.height = len(lines)
            self.display = bool(lines)
        for at in range(max(len(before), len(lines))):
            if before[at : at + 1] != self._lines[at : at + 1]:
                self.refresh(Region(0, at, self.size.width, 1))

    def text(self) -> str:
        """Return the lines without their styles."""
        return "\n".join("".join(text for text, _ in line) for line in self._lines)

    def render_line(self, y: int) -> Strip:
        """Draw one line."""
        line = self._lines[y] if y < len(self._lines) else ()
        strip = Strip([Segment(self._drawn(text), STYLES[style]) for text, style in line])
        return strip.adjust_cell_length(self.size.width, STYLES[""])

    def on_click(self, event: events.Click) -> None:
        """Tell which line was clicked."""
        self.post_message(self.Clicked(self, event.y))

    def _drawn(self, text: str) -> str:
        return text.replace("…", "~") if self._glyphs.plain else text
