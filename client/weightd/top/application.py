"""The application: shows what the reader publishes, and turns keys into a view, questions and calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from operator import is_not
from time import monotonic
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.widgets import Footer, Input

from weightd.errors import WeightdError
from weightd.top.changes import CHANGES, CheckpointChange, refused
from weightd.top.checkpoint_rows import ORDERS, CheckpointRow, TableRow, TableView, checkpoint_rows, chosen, place
from weightd.top.details import details
from weightd.top.lines import Glyphs, clean, wrapped
from weightd.top.panels import devices, head, loads, recent
from weightd.top.screens import LinesScreen, QuestionScreen, help_lines
from weightd.top.snapshot import DaemonAnswers, DaemonSnapshot
from weightd.top.table import about, table
from weightd.top.widgets import LinesView

if TYPE_CHECKING:
    from textual.screen import Screen

    from weightd.client import Client
    from weightd.top.reader import DaemonReader
    from weightd.types import CheckpointDetails

_FEW_LINES = 30
"""A terminal with fewer lines explains the bars of at most one device, and has fewer events."""
_ABOUT_LINES = 3
_NOTICE_LINES = 4
_NOTICE_SECONDS = 20.0
_WHEEL_ROWS = 3


class TopApp(App[None]):
    """`weightd top`. `start` begins to read the daemon, given the function to publish snapshots with."""

    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None
    CSS = """
    Screen { background: ansi_default; color: ansi_default; layout: vertical; overflow: hidden; }
    #table { height: 1fr; }
    #find { height: 1; display: none; }
    #label { width: 6; }
    #filter { height: 1; width: 1fr; border: none; padding: 0; background: ansi_default; }
    Footer { background: ansi_default; color: ansi_default; }
    FooterKey { background: ansi_default; color: ansi_default; }
    FooterKey .footer-key--key { background: ansi_default; color: ansi_default; text-style: bold; }
    FooterKey .footer-key--description { background: ansi_default; color: ansi_default; }
    QuestionScreen { background: transparent; align: left bottom; }
    LinesScreen { background: ansi_default; }
    #scroll { height: 1fr; scrollbar-size: 0 0; background: ansi_default; }
    #box { padding: 0 1; background: ansi_default; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "Quit", key_display="q", priority=False),
        Binding("s", "sort", "Sort"),
        Binding("S", "reverse", "Reverse", show=False),
        # With priority, so that it is done before the next key, which is the filter's already, is handed on.
        Binding("slash", "filter", "Find", key_display="/", priority=True),
        Binding("enter", "details", "Show", key_display="Enter"),
        Binding("p", "change('pin')", "Pin"),
        Binding("u", "change('unpin')", "Unpin"),
        Binding("r", "change('remove')", "Rm"),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("escape", "all", "All rows", show=False),
        Binding("down,j", "by(1)", "Down", show=False),
        Binding("up,k", "by(-1)", "Up", show=False),
        Binding("pagedown", "by(10)", "Further down", show=False),
        Binding("pageup", "by(-10)", "Further up", show=False),
        Binding("home", "by(-1000000)", "First", show=False),
        Binding("end", "by(1000000)", "Last", show=False),
    ]

    class Read(Message):
        """The reader has published a snapshot."""

        def __init__(self, snapshot: DaemonSnapshot) -> None:
            super().__init__()
            self.snapshot = snapshot

    def __init__(
        self, client: Client, make_reader: Callable[[Callable[[DaemonSnapshot], None]], DaemonReader], glyphs: Glyphs
    ) -> None:
        super().__init__(ansi_color=True)  # the terminal's own colours, light or dark
        self.theme = "ansi-dark"
        self.view = TableView()
        self.snapshot = DaemonSnapshot(datetime.now(UTC))
        self.notice: tuple[str, str] = ("", "")
        """What a change came to, and the style of that sentence."""
        self._noticed = 0.0
        self._client = client
        self._glyphs = glyphs
        self._reader = make_reader(self.publish)
        self._everything: list[CheckpointRow] = []
        self._rows: list[TableRow] = []
        self._made_of: tuple[object, ...] = ()
        self._at = 0
        self._first = 0

    def publish(self, snapshot: DaemonSnapshot) -> None:
        """Show a snapshot soon; called from any thread."""
        self.post_message(self.Read(snapshot))

    def compose(self) -> ComposeResult:
        """Hold one view for each panel."""
        for panel in ("head", "devices", "loads"):
            yield LinesView(self._glyphs, id=panel)
        yield LinesView(self._glyphs, id="table", fitted=False)
        for panel in ("about", "notice", "events"):
            yield LinesView(self._glyphs, id=panel)
        with Horizontal(id="find"):
            yield LinesView(self._glyphs, id="label")
            yield Input(placeholder="text in a name, digest, user or command", id="filter", compact=True, disabled=True)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to read."""
        self.query_one("#label", LinesView).show([(("find: ", "title"),)])
        self.draw()
        self._reader.start()

    def on_unmount(self) -> None:
        """Stop reading."""
        self._reader.stop()

    def on_resize(self) -> None:
        """Draw for the new size."""
        self.call_after_refresh(self.draw)

    @on(Read)
    def _on_read(self, message: Read) -> None:
        self.snapshot = message.snapshot
        self.draw()
        if isinstance(self.screen, LinesScreen):
            self.screen.renew()

    # -- drawing -------------------------------------------------------------------------------------------------------

    @property
    def _main(self) -> Screen[object]:
        """The screen with the table, also while another one is above it."""
        return self.screen_stack[0]

    def draw(self) -> None:
        """Make the lines of all panels; only those that differ are written to the terminal."""
        if not self.is_running:
            return
        main = self._main
        width, height = main.size
        if not width:
            return
        few = height < _FEW_LINES
        snapshot, answers, glyphs = self.snapshot, self.snapshot.answers, self._glyphs
        self._choose(answers)
        panels = {"head": head(snapshot, width, glyphs)}
        if answers is not None:
            explained = not few or len(answers.stats.devices) == 1
            panels["devices"] = devices(answers, width, glyphs, explained=explained)
            panels["loads"] = loads(answers, width, glyphs)
        row = self._rows[self._at] if self._rows else None
        if monotonic() > self._noticed + _NOTICE_SECONDS:
            self.notice = ("", "")
        text, style = self.notice
        if answers is not None:
            told = about(row, self._everything, glyphs) if row or not self.view.wanted else "no row has that text"
            panels["about"] = wrapped(f"{glyphs.selected} {told}", width, _ABOUT_LINES, indent="  ")
        panels["notice"] = wrapped(clean(text, glyphs), width, _NOTICE_LINES, style)
        panels["events"] = recent(snapshot, width, max(min(8, (height - 6) // 3), 0), glyphs)
        for name in ("head", "devices", "loads", "about", "notice", "events"):
            main.query_one(f"#{name}", LinesView).show(panels.get(name, []))
        taken = sum(map(len, panels.values())) + 1 + self._main.query_one("#find").display
        room = max(height - taken, 2)
        self._first = min(max(self._first, self._at - room + 2), self._at, max(len(self._rows) - room + 1, 0))
        lines = table(self._rows, self.view, self._first, room, width, snapshot.at, glyphs)
        main.query_one("#table", LinesView).show(lines)

    def _choose(self, answers: DaemonAnswers | None) -> None:
        """Make the rows if anything that they are made of has changed, and find the selected one again."""
        if answers is None:
            return
        view = self.view
        made_of = (
            *(answers.checkpoints, answers.leases, answers.loads is None, answers.pairs, answers.private),
            *(view.sort, view.reverse, view.wanted),
        )
        if len(made_of) != len(self._made_of) or any(map(is_not, made_of, self._made_of)):
            self._made_of = made_of
            self._everything = checkpoint_rows(answers)
            self._rows = chosen(self._everything, self.view)
        self._select(place(self._rows, self.view.selected, self._at))

    def _select(self, at: int) -> None:
        self._at = min(max(at, 0), max(len(self._rows) - 1, 0))
        row = self._rows[self._at] if self._rows else None
        before = self.view.selected
        self.view = replace(self.view, selected=row.key if row else None)
        if row is not None and row.key != before:
            held = (row.process,) if row.process else row.checkpoint.processes
            self._reader.wake(each.pid for each in held if each.pid is not None)

    # -- keys ----------------------------------------------------------------------------------------------------------

    def action_by(self, rows: int) -> None:
        """Select another row."""
        self._select(self._at + rows)
        self.draw()

    @on(LinesView.Clicked, "#table")
    def _on_clicked(self, message: LinesView.Clicked) -> None:
        at = self._first + message.line - 1
        if message.line and at < len(self._rows):
            self._select(at)
            self.draw()

    def on_mouse_scroll_down(self) -> None:
        """Select a row further down."""
        self.action_by(_WHEEL_ROWS)

    def on_mouse_scroll_up(self) -> None:
        """Select a row further up."""
        self.action_by(-_WHEEL_ROWS)

    def action_sort(self) -> None:
        """Sort by the next order."""
        orders = list(ORDERS)
        following = orders[(orders.index(self.view.sort) + 1) % len(orders)]
        self.view = replace(self.view, sort=following)
        self._say(f"sorted by {following}")

    def action_reverse(self) -> None:
        """Turn the order around."""
        self.view = replace(self.view, reverse=not self.view.reverse)
        self.draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave the key of the filter to the filter itself and to other screens."""
        if action == "filter":
            return self.focused is None and len(self.screen_stack) == 1
        return super().check_action(action, parameters)

    def action_filter(self) -> None:
        """Ask for a text that rows must have."""
        entry = self.query_one("#filter", Input)
        self.query_one("#find").display = True
        entry.disabled = False
        self.set_focus(entry)
        self.draw()

    @on(Input.Changed, "#filter")
    def _on_filter(self, event: Input.Changed) -> None:
        self.view = replace(self.view, wanted=event.value)
        self.draw()

    @on(Input.Submitted, "#filter")
    def _on_filter_done(self) -> None:
        entry = self.query_one("#filter", Input)
        entry.disabled = True
        self.set_focus(None)
        self.query_one("#find").display = bool(entry.value)
        self.draw()

    def action_all(self) -> None:
        """End the filter and forget the notice."""
        self.notice = ("", "")
        self.query_one("#filter", Input).value = ""
        self._on_filter_done()

    async def action_help(self) -> None:
        """Explain figures and keys."""
        await self.push_screen(LinesScreen(lambda width: help_lines(width, self._glyphs), self._glyphs))

    async def action_details(self) -> None:
        """Show one checkpoint more closely."""
        if not self._rows:
            return
        key = self._rows[self._at].checkpoint.key
        found: list[CheckpointDetails] = []

        def lines(width: int) -> Sequence[tuple[tuple[str, str], ...]]:
            row = next((row for row in self._everything if row.key == key), None)
            if row is None:
                return [(("it is not here any more", "bad"),)]
            return details(row, found[0] if found else None, self._everything, width, self.snapshot.at, self._glyphs)

        screen = LinesScreen(lines, self._glyphs)
        await self.push_screen(screen)
        self._inspect(self._rows[self._at].checkpoint, found, screen)

    @work(thread=True, group="inspect", exit_on_error=False)
    def _inspect(self, row: CheckpointRow, found: list[CheckpointDetails], screen: LinesScreen) -> None:
        try:
            found.append(self._client.inspect(row.info.content_digest or row.info.name, row.info.device))
        except WeightdError as error:
            self.call_from_thread(self._say, str(error), "bad")
        else:
            self.call_from_thread(lambda: screen.renew() if screen.is_mounted else None)

    # -- changes -------------------------------------------------------------------------------------------------------

    async def action_change(self, what: str) -> None:
        """Ask whether to change the selected checkpoint, and do so after a yes."""
        if not self._rows:
            return
        row, change = self._rows[self._at].checkpoint, CHANGES[what]

        def answered(yes: bool | None) -> None:
            if yes:
                self._change(change, row)

        question = clean(change.question(row), self._glyphs)
        await self.push_screen(QuestionScreen(question, self._glyphs), answered)

    @work(thread=True, group="change", exit_on_error=False)
    def _change(self, change: CheckpointChange, row: CheckpointRow) -> None:
        try:
            said, style = change.call(self._client, row), "good"
        except WeightdError as error:
            said, style = refused(error, row), "bad"
        self.call_from_thread(self._say, said, style)
        self._reader.wake()

    def _say(self, text: str, style: str = "") -> None:
        self.notice, self._noticed = (text, style), monotonic()
        self.draw()
