"""What opens above the table: a question, one checkpoint, help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer

from weightd.top.lines import Glyphs, Line, wrapped
from weightd.top.widgets import LinesView

if TYPE_CHECKING:
    from textual.app import ComposeResult

_MOST_LINES = 12
HELP: tuple[tuple[str, str], ...] = (
    ("", "Memory of each device, from left to right:"),
    ("pinned", "checkpoints that a pin keeps, and no process"),
    ("leased", "checkpoints that processes hold"),
    ("idle", "checkpoints that nobody keeps: evicted when a load needs room"),
    ("in flight", "granted to loads that have not ended"),
    ("holes", "freed between checkpoints; the next load can use it"),
    ("pool", "freed and kept for the next load"),
    ("free", "the rest of the budget"),
    ("others", "in the budget, but used by other programs on the device"),
    ("", ""),
    ("", "Checkpoints:"),
    ("SIZE", "bytes of all its tensors"),
    ("ALONE", "bytes that nobody else uses: what removing it gives back"),
    ("SHARED", "bytes that other checkpoints use, too"),
    ("USED", "time since it was last attached or loaded"),
    ("private", "what a process has copied of all weights that it holds, by writing to them; unknown for processes of "
     "other users"),
    ("", ""),
    ("", "Keys:"),
    ("↑ ↓ j k", "select a row; PgUp, PgDn, Home and End go further"),
    ("Enter", "show the checkpoint: components, partners, processes"),
    ("s, S", "sort by the next column; turn the order around"),
    ("/", "show only what has this text in a name, digest, user or command; Esc ends that"),
    ("p, u, r", "pin, unpin, remove the checkpoint, after a question"),
    ("q", "quit"),
)  # fmt: skip
_HELP_LABEL = 10
_PLAIN_KEYS = {"↑ ↓ j k": "j k"}


def help_lines(width: int, glyphs: Glyphs) -> list[Line]:
    """Explain the figures and the keys."""
    lines: list[Line] = []
    for label, text in HELP:
        if not label:
            lines.append(((text, "title"),) if text else ())
            continue
        mark = f"{glyphs.parts[label]} " if label in glyphs.parts else ""
        shown = _PLAIN_KEYS.get(label, label) if glyphs.plain else label
        broken = wrapped(text, width - _HELP_LABEL - 4, _MOST_LINES)
        for at, line in enumerate(broken):
            start = f"  {mark}{shown}" if at == 0 else ""
            lines.append(((f"{start:<{_HELP_LABEL + 4}}", label if mark else "head" if at == 0 else ""), *line))
    return lines


class QuestionScreen(ModalScreen[bool]):
    """Asks a question, and answers True only for the key y."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "Yes"),
        Binding("n,escape,q,enter", "dismiss(False)", "No", key_display="n"),
    ]

    def __init__(self, question: str, glyphs: Glyphs) -> None:
        super().__init__()
        self.question = question
        self._glyphs = glyphs

    def compose(self) -> ComposeResult:
        """Hold the question and the keys."""
        yield LinesView(self._glyphs, id="box")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Show the question."""
        self._fill()

    def on_resize(self) -> None:
        """Break the question into lines anew."""
        self._fill()

    def _fill(self) -> None:
        width = max(self.app.size.width - 2, 1)
        answer: Line = (("y", "title"), (" yes   ", ""), ("n", "title"), (" no", ""))
        self.query_one("#box", LinesView).show([*wrapped(self.question, width, _MOST_LINES, "title"), (), answer])


class LinesScreen(ModalScreen[None]):
    """Shows lines in the whole terminal, and more of them when one scrolls."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter,question_mark", "dismiss", "Back", key_display="Esc"),
        Binding("down,j", "by(1)", "Scroll", key_display="j k"),
        Binding("up,k", "by(-1)", "Up", show=False),
        Binding("pagedown,space", "by(10)", "Further down", show=False),
        Binding("pageup", "by(-10)", "Further up", show=False),
    ]

    def __init__(self, make: Callable[[int], Sequence[Line]], glyphs: Glyphs) -> None:
        super().__init__()
        self._make = make
        self._glyphs = glyphs

    def compose(self) -> ComposeResult:
        """Hold the lines and the keys."""
        with VerticalScroll(id="scroll", can_focus=False):
            yield LinesView(self._glyphs, id="box")
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Show the lines."""
        self.renew()

    def on_resize(self) -> None:
        """Make the lines for the new width."""
        self.renew()

    def renew(self) -> None:
        """Make the lines again: what they tell may have changed."""
        self.query_one("#box", LinesView).show(self._make(max(self.app.size.width - 2, 1)))

    def action_by(self, lines: int) -> None:
        """Scroll."""
        self.query_one("#scroll", VerticalScroll).scroll_relative(y=lines, animate=False)
