"""Events: what is told of, to whom, and what becomes of a reader that does not read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.background import background
from support.daemon import Daemon, environment, eventually
from support.launch import launcher
from support.leash import leashed
from support.loader import STOP, wait_stopped
from support.users import needs_root, open_to_all
from support.wire import Peer
from support.worker import Worker
from weightd._transport.rpc import RpcClient
from weightd.client import Client

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
User = Callable[[Daemon, int], Worker]
KIB = 1 << 10


def kinds(client: Client) -> list[str]:
    """What the daemon remembers."""
    return [event.kind for event in client.events()]


@pytest.mark.backends(*EVERY)
def test_the_life_of_a_checkpoint(daemon: Daemon, spawn: Spawn, backend: Backend, tmp_path: Path) -> None:
    client = daemon.connect()
    found = client.load(checkpoints.write_random(tmp_path / "a", 2, 100 * KIB), name="a", device=backend.device)
    worker = spawn(daemon)
    worker.run("import weightd; client = weightd.connect(timeout=20.0); held = client.attach('a')")
    worker.run("held.close(); del held; import gc; gc.collect()")
    eventually(lambda: not any(lease.pid == worker.pid for lease in client.leases()))
    client.close()
    client = daemon.connect()
    client.remove("a")
    events = list(client.events())
    assert [e.kind for e in events] == [
        "load_begun", "sealed", "load_ended", "named", "attached", "detached", "evicted",
    ]  # fmt: skip
    begun, sealed, ended, named, attached, detached, evicted = events
    assert [e.time for e in events] == sorted(e.time for e in events)
    assert begun.load == sealed.load == ended.load > 0
    assert {e.names for e in events} == {("a",)}
    assert begun.pid == sealed.pid == named.pid == evicted.pid == os.getpid()
    assert (named.user, named.previous_digest, evicted.load) == (begun.user, "", 0)
    assert {e.content_digest for e in events} == {"", found.content_digest}
    assert begun.content_digest == ""
    assert {e.device for e in events if e is not named} == {backend.uuid}
    assert (ended.reason, ended.message, ended.seconds > 0) == ("OK", "", True)
    assert (ended.total_bytes, ended.unique_bytes, ended.read_bytes) == (200 * KIB, 200 * KIB, 200 * KIB)
    assert (sealed.total_bytes, evicted.total_bytes, evicted.reason) == (200 * KIB, 200 * KIB, "removed")
    assert attached.lease == detached.lease > 0
    assert attached.pid == detached.pid == worker.pid
    assert (attached.user, "python" in attached.command) == (begun.user, True)


def test_loads_that_fail_or_are_left(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(loader="stopping"))
    client = daemon.connect()
    with pytest.raises(weightd.FormatError):
        client.load(bad(tmp_path), name="bad")
    leaving = daemon.connect()
    stops = checkpoints.write(tmp_path / "a", {"t": ("U8", (100 * KIB,), STOP.ljust(100 * KIB, b"."))})
    loading = background(leaving.load, stops, name="left")
    wait_stopped(daemon)
    leaving.close()
    with pytest.raises((weightd.WeightdError, ValueError)):
        loading.result(60)
    eventually(lambda: kinds(client).count("load_ended") == 2)
    failed, left = [event for event in client.events() if event.kind == "load_ended"]
    assert (failed.names, failed.reason, failed.content_digest) == (("bad",), "FORMAT", "")
    assert "bad" in failed.message
    assert (left.names, left.reason) == (("left",), "CANCELLED")


def bad(folder: Path) -> Path:
    path = folder / "bad.safetensors"
    path.write_bytes(b"\xff" * 64)
    return path


def test_capacity_and_drain_are_told(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(budget="1MiB", pool=0)
    for number in range(3):
        with weightd.connect(daemon.socket, timeout=20.0) as client:
            client.load(checkpoints.write_random(tmp_path / f"{number}", 1, 400 * KIB, seed=number), name=f"n{number}")
    client = daemon.connect()
    client.drain()
    client.undrain()
    events = [e for e in client.events() if not e.kind.startswith(("load", "named"))]
    assert [e.kind for e in events] == [
        "sealed", "sealed", "evicted", "sealed", "draining", "evicted", "evicted", "drained", "undrained",
    ]  # fmt: skip
    assert [e.reason for e in events if e.kind == "evicted"] == ["capacity", "drained", "drained"]


def test_loads_from_memory_and_names_that_move_are_told(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    first, second = (checkpoints.write_random(tmp_path / name, 1, KIB, seed=name) for name in "ab")
    checkpoints.rest(first, second)
    old, new = client.load(first, name="one"), client.load(second, name="other")
    seen = len(list(client.events()))
    client.load(first, name="one")  # all as it was
    client.load(second, name="one")  # which moves
    client.load(first)
    client.remove("one")
    client.close()
    client = daemon.connect()
    client.remove("other")
    events = list(client.events())[seen:]
    told = [(e.kind, e.names, e.content_digest, e.previous_digest) for e in events]
    assert told == [
        ("load_answered", ("one",), old.content_digest, ""),
        ("named", ("one",), new.content_digest, old.content_digest),
        ("load_answered", ("one", "other"), new.content_digest, ""),
        ("named", (str(first),), old.content_digest, ""),
        ("load_answered", (str(first),), old.content_digest, ""),
        ("unnamed", ("one",), new.content_digest, ""),
        ("evicted", ("other",), new.content_digest, ""),
    ]
    assert {(e.pid, e.uid) for e in events} == {(os.getpid(), os.geteuid())}
    log = daemon.logged()
    for line in ("loaded one by ", "moved name one by ", "gave name ", "dropped name one by ", "evicted other by "):
        assert line in log
    assert f"(pid {os.getpid()}) from memory content={old.content_digest[:19]} device=host" in log


@pytest.mark.backends("cuda_ipc", double_only=True)
def test_a_lost_device(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a", 1, 100 * KIB), name="a", device=backend.device)
    attachment = client.attach("a")
    (holder,) = daemon.holders()
    os.kill(holder, signal.SIGKILL)
    eventually(lambda: "device_lost" in kinds(client))
    events = list(client.events())[-3:]
    assert [e.kind for e in events] == ["device_lost", "detached", "evicted"]
    lost, _, evicted = events
    assert (lost.device, lost.message != "") == (backend.uuid, True)
    assert (evicted.names, evicted.reason) == (("a",), "lost")
    attachment.close()


def test_a_reader_that_does_not_read_loses_events_and_the_other_none(
    start_daemon: StartDaemon, spawn: Spawn, tmp_path: Path
) -> None:
    daemon = start_daemon(argv=launcher(backlog=64, unread=3600.0))  # else a busy machine could reach that first
    client, slow, fast = daemon.connect(), spawn(daemon), daemon.connect()
    path = checkpoints.write_random(tmp_path / "a", 1, KIB)
    checkpoints.rest(path)
    client.load(path, name="a")
    for number in range(7):  # names make events large, so that few of them fill what gRPC itself keeps for a reader
        client.load(path, name=f"a{number}".ljust(1000, "."))
    follow = "import weightd\nclient = weightd.connect(timeout=60.0)\nlazy = client.events(follow=True)\n"
    assert slow.run(f"{follow}result = next(lazy).kind") == "load_begun", "it follows now"
    os.kill(slow.pid, signal.SIGSTOP)  # so nothing is read, by gRPC on its behalf neither
    eager = fast.events(follow=True)
    assert [next(eager).kind for _ in range(4)] == ["load_begun", "sealed", "load_ended", "named"]
    assert [next(eager).kind for _ in range(14)] == ["named", "load_answered"] * 7
    for _ in range(20):
        for _ in range(15):
            client.attach("a", manifest_only=True).close()
        client.leases()
        found = [event.kind for event in islice(eager, 30)]
        assert (found.count("attached"), found.count("detached")) == (15, 15)
    os.kill(slow.pid, signal.SIGCONT)
    read = "try:\n    for _ in lazy: pass\nexcept weightd.EventsLostError as error:\n    result = str(error)"
    lost, _, words = slow.run(read).partition(" ")
    assert words.startswith("events are lost: this reader is too slow")
    assert 64 < int(lost) <= 600
    eager.close()


def test_too_many_readers_are_refused(daemon: Daemon) -> None:
    client = daemon.connect()
    client.drain()
    client.undrain()
    readers = [client.events(follow=True) for _ in range(64)]
    assert {next(reader).kind for reader in readers} == {"draining"}
    with pytest.raises(weightd.InUseError, match="64 readers of events are there already"):
        next(client.events())
    readers.pop().close()
    eventually(lambda: can_read(client))
    for reader in readers:
        reader.close()


def can_read(client: Client) -> bool:
    try:
        return bool(kinds(client))
    except weightd.InUseError:
        return False


def test_a_reader_ends_with_its_connection(daemon: Daemon) -> None:
    with Peer(daemon.socket) as peer:
        control = RpcClient(daemon.socket, peer.token, 20.0)
        ended = background(lambda: list(control.events(follow=True)))
    with pytest.raises(weightd.DaemonUnreachableError, match="has restarted, or closed our connection; call again"):
        ended.result(60)
    control.close()


def test_a_reader_ends_with_the_daemon(daemon: Daemon) -> None:
    client = daemon.connect()
    client.drain()
    following = client.events(follow=True)
    assert [next(following).kind for _ in range(2)] == ["draining", "drained"]
    ended = background(lambda: next(following))
    assert daemon.stop() == 0
    with pytest.raises((weightd.LeaseLostError, weightd.DaemonUnreachableError)):
        ended.result(60)


def test_a_lease_that_ends_without_a_word_is_seen(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a", 1, KIB), name="a")
    following = client.events(follow=True)
    assert [next(following).kind for _ in range(4)] == ["load_begun", "sealed", "load_ended", "named"]
    worker = spawn(daemon)
    # Its connection closes while a child keeps the mapping, so the daemon has looked, and in vain, when that one ends.
    worker.run(
        """
