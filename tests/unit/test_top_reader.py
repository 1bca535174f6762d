"""What `weightd top` asks the daemon, and how often; private copies; GPUs' totals."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from support.daemon import eventually
from support.fake_client import FakeClient
from weightd.errors import DaemonUnreachableError, ProtocolMismatchError

reading = pytest.importorskip("weightd.top.reader")
private = pytest.importorskip("weightd.top.private")
gpus = pytest.importorskip("weightd.top.gpu_totals")
snapshots = pytest.importorskip("support.top_snapshots")

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from weightd.top.snapshot import DaemonSnapshot

MAPS = b"""\
7f0000000000-7f0000400000 rw-p 00000000 00:01 2052 /memfd:weightd-12 (deleted)
Size:               4096 kB
Anonymous:           512 kB
Swap:                  0 kB
7f0000400000-7f0000401000 r--s 00000000 00:01 2053 /memfd:weightd-lease (deleted)
Anonymous:             0 kB
7f0000500000-7f0000600000 rw-p 00000000 00:00 0
Anonymous:          1024 kB
7f0000600000-7f0000700000 rw-p 00000000 00:01 2054 /memfd:weightd-13 (deleted)
Anonymous:             8 kB
"""


class Asked:
    """A reader of a fake client that answers as `snapshots.ANSWERS`, and what a round asks."""

    def __init__(self, **answers: Any) -> None:
        whole = snapshots.ANSWERS
        self.client = FakeClient()
        self.client.answers |= {
            "stats": whole.stats, "checkpoints": list(whole.checkpoints), "leases": list(whole.leases),
            "sharing": list(whole.pairs), "loads": [], "events": list(snapshots.EVENTS),
        } | answers  # fmt: skip
        self.read: list[int] = []
        self.published: list[DaemonSnapshot] = []
        self.totals: list[tuple[str, ...]] = []
        self.reader = reading.DaemonReader(
            snapshots.client_of(self.client), self.published.append, reading.PrivateCopies(self._private), self._totals
        )

    def _private(self, pid: int) -> int | None:
        self.read.append(pid)
        return pid

    def _totals(self, uuids: Iterable[str]) -> dict[str, int]:
        self.totals.append(tuple(uuids))
        return {}

    def round(self) -> list[str]:
        """The names of the calls of one round."""
        self.client.calls.clear()
        self.snapshot = self.reader.look()
        return [call for call, *_ in self.client.calls]


def test_only_what_has_changed_is_asked() -> None:
    asked = Asked()
    assert asked.round() == ["stats", "checkpoints", "leases", "loads", "sharing"]
    before = asked.snapshot.answers
    assert before == replace(snapshots.ANSWERS, loads=(), private={4242: 4242, 99: 99})
    assert asked.round() == ["stats"]
    assert asked.snapshot.answers.checkpoints is before.checkpoints
    assert asked.snapshot.answers.private is before.private
    asked.client.answers["stats"] = replace(snapshots.STATS, revision=8)
    assert asked.round() == ["stats", "checkpoints", "leases", "loads"]  # no bytes came or went
    asked.client.answers["stats"] = replace(snapshots.STATS, revision=9)
    asked.client.answers["checkpoints"] = list(snapshots.CHECKPOINTS[1:])
    assert asked.round() == ["stats", "checkpoints", "leases", "loads", "sharing"]
    assert asked.totals == []


def test_loads_are_asked_while_there_are_any() -> None:
    asked = Asked(loads=[snapshots.LOAD])
    asked.round()
    assert asked.round() == ["stats", "loads"]
    asked.client.answers["loads"] = []
    assert asked.round() == ["stats", "loads"]
    assert asked.round() == ["stats"]


def test_everything_is_asked_of_a_daemon_that_does_not_count_or_is_another() -> None:
    asked = Asked(stats=replace(snapshots.STATS, revision=0))
    asked.round()
    assert asked.round() == ["stats", "checkpoints", "leases", "loads"]
    asked = Asked()
    asked.round()
    asked.client.answers["stats"] = DaemonUnreachableError("gone")
    assert asked.round() == ["stats"]
    since = asked.snapshot.since
    assert asked.snapshot.problem == "gone"
    assert asked.snapshot.answers.checkpoints == snapshots.CHECKPOINTS  # the last ones are still shown
    asked.round()
    assert asked.snapshot.since == since is not None
    asked.client.answers["stats"] = snapshots.STATS  # with the same revision
    assert asked.round() == ["stats", "checkpoints", "leases", "loads", "sharing"]
    assert (asked.snapshot.problem, asked.snapshot.since) == ("", None)


def test_totals_are_asked_once_for_the_same_gpus_and_hold_nothing_up() -> None:
    gpu = replace(snapshots.HOST, uuid="GPU-1", kind="cuda_vmm")
    asked = Asked(stats=replace(snapshots.STATS, devices=(snapshots.HOST, gpu), revision=0))
    answered = threading.Event()

    def totals(uuids: Iterable[str]) -> dict[str, int]:
        asked.totals.append(tuple(uuids))
        answered.wait(60)
        return {"GPU-1": 80 << 30}

    asked.reader._totals = totals
    asked.round()
    asked.round()
    assert asked.snapshot.answers.totals == {}
    answered.set()
    eventually(lambda: asked.round() and asked.snapshot.answers.totals == {"GPU-1": 80 << 30})
    assert asked.totals == [("GPU-1",)]


def test_a_bug_is_shown_instead_of_an_old_screen() -> None:
    asked = Asked(checkpoints=ZeroDivisionError("division"))
    asked.round()
    assert asked.snapshot.problem == "ZeroDivisionError: division"
    asked.client.answers["checkpoints"] = []
    asked.round()
    assert asked.snapshot.problem == ""


def test_an_older_daemon_shows_what_it_can() -> None:
    asked = Asked(loads=ProtocolMismatchError("too old"), sharing=ProtocolMismatchError("too old"))
    asked.round()
    answers = asked.snapshot.answers
    assert (answers.loads, answers.pairs, answers.missing) == (None, None, "too old")
    assert answers.checkpoints == snapshots.CHECKPOINTS
    asked.client.answers["sharing"] = DaemonUnreachableError("gone")
    asked.client.answers["stats"] = replace(snapshots.STATS, revision=8)
    asked.client.answers["checkpoints"] = []
    asked.round()
    assert asked.snapshot.problem == "gone"


def test_private_copies_are_read_rarely_and_at_once_where_one_looks() -> None:
    read: list[int] = []
    copies = reading.PrivateCopies(lambda pid: read.append(pid) or pid)
    assert copies.look([1, 2], [], 100.0) == {1: 1, 2: 2}
    copies.look([1, 2], [], 105.0)
    assert read == [1, 2]
    copies.look([1, 2, 3], [2, 77], 106.0)  # 3 is new, one looks at 2, and 77 holds nothing
    assert sorted(read) == [1, 2, 2, 3]
    assert copies.look([2, 3], [], 111.0) == {2: 2, 3: 3}
    assert sorted(read) == [1, 2, 2, 2, 3, 3]


def test_private_copies_take_no_more_than_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 2.0])  # each reading takes a second of CPU time
    monkeypatch.setattr(reading, "time", SimpleNamespace(thread_time=lambda: next(clock)))
    read: list[int] = []
    copies = reading.PrivateCopies(lambda pid: read.append(pid) or pid)
    copies.look([1], [], 100.0)
    copies.look([1], [], 299.0)
    assert read == [1]


def test_anonymous_pages_of_segments_are_private(tmp_path: Path) -> None:
    assert private.copied_bytes(MAPS) == 520 * 1024
    assert private.copied_bytes(b"") is None
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "smaps").write_bytes(MAPS)
    assert private.private_bytes(7, tmp_path) == 520 * 1024
    assert private.private_bytes(8, tmp_path) is None


def test_totals_of_gpus_are_not_required(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def memory(handle: str) -> SimpleNamespace:
        if handle == "GPU-2":
            raise NVMLError
        return SimpleNamespace(total=80 << 30)

    ended: list[bool] = []
    library = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: ended.append(True),
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid, nvmlDeviceGetMemoryInfo=memory,
    )  # fmt: skip
    monkeypatch.setattr(gpus, "pynvml", library)
    assert gpus.total_bytes(["GPU-1", "GPU-2"]) == {"GPU-1": 80 << 30}
    assert ended == [True]

    def fail() -> None:
        raise NVMLError

    library.nvmlInit = fail
    assert gpus.total_bytes(["GPU-1"]) == {}
    monkeypatch.setattr(gpus, "pynvml", None)
    assert gpus.total_bytes(["GPU-1"]) == {}


def test_two_threads_read_until_they_are_stopped() -> None:
    asked = Asked()
    ended = threading.Event()

    def stream(_: bool) -> Iterable[Any]:
        yield from snapshots.EVENTS
        ended.wait(60)
        raise DaemonUnreachableError("closed")

    asked.client.answers["events"] = stream
    shown = threading.Event()
    asked.reader._publish = lambda snapshot: shown.set() if snapshot.events == snapshots.EVENTS else asked.reader.wake()
    asked.reader.start()
    assert shown.wait(60)
    ended.set()
    asked.reader.stop()
    assert asked.client.closed == 1
    assert not any(thread.name.startswith("weightd-top") for thread in threading.enumerate())
