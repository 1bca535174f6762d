"""`weightd top` in a terminal that textual's own pilot plays: sizes, keys, questions, and what a change came to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from support.fake_client import FakeClient
from weightd.errors import DaemonUnreachableError, InUseError

pytest.importorskip("textual")
app_module = pytest.importorskip("weightd.top.application")
lines = pytest.importorskip("weightd.top.lines")
widgets = pytest.importorskip("weightd.top.widgets")
snapshots = pytest.importorskip("support.top_snapshots")

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from textual.pilot import Pilot

    from support.top_snapshots import StillReader
    from weightd.top.application import TopApp

SIZES = [(60, 30), (80, 30), (160, 48)]
ACTIONS = [("p", "pin", "pinned pipelines/sd-b"), ("u", "unpin", "unpinned pipelines/sd-b; other users keep it pinned")]


class Stage:
    """An application that shows one snapshot, its reader and the client that changes go to."""

    def __init__(self, glyphs: object = lines.UNICODE, **answers: object) -> None:
        self.client = FakeClient()
        self.client.answers |= answers
        self.readers: list[StillReader] = []

        def make(publish: Callable[[object], None]) -> StillReader:
            self.readers.append(snapshots.StillReader(publish))
            return self.readers[0]

        self.app: TopApp = app_module.TopApp(snapshots.client_of(self.client), make, glyphs)

    def play(self, script: Callable[[Pilot[None]], Awaitable[None]], size: tuple[int, int] = (80, 24)) -> None:
        """Run the application and the script."""

        async def run() -> None:
            async with self.app.run_test(size=size) as pilot:
                await pilot.pause()
                await pilot.pause()
                await script(pilot)

        asyncio.run(run())

    def text(self) -> str:
        """What the terminal shows."""
        return "\n".join(line.rstrip() for line in snapshots.lines_of(self.app))

    async def press(self, pilot: Pilot[None], *keys: str) -> None:
        """Press keys, and wait for what they lead to."""
        await pilot.press(*keys)
        await self.app.workers.wait_for_complete()
        await pilot.pause()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("plain", [False, True])
def test_everything_is_on_the_screen(size: tuple[int, int], plain: bool) -> None:
    stage = Stage(lines.ASCII if plain else lines.UNICODE)

    async def script(pilot: Pilot[None]) -> None:
        text = stage.text()
        shown = text.splitlines()
        assert len(shown) == size[1]
        assert max(map(len, shown)) <= size[0]
        assert "serving" in shown[0]
        for said in ("host memory", "736 MiB of 1.00 GiB", "in flight 240 MiB", "holes 8.00 MiB", "a load can get"):
            assert said in text
        for said in ("big", "copying", "40 %", "CHECKPOINT", "ALONE", "pipelines/sd-b", "private 12.0 MiB"):
            assert said in text
        for said in ("private unknown", "900 MiB do not fit", "attached base", "Help"):
            assert said in text
        assert text.isascii() is plain

    stage.play(script, size)


def test_styles_can_be_read_on_light_and_dark_grounds_and_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    hues = {"red", "green", "blue", "magenta", "cyan"}  # white, black and yellow vanish on one ground or the other
    assert {style.color.name for style in widgets.STYLES.values() if style.color} <= hues
    assert not any(style.bgcolor for style in widgets.STYLES.values())
    assert len(set(lines.UNICODE.parts.values())) == len(set(lines.ASCII.parts.values())) == 8
    for theme in ("ansi-dark", "ansi-light"):
        stage = Stage()
        stage.app.theme = theme

        async def script(pilot: Pilot[None], stage: Stage = stage) -> None:
            drawn = [segment for strip in snapshots.strips_of(stage.app) for segment in strip]
            names = {segment.style.color.name for segment in drawn if segment.style and segment.style.color}
            assert names <= hues | {"default"}
            assert {segment.style.bgcolor.name for segment in drawn if segment.style.bgcolor} <= {"default"}

        stage.play(script)
    monkeypatch.setenv("NO_COLOR", "1")
    stage = Stage()

    async def colourless(pilot: Pilot[None]) -> None:
        drawn = [segment for strip in snapshots.strips_of(stage.app) for segment in strip]
        assert {segment.style.color.name for segment in drawn if segment.style and segment.style.color} <= {"default"}
        assert "base" in stage.text()

    stage.play(colourless)


def test_a_new_size_is_drawn_for() -> None:
    stage = Stage()

    async def script(pilot: Pilot[None]) -> None:
        assert "SHARES WITH" in stage.text()
        await pilot.resize_terminal(60, 20)
        await pilot.pause()
        assert "SHARES WITH" not in stage.text()
        assert max(map(len, stage.text().splitlines())) <= 60
        await pilot.resize_terminal(30, 6)
        await pilot.pause()
        await pilot.resize_terminal(160, 48)
        await pilot.pause()
        assert "lease 1, by ada" in stage.text()

    stage.play(script)


def test_keys_select_sort_and_filter() -> None:
    stage = Stage()

    async def script(pilot: Pilot[None]) -> None:
        assert stage.app.view.selected == ("host", snapshots.digest_of("e"))
        assert "SmolLM2-135M-Instruct.safetensors: removing it gives back 92.0 MiB" in stage.text()
        await pilot.press("j", "j", "down", "k", "end")
        assert stage.app.view.selected == ("host", snapshots.digest_of("b"), "4242", "ada")
        assert stage.readers[0].woken[-1] == {4242}
        assert "pid 4242 (ada) holds base and tuned. It has 12.0 MiB of private copies" in stage.text()
        await pilot.press("home", "s")
        assert stage.app.view.sort == "size"
        assert "sorted by size" in stage.text()
        await pilot.press("S", "escape")
        assert stage.app.view.reverse
        assert "sorted by" not in stage.text()
        await pilot.press("slash", *"bob")
        await pilot.pause()
        assert "find: bob" in stage.text()
        assert "private unknown" in stage.text()
        assert "pipelines" not in stage.text()
        assert "4242" not in stage.text().split("▸")[0]
        await pilot.press("enter", "j")
        assert stage.app.view.wanted == "bob"
        await pilot.press("slash", "x")
        await pilot.pause()
        assert "no row has that text" in stage.text()
        await pilot.press("escape")
        await pilot.pause()
        assert "find:" not in stage.text()
        assert "pipelines/sd-a" in stage.text()

    stage.play(script)


def test_the_selected_row_is_in_sight() -> None:
    stage = Stage()
    many = tuple(snapshots.checkpoint(f"{at:02}", f"name-{at:02}", at, 0) for at in range(60))
    answers = replace(snapshots.ANSWERS, checkpoints=many, leases=(), pairs=(), loads=())

    async def script(pilot: Pilot[None]) -> None:
        stage.app.publish(replace(snapshots.SNAPSHOT, answers=answers))
        await pilot.pause()
        for keys, name in (
            (["home"], "name-59"),
            (["end"], "name-00"),
            (["pageup"], "name-10"),
            (["k"] * 9, "name-19"),
        ):
            await pilot.press(*keys)
            await pilot.pause()
            table = stage.text().split("▸")[0]
            assert name in table
            assert f"▸ {name}: removing" in stage.text()
            assert len([line for line in table.splitlines() if line.startswith("name-")]) >= 5

    stage.play(script)


def test_a_click_selects() -> None:
    stage = Stage()

    async def script(pilot: Pilot[None]) -> None:
        row = next(at for at, line in enumerate(stage.text().splitlines()) if line.startswith("pipelines/sd-b"))
        await pilot.click(offset=(5, row))
        await pilot.pause()
        assert stage.app.view.selected == ("host", snapshots.digest_of("d"))

    stage.play(script)


def test_enter_shows_components_partners_and_processes() -> None:
    stage = Stage()

    async def script(pilot: Pilot[None]) -> None:
        await stage.press(pilot, "j", "enter")
        text = stage.text()
        for said in (
            "pipelines/sd-a",
            "unet",
            "text_encoder 20.0 MiB",
            "BOTH GIVE BACK",
            "110 MiB",
            "/models/base",
        ):
            assert said in text
        assert stage.client.calls == [("inspect", snapshots.digest_of("c"), "host")]
        await stage.press(pilot, "escape", "question_mark")
        assert "evicted when a load needs room" in stage.text()
        await stage.press(pilot, "j", "q")
        assert "CHECKPOINT" in stage.text()

    stage.play(script, (100, 30))


@pytest.mark.parametrize(("key", "call", "said"), ACTIONS)
def test_nothing_changes_without_a_yes(key: str, call: str, said: str) -> None:
    stage = Stage()

    async def script(pilot: Pilot[None]) -> None:
        await pilot.press("j", "j", "j", key)
        for answer in ("n", "escape", "enter", "q"):
            await pilot.pause()
            assert "pipelines/sd-b on host?" in stage.text()
            await stage.press(pilot, answer)
            assert stage.client.calls == []
            await pilot.press(key)
        await stage.press(pilot, "y")
        assert stage.client.calls == [(call, snapshots.digest_of("d"), "host")]
        assert said in stage.text()

    stage.play(script)


def test_a_removal_says_what_it_gives_back_and_a_refusal_who_holds_it() -> None:
    held = InUseError(f"checkpoint {snapshots.digest_of('a')} is in use by pid 4242 (serve.py); stop them first")
    stage = Stage(remove=held)

    async def script(pilot: Pilot[None]) -> None:
        await pilot.press("slash", *"base", "enter", "r")
        await pilot.pause()
        asked = " ".join(stage.text().split())
        assert "Remove base on host? That gives back 14.0 MiB; 186 MiB stay, since others use them, too." in asked
        assert "It is held by pid 99 (bob) and pid 4242 (ada), so the daemon will refuse." in asked
        await stage.press(pilot, "y")
        assert "checkpoint base is in use by pid 4242 (serve.py); stop them first" in " ".join(stage.text().split())
        stage.client.answers["remove"] = 14 << 20
        await stage.press(pilot, "r", "y")
        assert "removed base, freed 14.0 MiB" in stage.text()

    stage.play(script)


def test_a_daemon_that_goes_and_comes_back_is_shown() -> None:
    stage = Stage(pin=DaemonUnreachableError("no weightd daemon at /run/w.sock"))

    async def script(pilot: Pilot[None]) -> None:
        gone = replace(
            snapshots.SNAPSHOT,
            problem="no weightd daemon at /run/w.sock",
            since=snapshots.NOW.replace(minute=4, second=0),
        )
        stage.app.publish(gone)
        await pilot.pause()
        assert "NO ANSWER for 5 s: what follows is old" in stage.text().splitlines()[0]
        assert "no weightd daemon at /run/w.sock" in stage.text()
        assert "pipelines/sd-a" in stage.text()
        await stage.press(pilot, "p", "y")
        stage.app.publish(snapshots.SNAPSHOT)
        await pilot.pause()
        assert "NO ANSWER" not in stage.text()

    stage.play(script)


def test_q_ends_it_and_stops_the_reader() -> None:
    stage = Stage()

    async def script(pilot: Pilot[None]) -> None:
        await pilot.press("q")

    stage.play(script)
    assert stage.readers[0].stopped
    assert stage.app.return_code == 0


def test_the_same_rows_are_drawn_once() -> None:
    stage = Stage()

    async def script(pilot: Pilot[None]) -> None:
        table = stage.app.query_one("#table", widgets.LinesView)
        drawn: list[int] = []
        render = table.render_line
        table.render_line = lambda y: (drawn.append(y), render(y))[1]
        stage.app.publish(replace(snapshots.SNAPSHOT))
        await pilot.pause()
        assert drawn == []
        later = replace(snapshots.SNAPSHOT, at=snapshots.NOW.replace(second=6))
        stage.app.publish(later)
        await pilot.pause()
        assert drawn  # a second later ages differ
        assert len(set(drawn)) < len(stage.text().splitlines()) / 2

    stage.play(script)