import os, time, weightd
client = weightd.connect(timeout=20.0)
held = client.attach("a")
if os.fork() == 0:
    time.sleep(1.5)
    os._exit(0)
"""
    )
    assert next(following).kind == "attached"
    worker.kill()
    assert next(following).kind == "detached"
    following.close()


@needs_root
def test_isolated_users_see_their_own(start_daemon: StartDaemon, user: User) -> None:
    daemon = open_to_all(start_daemon, isolation="uid", admins="54323")
    alice, bob, admin = (user(daemon, uid) for uid in (54321, 54322, 54323))
    path = checkpoints.write_random(daemon.folder / "a", 1, KIB)
    path.chmod(0o644)
    for each, name in ((alice, "of-alice"), (bob, "of-bob")):
        each.run("client.load(path, name=name); client.attach(name).close()", path=str(path), name=name)
    seen = "result = [[e.kind, e.uid, list(e.names)] for e in client.events()]"
    mine = alice.run(seen)
    assert {uid for _, uid, _ in mine} == {54321}
    assert {name for _, _, names in mine for name in names} == {"of-alice"}
    assert [kind for kind, _, _ in mine][:3] == ["load_begun", "sealed", "load_ended"]
    everything = admin.run(seen)
    assert {uid for _, uid, _ in everything} == {54321, 54322}
    assert len(everything) == len(mine) + len(bob.run(seen))
    admin.run("client.drain()")
    assert [kind for kind, _, _ in alice.run(seen)][-1] == "drained", "what is of all is told to all"


@needs_root
def test_isolated_users_hear_that_room_was_needed_but_not_of_each_other(start_daemon: StartDaemon, user: User) -> None:
    daemon = open_to_all(start_daemon, isolation="uid", budget="1MiB", pool="0")
    alice, bob = (user(daemon, uid) for uid in (54321, 54322))
    for each, name in ((alice, "of-alice"), (bob, "of-bob")):
        path = checkpoints.write_random(daemon.folder / name, 1, 700 * KIB, seed=name)
        path.chmod(0o644)
        each.run("report = client.load_report(path, name=name)", path=str(path), name=name)
        each.run("client.close(); client = weightd.connect(timeout=20.0)")
    assert bob.run("result = [list(report.evicted), report.evicted_others]") == [[], 1]
    seen = "result = [[e.kind, e.uid, e.user, e.command, list(e.names), list(e.evicted)] for e in client.events()]"
    evicted = [event for event in alice.run(seen) if event[0] == "evicted"]
    assert evicted == [["evicted", None, "", "", ["of-alice"], []]]
    assert not any("alice" in str(event) for event in bob.run(seen))
    assert "evicted of-alice for load 2 content=" in daemon.logged()


def test_the_command_writes_json_lines_as_they_come(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a", 1, KIB), name="a")
    lines = [json.loads(line) for line in daemon.command("events").stdout.splitlines()]
    assert [line["event"] for line in lines] == ["load_begun", "sealed", "load_ended", "named"]
    assert set(lines[0]) == {"time", "event", "load", "device", "names", "pid", "uid", "user", "command"}
    assert all(line["names"] == ["a"] for line in lines)
    assert set(lines[2]) - set(lines[0]) == {
        "reason", "message", "seconds", "content_digest", "total_bytes", "unique_bytes", "read_bytes",
        "evicted", "evicted_others",
    }  # fmt: skip
    with subprocess.Popen(
        leashed([sys.executable, "-m", "weightd", "events", "--follow"]),
        env=environment(daemon.socket), stdout=subprocess.PIPE, text=True,
    ) as following:  # fmt: skip
        try:
            assert following.stdout is not None
            for line in lines:
                assert json.loads(following.stdout.readline()) == line
            attachment = client.attach("a")
            last = json.loads(following.stdout.readline())
            assert (last["event"], last["names"], last["pid"] > 0) == ("attached", ["a"], True)
            attachment.close()
        finally:
            following.kill()
