"""What the server of `weightd web` asks the daemon, and keeps."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from support.fake_holdings import MIB, FakeHoldings, family
from weightd.errors import NotFoundError, ProtocolMismatchError
from weightd.inspection import BlobUsers, DeviceMap, MapExtent, MapSegment
from weightd.types import Stats
from weightd.web import sections as sections_module
from weightd.web.answers import encoded, map_columns
from weightd.web.sections import SectionReader


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> FakeHoldings:
    monkeypatch.setattr(sections_module, "_SHARE", 0)
    held = FakeHoldings()
    held.hold("base", [("a", 8 * MIB), ("b", MIB)])
    held.hold("tuned", [("a", 8 * MIB), ("c", MIB)])
    return held


def value(reader: SectionReader, section: str) -> Any:
    return json.loads(reader.sections[section].content)


def make(held: FakeHoldings) -> SectionReader:
    return SectionReader(held, lambda: None)  # type: ignore[arg-type]  # it answers what is asked


def test_it_keeps_everything(held: FakeHoldings) -> None:
    reader = make(held)
    reader.read()
    assert set(reader.sections) == {
        "daemon", "stats", "checkpoints", "leases", "loads", "events", "pairs", "map host",
    }  # fmt: skip
    assert value(reader, "daemon")["reachable"] is True
    assert [row["names"] for row in value(reader, "checkpoints")] == [["base"], ["tuned"]]
    assert value(reader, "pairs")["pairs"][0]["shared_bytes"] == 8 * MIB


def test_it_asks_for_lists_only_if_the_revision_has_moved(held: FakeHoldings) -> None:
    reader = make(held)
    reader.read()
    before, asked = reader.sections, dict(held.asked)
    reader.read()
    assert reader.sections is before
    assert {name for name in asked if held.asked[name] != asked[name]} == {"version", "stats", "loads"}
    held.remove("tuned")
    reader.read()
    changed = {name for name, section in reader.sections.items() if section is not before.get(name)}
    assert changed == {"stats", "checkpoints", "events", "pairs", "map host"}
    versions = [section.version for section in reader.sections.values()]
    assert len(set(versions)) == len(versions)


def test_a_restarted_daemon_is_read_anew_though_its_revision_is_the_same(held: FakeHoldings) -> None:
    reader = make(held)
    reader.read()
    asked = held.asked["checkpoints"]
    held.pid += 1
    reader.read()
    assert held.asked["checkpoints"] == asked + 1


def test_a_daemon_that_does_not_count_changes_is_read_each_time(held: FakeHoldings) -> None:
    held.revision = 0
    reader = make(held)
    reader.read()
    reader.read()
    assert held.asked["checkpoints"] == 2


def test_lists_that_change_while_they_are_read_are_read_again(
    held: FakeHoldings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = make(held)
    stats = held.stats()
    answers = [stats, *(replace(stats, revision=stats.revision + more) for more in (1, 2, 3, 4))]
    monkeypatch.setattr(FakeHoldings, "stats", lambda _: answers.pop(0))
    reader.read()
    assert held.asked["checkpoints"] == 3
    assert answers == [replace(stats, revision=stats.revision + 4)]
    assert isinstance(stats, Stats)


def test_costly_questions_are_asked_seldom(held: FakeHoldings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections_module, "_SHARE", 1e9)
    reader = make(held)
    reader.read()
    held.remove("tuned")
    reader.read()
    assert (held.asked["device_map"], held.asked["sharing"], held.asked["checkpoints"]) == (1, 1, 2)


def test_a_daemon_that_is_gone_leaves_what_was_known(held: FakeHoldings) -> None:
    reader = make(held)
    reader.read()
    held.gone = True
    reader.read()
    assert value(reader, "daemon")["reachable"] is False
    assert "start it with `weightd serve`" in value(reader, "daemon")["message"]
    assert len(value(reader, "checkpoints")) == 2
    held.gone = False
    held.remove("base")
    reader.read()
    assert value(reader, "daemon")["reachable"] is True
    assert len(value(reader, "checkpoints")) == 1


def test_an_answer_that_is_missing_says_why(held: FakeHoldings) -> None:
    held.errors = {"sharing": ProtocolMismatchError("too old"), "device_map": NotFoundError("no device")}
    reader = make(held)
    reader.read()
    assert value(reader, "pairs") == {"missing": "too old"}
    assert value(reader, "map host") == {"missing": "no device"}
    assert len(value(reader, "checkpoints")) == 2


def test_pairs_beyond_the_most_are_left_out(held: FakeHoldings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections_module, "MOST_PAIRS", 1)
    held.hold("third", [("a", 8 * MIB)])
    reader = make(held)
    reader.read()
    assert len(value(reader, "pairs")["pairs"]) == 1
    assert value(reader, "pairs")["more"] is True


def test_a_map_in_columns() -> None:
    both = BlobUsers(("sha256:aa", "sha256:bb"), 1)
    extents = (
        MapExtent(7, 0, 512, "blobs", 2, both),
        MapExtent(7, 512, 256, "hole"),
        MapExtent(9, 0, 100, "in_flight", load=4),
    )
    found = DeviceMap("host", 3, (MapSegment(7, 768), MapSegment(9, 100)), extents, {"sha256:bb": "b", "sha256:aa": ""})
    assert map_columns(found) == {
        "device": "host",
        "segments": [[7, 768], [9, 100]],
        "extents": [
            [0, 0, 512, "blobs", 2, 0, 0],
            [0, 512, 256, "hole", 0, None, 0],
            [1, 0, 100, "in_flight", 0, None, 4],
        ],
        "users": [[[1, 0], 1]],
        "checkpoints": ["sha256:bb", "sha256:aa"],
        "names": {"sha256:bb": "b", "sha256:aa": ""},
    }


def test_answers_are_json() -> None:
    (load,) = family().loads()
    assert json.loads(encoded({"at": load.begun_at, "bytes": b"\x01\xff"})) == {
        "at": load.begun_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "bytes": "01ff",
    }
    with pytest.raises(TypeError, match="object"):
        encoded(object())


def test_it_ends_when_told_to_as_it_falls_asleep(held: FakeHoldings, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make(held)
    monkeypatch.setattr(sections_module, "_IDLE", -1.0)  # nobody looks

    class Wake(threading.Event):
        def clear(self) -> None:
            """The last moment before it waits: others may set the event first."""
            reader._stop.set()
            self.set()
            super().clear()

    reader._wake = Wake()
    reader.start()
    reader._thread.join(10)
    ended = not reader._thread.is_alive()
    reader.stop()
    assert ended
