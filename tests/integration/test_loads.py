"""Loads and those who wait for them: one flight for one content, who leaves and who stays, loads side by side."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.background import background
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher, waiters_of
from support.loader import STOP, resume, wait_stopped
from weightd._proto.v1 import checkpoint_pb2
from weightd._transport.convert import source_to
from weightd.resolve import open_sources, resolve
from weightd_daemon.loads.loads import MAX_UNFINISHED

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")


@pytest.fixture
def stopping(start_daemon: StartDaemon) -> Daemon:
    """A daemon whose loaders stop where bytes begin with STOP, and read one tensor after the other."""
    return start_daemon(argv=launcher(loader="stopping"), reader_threads=1)


def data(seed: object, last: bool = False) -> bytes:
    plain = checkpoints.random_bytes(seed, MIB)
    return STOP + plain[len(STOP) :] if last else plain


def marked(folder: Path, name: str = "m", common: int = 3) -> Path:
    """Tensors c0, c1, … that every such checkpoint has, and "own", at which the loader stops."""
    tensors = {f"c{i}": ("U8", (MIB,), data(i)) for i in range(common)}
    return checkpoints.write(folder / f"{name}.safetensors", {**tensors, "own": ("U8", (MIB,), data(name, last=True))})


class Rested(NamedTuple):
    """Files that have rested, so that loads of them can be joined: one at which the loader stops, and a plain one."""

    marked: Path
    plain: Path


@pytest.fixture(scope="module")
def rested(tmp_path_factory: pytest.TempPathFactory) -> Rested:
    folder = tmp_path_factory.mktemp("rested")
    files = Rested(marked(folder), checkpoints.write_random(folder / "plain.safetensors", 4, MIB))
    checkpoints.rest(*files)
    return files


def arrived(daemon: Daemon, count: int) -> None:
    """Wait until so many calls have begun or joined a load."""
    eventually(lambda: waiters_of(daemon) == count, what=f"{count} waiters")


def loading(client: weightd.Client) -> int:
    return sum(checkpoint.state == "loading" for checkpoint in client.checkpoints())


@everywhere
def test_two_loads_of_one_content_become_one(stopping: Daemon, rested: Rested) -> None:
    path = rested.marked
    first, second, other = stopping.connect(), stopping.connect(), stopping.connect()
    one = background(first.load_report, path, name="one")
    loaders = wait_stopped(stopping)
    two = background(second.load_report, path, name="two")
    arrived(stopping, 2)
    assert loading(other) == 1
    assert stopping.loaders() == loaders
    resume(*loaders)
    reports = [one.result(60), two.result(60)]
    assert all(report is not None and report.unique_bytes == 4 * MIB for report in reports)
    assert other.inspect("one").checkpoint.names == ("one", "two")
    with first.attach("one") as a, second.attach(path) as b:
        assert content(a, "own") == content(b, "own") == data("m", last=True)
    assert other.stats().resident_bytes == 4 * MIB


@everywhere
def test_first_waiter_leaves_second_stays(stopping: Daemon, rested: Rested) -> None:
    path = rested.marked
    first, second = stopping.connect(), stopping.connect()
    one = background(first.load_report, path)
    loaders = wait_stopped(stopping)
    two = background(second.load_report, path)
    arrived(stopping, 2)
    first.close()
    with pytest.raises(weightd.LeaseLostError):
        one.result(60)
    eventually(lambda: stopping.connections() == 1, what="the daemon sees that it has left")
    assert loading(second) == 1
    resume(*loaders)
    report = two.result(60)
    assert report is not None
    assert report.unique_bytes == 4 * MIB
    assert stopping.loaders() == loaders


def test_first_waiter_leaves_before_it_has_fed_the_files(start_daemon: StartDaemon, rested: Rested) -> None:
    """The second waiter has the files, too: it must not be told that somebody else has left."""
    path, daemon = rested.plain, start_daemon(argv=launcher())
    first, second = daemon.connect(), daemon.connect()
    with open_sources(resolve(path)) as opened:
        number, intake = first._handles.offer()
        request = checkpoint_pb2.LoadRequest(offer_id=number, sources=[source_to(s) for s in opened.sources])
        two = []

        def never_feed() -> None:
            two.append(background(second.load_report, path))
            arrived(daemon, 2)
            intake.close()

        with pytest.raises(weightd.WeightdError):
            first._rpc().load(request, never_feed, None)
    report = two[0].result(60)
    assert report is not None
    assert report.unique_bytes == 4 * MIB


def test_detached_load_goes_on_and_gets_its_name(stopping: Daemon, tmp_path: Path) -> None:
    client, other = stopping.connect(), stopping.connect()
    assert client.load_report(marked(tmp_path), name="later", pin=True, detached=True) is None
    client.close()
    eventually(lambda: stopping.connections() == 1, what="the daemon sees that it has left")
    loaders = wait_stopped(stopping)
    assert [(c.name, c.state) for c in other.checkpoints()] == [("later", "loading")]
    resume(*loaders)
    eventually(lambda: [(c.name, c.state, c.pinned) for c in other.checkpoints()] == [("later", "resident", True)])
    assert other.leases() == []


def test_waiter_of_a_detached_load_leaves(stopping: Daemon, rested: Rested) -> None:
    """A load that somebody detached goes on, whoever else waited for it."""
    path = rested.marked
    first, second, other = stopping.connect(), stopping.connect(), stopping.connect()
    one = background(first.load_report, path, name="one")
    loaders = wait_stopped(stopping)
    two = background(second.load_report, path, name="two", detached=True)
    arrived(stopping, 2)
    first.close()
    with pytest.raises(weightd.LeaseLostError):
        one.result(60)
    resume(*loaders)
    two.exception(60)
    eventually(lambda: [(c.names, c.state) for c in other.checkpoints()] == [(("two",), "resident")])


@everywhere
def test_finished_load_is_kept_for_its_waiter(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(budget="8MiB", pool=0)
    first, second = daemon.connect(), daemon.connect()
    path = checkpoints.write_random(tmp_path / "mine.safetensors", 5, MIB, seed="mine")
    other = checkpoints.write_random(tmp_path / "other.safetensors", 5, MIB, seed="other")
    first.load(path, name="mine")
    (lease,) = second.leases()
    assert lease.waiting
    with pytest.raises(weightd.CapacityError) as caught:
        second.load(other)
    assert caught.value.leased_bytes == 5 * MIB
    with first.attach("mine") as attachment:
        assert [lease.waiting for lease in second.leases()] == [False]
        with pytest.raises(weightd.CapacityError):
            second.load(other)
        assert content(attachment, "t4") == checkpoints.random_bytes(("mine", 4), MIB)
    second.load(other, name="other")  # it has attached, and given up
    second.close()
    first.load(path, name="mine")
    first.close()
    with weightd.connect(daemon.socket, timeout=60) as third:  # it has left
        third.load(other, name="other")
        assert [c.name for c in third.checkpoints()] == ["other"]


@everywhere
def test_loads_side_by_side_end_up_sharing(stopping: Daemon, backend: Backend, tmp_path: Path) -> None:
    """Both have placed their copies of the common tensors before either is sealed."""
    client = stopping.connect()
    one = background(stopping.connect().load_report, marked(tmp_path, "a", common=6), name="a")
    wait_stopped(stopping)
    two = background(stopping.connect().load_report, marked(tmp_path, "b", common=6), name="b")
    loaders = wait_stopped(stopping, 2)
    assert stopping.allocates(12 * MIB)
    resume(loaders[0])
    eventually(lambda: one.done() or two.done())
    resume(loaders[1])
    reports = [one.result(60), two.result(60)]
    assert sorted(report.unique_bytes for report in reports if report) == [MIB, 7 * MIB]
    stats = client.stats()
    assert (stats.resident_bytes, stats.logical_bytes) == (8 * MIB, 14 * MIB)
    if backend.is_host:
        eventually(lambda: stopping.allocates(0, 8 * MIB * 1.02), what="the copies' space is back")
    else:  # on a GPU it stays in the segment that has "own", for the next load
        eventually(lambda: not client.stats().devices[0].in_flight_bytes, what="the loads have ended")
        client.load(checkpoints.write_random(tmp_path / "next.safetensors", 6, MIB), name="next")
        assert client.stats().devices[0].used_bytes == stats.devices[0].used_bytes
    for name in ("a", "b"):
        with client.attach(name) as attachment:
            assert content(attachment, "own") == data(name, last=True)
            for i in range(6):
                assert content(attachment, f"c{i}") == data(i)


@everywhere
def test_same_content_side_by_side(stopping: Daemon, tmp_path: Path) -> None:
    """Two files, so two flights; one content, so one checkpoint."""
    client = stopping.connect()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(marked(tmp_path).read_bytes())
    one = background(stopping.connect().load_report, tmp_path / "m.safetensors", name="a")
    wait_stopped(stopping)
    two = background(stopping.connect().load_report, copy, name="b")
    resume(*wait_stopped(stopping, 2))
    digests = {report.content_digest for report in (one.result(60), two.result(60)) if report}
    (checkpoint,) = client.checkpoints()
    assert (checkpoint.names, {checkpoint.content_digest}) == (("a", "b"), digests)
    assert client.stats().resident_bytes == 4 * MIB
    eventually(lambda: stopping.allocates(0, 4 * MIB * 1.02))


@everywhere
def test_verify_reads_again(daemon: Daemon, rested: Rested) -> None:
    path = rested.plain
    client = daemon.connect()
    reads = [client.load_report(path, verify=verify) for verify in (False, False, True)]
    assert [report.read_bytes for report in reads if report] == [4 * MIB, 0, 4 * MIB]
    assert len({report.content_digest for report in reads if report}) == 1
    assert client.stats().resident_bytes == 4 * MIB
    assert "read 0" not in daemon.command("load", path, "--verify").stdout


@everywhere
def test_who_hangs_up_before_the_seal_leaves_no_lease(stopping: Daemon, tmp_path: Path) -> None:
    """Only the handle socket is closed, the call goes on: the waiter is gone all the same."""
    client, other = stopping.connect(), stopping.connect()
    outcome = background(client.load_report, marked(tmp_path), name="m")
    wait_stopped(stopping)
    client._handles.close()
    eventually(lambda: loading(other) == 0, what="the load without a waiter is cancelled")
    with pytest.raises(weightd.WeightdError):
        outcome.result(60)
    assert other.leases() == []


def test_a_resident_checkpoint_is_kept_once_for_each_connection(daemon: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 2, 1000)
    checkpoints.rest(path)
    client, other = daemon.connect(), daemon.connect()
    for _ in range(5):
        client.load_report(path)
    other.load_report(path)
    assert [lease.waiting for lease in client.leases()] == [True, True]


def test_one_connection_cannot_take_all_descriptors(stopping: Daemon, tmp_path: Path) -> None:
    """A client that never sends its files has no more than its share of loads, each of which holds an intake."""
    path = checkpoints.write_random(tmp_path / "never.safetensors", 1, 1000)
    idle, other = stopping.connect(), stopping.connect()
    release = threading.Event()

    def never_feed() -> None:
        release.wait()

    with open_sources(resolve(path)) as opened:
        sources = [source_to(source) for source in opened.sources]

    def hang() -> None:
        number, intake = idle._handles.offer()
        with intake:
            idle._rpc().load(checkpoint_pb2.LoadRequest(offer_id=number, sources=sources), never_feed, None)

    calls = []
    try:
        while len(calls) < MAX_UNFINISHED:
            calls.append(background(hang))
            eventually(
                lambda: loading(other) == len(calls) or [call.result() for call in calls if call.done()],
                what=f"{len(calls)} are under way",
            )
            for loader in stopping.loaders():  # or they give up after 30 s without files, before a busy machine is here
                os.kill(loader, signal.SIGSTOP)
        with pytest.raises(weightd.InUseError, match="32 loads under way"):
            hang()
        idle.close()
    finally:
        release.set()
        for loader in stopping.loaders():
            with contextlib.suppress(ProcessLookupError):
                resume(loader)
    for call in calls:
        with pytest.raises(weightd.WeightdError):
            call.result(60)


@everywhere
def test_many_equal_small_tensors_are_stored_once_each(daemon: Daemon, tmp_path: Path) -> None:
    """How their cost grows is for tests/unit/test_core_store.py; here, that each has an address of its own."""
    path = checkpoints.write(tmp_path / "m.safetensors", {f"t{i}": ("U8", (16,), b"x" * 16) for i in range(8000)})
    client = daemon.connect()
    client.load_report(path)
    with client.attach(path) as attachment:
        assert len({(info.segment, info.offset) for info in attachment.tensors.values()}) == 8000
        assert all(content(attachment, key.name) == b"x" * 16 for key in attachment.tensors)


@everywhere
def test_two_loads_of_many_equal_tensors_side_by_side(stopping: Daemon, tmp_path: Path) -> None:
    tensors = {f"t{i}": ("U8", (300,), checkpoints.random_bytes(i, 300)) for i in range(3000)}
    clients = [stopping.connect(), stopping.connect()]
    outcomes = []
    for number, client in enumerate(clients):
        last = {"zz": ("U8", (100,), data(number, last=True)[:100])}
        path = checkpoints.write(tmp_path / f"{number}.safetensors", {**tensors, **last})
        outcomes.append(background(client.load_report, path))
    eventually(lambda: len(stopping.loaders()) == 2, what="two loaders")
    resume(*wait_stopped(stopping, count=2))
    reports = [outcome.result(60) for outcome in outcomes]
    assert sorted(report.unique_bytes for report in reports if report) == [100, 3000 * 300 + 100]
    assert clients[0].stats().resident_bytes == 3000 * 300 + 200
