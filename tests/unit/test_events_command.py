"""`weightd events`: a line for people for every type of event, what is filtered, and JSON where nobody reads along."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from support.fake_client import DIGEST, GIB, FakeClient, Terminal
from weightd.cli import main

pytest.importorskip("typer")
events = pytest.importorskip("weightd.cli.events")

if TYPE_CHECKING:
    from collections.abc import Iterator

    from weightd.types import DaemonEvent


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def attached(fake: FakeClient) -> DaemonEvent:
    return next(iter(fake.events(follow=False)))  # type: ignore[no-any-return]  # a fake's answer


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["events", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_line_for_each_type(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(attached(fake), load=3, reason="OK", seconds=1.25, unique_bytes=GIB, read_bytes=GIB)
    failed = replace(one, kind="load_ended", reason="CAPACITY", message="it does not fit", names=())
    cases = {
        "attached": "org/base on host, 2.00 GiB, lease 7, by ada (pid 4242: python serve.py)",
        "load_begun": "org/base on host, load 3, by ada (pid 4242: python serve.py)",
        "load_ended": "org/base on host, 2.00 GiB, read 1.00 GiB in 1.2 s, evicted old, 2 of other users, by ada (pid",
        "evicted": "org/base on host, 2.00 GiB, capacity, by ada",
        "named": f"org/base, means {DIGEST[:12]}, before {'cd' * 6}, by ada",
        "device_lost": "host, it broke",
        "drained": "",
    }
    more = {"load_ended": {"evicted": ("old",), "evicted_others": 2}, "evicted": {"reason": "capacity"},
            "named": {"previous_digest": "cd" * 32}, "device_lost": {"message": "it broke"}}  # fmt: skip
    fake.answers["events"] = [replace(one, kind=kind, **more.get(kind, {})) for kind in cases] + [failed]
    printed = lines(capsys, "--format", "table")
    for line, (kind, expected) in zip(printed, cases.items(), strict=False):
        assert line.startswith(f"2026-01-02 03:04:05  {kind:<13}  {expected}".rstrip()), line
    assert f"  load_ended     {DIGEST[:12]} on host, CAPACITY: it does not fit, by ada" in printed[-1]
    assert set(events.EVENT_KEYS) > set(cases)
    fake.answers["events"] = [replace(one, kind=kind) for kind in events.EVENT_KEYS]
    assert len(lines(capsys, "--format", "table")) == len(events.EVENT_KEYS), "no type fails"


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_line_fits_the_terminal(width: int, fake: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/home/alice/models/a/folder/with/a/long/name/of/many/parts/model.safetensors"
    fake.answers["events"] = [replace(attached(fake), names=(path,), command=f"python {path}")]
    monkeypatch.setenv("COLUMNS", str(width))
    for arguments in ([], ["-w"]):
        with contextlib.redirect_stdout(Terminal()) as stream:
            assert main(["events", *arguments]) == 0
        (line,) = stream.getvalue().splitlines()
        assert (len(line) <= width) == (not arguments)
        assert ("…" in line) == (not arguments)


def test_a_line_in_a_pipe_is_whole(
    fake: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    why = f"it does not fit: {'all is pinned, ' * 50}remove something"
    fake.answers["events"] = [replace(attached(fake), kind="load_ended", reason="CAPACITY", message=why)]
    monkeypatch.setenv("COLUMNS", "80")
    (line,) = lines(capsys, "--format", "table")
    assert why in line


def test_a_pipe_gets_json_as_ever(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys) == lines(capsys, "--format", "json")
    assert json.loads(lines(capsys)[0])["event"] == "attached"
    with contextlib.redirect_stdout(Terminal()) as stream:
        assert main(["events", "--format", "json"]) == 0
    assert json.loads(stream.getvalue().splitlines()[0])["event"] == "attached", "also in a terminal"


def test_types(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    one = attached(fake)
    fake.answers["events"] = [replace(one, kind=kind) for kind in ("attached", "evicted", "detached", "novel")]

    def found(*arguments: str) -> list[str]:
        return [json.loads(line)["event"] for line in lines(capsys, *arguments)]

    assert found() == ["attached", "evicted", "detached", "novel"], "types of a newer daemon are printed, too"
    assert found("--type", "evicted") == ["evicted"]
    assert found("--type", "evicted", "--type", "detached") == found("--type=evicted,detached")
    assert main(["events", "--type", "evicte"]) == 2
    assert "did you mean evicted?" in capsys.readouterr().err


def test_since(fake: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    one = attached(fake)
    now = datetime.now(UTC)
    fake.answers["events"] = [
        replace(one, kind="attached"),
        replace(one, kind="detached", time=now - timedelta(hours=1)),
    ]
    for said, expected in (("30m", 0), ("1h30m", 1), ("2d", 1), ("2026-01-02T03:04:05Z", 2), ("2026-01-03", 1)):
        assert len(lines(capsys, "--since", said)) == expected, said
    for wrong in ("soon", "10", "25:00", "2026-13-01", ""):
        assert main(["events", "--since", wrong]) == 2, wrong
        assert "--since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("12:00", datetime(2026, 1, 2, 12, tzinfo=UTC)),
        ("9:30:10", datetime(2026, 1, 2, 9, 30, 10, tzinfo=UTC)),
        ("18:00", datetime(2026, 1, 1, 18, tzinfo=UTC)),
        ("1w", datetime(2025, 12, 26, 15, tzinfo=UTC)),
        ("999999999w", datetime.min.replace(tzinfo=UTC)),
        ("2026-01-02T12:00:00+02:00", datetime(2026, 1, 2, 10, tzinfo=UTC)),
    ],
)
def test_moments(said: str, expected: datetime) -> None:
    """A time of day that is still to come is of yesterday."""
    assert events._moment(said, datetime(2026, 1, 2, 15, tzinfo=UTC)) == expected
