"""`weightd map`: bars, their legend, and JSON."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from support.fake_client import DIGEST, GIB, MAP, FakeClient, Terminal
from weightd.cli import main
from weightd.inspection import BlobUsers, MapExtent, MapSegment

pytest.importorskip("typer")


def test_a_bar_for_each_segment(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map"]) == 0
    assert fake.calls == [("device_map", None)]
    assert capsys.readouterr().out == (
        "host: 2.25 GiB in 2 segments, 2 checkpoints\n"
        "\n"
        "SEGMENT       SIZE   MAP                                        CHECKPOINTS\n"
        "      3   2.00 GiB   ████████████████████▓▓▓▓▓▓▓▓▓▓░░░░░░░░░░   org/base, cdcdcdcdcdcd\n"
        "      5   1.00 GiB   ▒▒▒▒▒···············                       -\n"
        "\n"
        "MARK       SIZE   IS\n"
        "█      1.00 GiB   used by one checkpoint\n"
        "▓       512 MiB   shared by several checkpoints\n"
        "▒       256 MiB   granted to loads under way\n"
        "░       512 MiB   free, for the next load\n"
        "·       768 MiB   free, without memory\n"
    )
    assert main(["map", "cuda:0", "-q"]) == 0
    assert fake.calls[-1] == ("device_map", "cuda:0")
    assert capsys.readouterr().out == "3\n5\n"


def test_json_has_every_extent(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(found) == ["device", "revision", "segments", "extents", "names"]
    assert (found["device"], found["revision"]) == ("host", 7)
    assert found["segments"][1] == {"segment": 5, "size_bytes": GIB}
    assert len(found["extents"]) == 5
    assert found["extents"][1] == {
        "segment": 3, "offset": GIB, "length": GIB // 2, "kind": "blobs", "blobs": 1,
        "checkpoints": [f"sha256:{DIGEST}", "sha256:" + "cd" * 32], "others": 0, "load": 0,
    }  # fmt: skip
    assert found["extents"][3]["load"] == 9
    assert found["names"] == dict(MAP.names)


def on_terminal(encoding: str, *arguments: str) -> str:
    class Encoded(Terminal):
        @property
        def encoding(self) -> str:  # type: ignore[override]  # of this terminal
            return encoding

    with contextlib.redirect_stdout(Encoded()) as stream:
        assert main(["map", *arguments]) == 0
    return stream.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_it_fits_the_terminal(columns: int, encoding: str, fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(encoding)).splitlines()
    assert max(map(len, lines)) <= columns
    bar = lines[3].split()[3]
    assert len(bar) == {60: 20, 80: 40, 160: 96}[columns]
    if encoding == "ascii":
        assert not any(set(line) & set("█▓▒░·") for line in lines)
        assert set(bar) == set("#=.")
    wide = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(encoding, "--wide")).splitlines()
    assert len(wide[3].split()[3]) == 96


def test_marks_have_colours(fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" + "█" * 20 + "\x1b[0m\x1b[36m" + "▓" * 10 + "\x1b[0m" + "░" * 10 in on_terminal("utf-8")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in on_terminal("utf-8")


def test_a_mark_is_of_what_its_part_has_most_of(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    user = BlobUsers((f"sha256:{DIGEST}",))
    extents = [MapExtent(1, at * 100, 90, "blobs", 1, user) for at in range(40)]
    extents += [MapExtent(1, at * 100 + 90, 10, "hole") for at in range(40)]
    fake.answers["device_map"] = replace(
        MAP, segments=(MapSegment(1, 4000),), extents=tuple(sorted(extents, key=lambda one: one.offset)), revision=None
    )
    assert main(["map"]) == 0
    printed = capsys.readouterr().out
    assert "█" * 40 in printed
    assert "░         400 B   free, for the next load\n" in printed
    assert printed.endswith("the daemon changed meanwhile: parts of this map are of different moments\n")


def test_every_kind_has_a_mark(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("blobs", "hole", "hollow", "leaving", "in_flight", "set_aside", "others", "unknown")
    extents = tuple(
        MapExtent(1, at * 500, 500, kind, 0, BlobUsers(()) if at == 0 else None) for at, kind in enumerate(kinds)
    )
    fake.answers["device_map"] = replace(MAP, segments=(MapSegment(1, 4000),), extents=extents, names={})
    assert main(["map"]) == 0
    printed = capsys.readouterr().out
    assert "".join(mark * 5 for mark in "▌░·~▒x??") in printed
    assert "?      1000 B" not in printed
    assert printed.startswith("host: 3.42 KiB in 1 segment, 0 checkpoints\n")
    assert "of a checkpoint that has gone" in printed


def test_nothing_is_there(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    fake.answers["device_map"] = replace(MAP, segments=(), extents=(), names={})
    assert main(["map"]) == 0
    assert capsys.readouterr().out == "host: 0 B in 0 segments, 0 checkpoints\n"
