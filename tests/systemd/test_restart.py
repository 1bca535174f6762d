"""A daemon under a service manager ends, and the next one takes up what it held."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.background import background
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.loader import STOP, wait_stopped
from support.manager import Manager
from support.worker import Worker
from weightd._proto.v1 import handles_pb2
from weightd.types import DeviceStats
from weightd_daemon.handles.manifests import LOCK_BASE

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20

lasting = pytest.mark.backends("host", "cuda_vmm")


def saved(folder: Path, seed: str, count: int = 4, shared: dict[int, object] | None = None) -> Path:
    return checkpoints.write_random(folder / f"{seed}.safetensors", count, MIB, seed, shared)


def state(client: weightd.Client) -> list[weightd.CheckpointInfo]:
    """What a restart must not change: all but times of use, and leases, which have tests of their own."""
    return [replace(checkpoint, last_used_at=None, leases=0) for checkpoint in client.checkpoints()]


def figures(client: weightd.Client) -> DeviceStats:
    """The books of the device that is served, without what the machine has free, and without what waits for a client.

    A load that waits to be attached is its connection's, which ends with the daemon.
    """
    (device,) = client.stats().devices
    return replace(device, device_free_bytes=None, leased_bytes=0, evictable_bytes=0)


def holders(client: weightd.Client) -> list[int | None]:
    return sorted((lease.pid for lease in client.leases() if not lease.waiting), key=lambda pid: pid or 0)


ATTACH = "import weightd\nclient = weightd.connect(timeout=60)\nattachment = client.attach('a')"


@lasting
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_everything_is_taken_up(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path, spawn: Spawn, how: signal.Signals
) -> None:
    paths = [saved(tmp_path, "a"), saved(tmp_path, "b", 3, {0: ("a", 0)})]
    checkpoints.rest(*paths)
    daemon = start_daemon(manager=manager, pool="0")
    client = daemon.connect()
    client.load(paths[0], name="a", pin=True)
    client.load(paths[1], name="b")
    client.load(paths[1], name="another")
    worker = spawn(daemon)
    worker.run(ATTACH)
    eventually(lambda: not client.stats().devices[0].in_flight_bytes, what="loaders are done")
    before, used = state(client), figures(client)
    for _ in range(3):
        if how is signal.SIGKILL:
            daemon.kill()
        else:
            assert daemon.stop() == 0
        daemon.start()
        client = daemon.connect()
        assert state(client) == before
        assert client.stats().leases == 1
        eventually(lambda: figures(client) == used, what="the books are as before")  # noqa: B023  # called here
        assert client.stats().devices[0].leased_bytes == used.pinned_bytes, "the worker holds what is pinned"
        assert daemon.allocates(used.used_bytes, used.used_bytes)
        for path in paths:
            report = client.load_report(path, name=path.stem)
            assert report is not None
            assert report.read_bytes == 0
            with client.attach(path) as attachment:
                for number in (1, 2):
                    expected = checkpoints.random_bytes((path.stem, number), MIB)
                    assert content(attachment, f"t{number}") == expected
        with client.attach("b") as attachment:
            assert content(attachment, "t0") == checkpoints.random_bytes(("a", 0), MIB)
        eventually(lambda: holders(client) == [worker.pid], what="the worker says who it is")  # noqa: B023  # called here
    worker.run("attachment.close()")
    eventually(lambda: holders(client) == [], what="it says so on its new connection")
    client.unpin("a")
    for name in ("a", "b", "another"):
        client.remove(name)
    eventually(lambda: manager.settle() or manager.names() == ["root"], what="nothing else is kept")
    daemon.kill()
    daemon.start()
    assert daemon.connect().checkpoints() == []


@lasting
def test_a_lease_whose_holder_is_silent_is_held_and_ends_with_its_lock(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path
) -> None:
    daemon = start_daemon(manager=manager)
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a")
    leases = []
    for _ in range(20):
        received = client._handles.attach(handles_pb2.AttachRequest(reference="a", manifest_only=True))
        leases.append(received)
    for received in leases[1::2]:
        os.close(received.lease)
    daemon.kill()
    daemon.start()
    client = daemon.connect()
    listed = client.leases()
    assert [lease.lease for lease in listed] == [received.reply.lease for received in leases[::2]]
    assert {(lease.pid, lease.command, lease.uid) for lease in listed} == {(None, "", os.getuid())}
    with pytest.raises(weightd.InUseError, match=rf"in use by pid unknown \(uid {os.getuid()}\);"):
        client.remove("a")
    with client.attach("a"):
        numbers = [lease.lease for lease in client.leases()]
    assert numbers[-1] > max(received.reply.lease for received in leases)
    for received in leases[::2]:
        os.close(received.lease)
    assert client.leases() == []
    client.remove("a")


def test_a_claim_needs_the_lock_and_its_user(start_daemon: StartDaemon, manager: Manager, tmp_path: Path) -> None:
    daemon = start_daemon(manager=manager)
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a")
    received = client._handles.attach(handles_pb2.AttachRequest(reference="a", manifest_only=True))
    lease, digest = received.reply.lease, received.reply.content_digest
    daemon.kill()
    daemon.start()
    client = daemon.connect()

    def claim(number: int = lease, content_digest: str = digest, device: str = "host") -> bool:
        return client._handles.reclaim(
            handles_pb2.ReclaimRequest(lease=number, content_digest=content_digest, device=device)
        )

    assert not claim(lease + 1)
    assert not claim(content_digest="sha256:" + "0" * 64)
    assert not claim(device="GPU-0")
    assert holders(client) == [None]
    assert claim()
    assert holders(client) == [os.getpid()]
    os.close(received.lease)
    assert not claim()
    assert holders(client) == []


def test_a_lock_on_many_bytes_keeps_the_checkpoint_until_none_is_left(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path
) -> None:
    """A client may lock more than its byte, and hide the leases of others: what it hides stays held."""
    import fcntl
    import struct

    daemon = start_daemon(manager=manager)
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a")
    mine, wide = (
        client._handles.attach(handles_pb2.AttachRequest(reference="a", manifest_only=True)).lease for _ in range(2)
    )
    fcntl.fcntl(wide, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    daemon.kill()
    daemon.start()
    client = daemon.connect()
    assert len(client.leases()) == 1
    os.close(wide)
    assert len(client.leases()) == 1, "the other lease that it has hidden"
    os.close(mine)
    assert client.leases() == []
    client.remove("a")


def test_a_lock_on_the_number_of_another_lease_takes_it_from_nobody(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path
) -> None:
    """A client may lock the byte, in the manifest that it has, that is the lease of somebody else on another one."""
    import fcntl
    import struct

    daemon = start_daemon(manager=manager)
    client = daemon.connect()
    for name in ("a", "b"):
        client.load(saved(tmp_path, name), name=name)
    received = {
        name: client._handles.attach(handles_pb2.AttachRequest(reference=name, manifest_only=True))
        for name in ("a", "b")
    }
    manifests = {name: os.open(f"/proc/self/fd/{of.manifest}", os.O_RDONLY) for name, of in received.items()}
    for mine, others in (("a", "b"), ("b", "a")):  # whichever is looked at first
        at = LOCK_BASE + received[others].reply.lease
        fcntl.fcntl(manifests[mine], fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, at, 1, 0))
    for _ in range(2):
        daemon.kill()
        daemon.start()
        client = daemon.connect()
        held = {lease.checkpoint for lease in client.leases()}
        assert held == {"a", "b"}
        for name in ("a", "b"):
            with pytest.raises(weightd.InUseError):
                client.remove(name)
    for descriptor in manifests.values():
        os.close(descriptor)
    assert {lease.checkpoint for lease in client.leases()} == {"a", "b"}, "those that were given"
    for of in received.values():
        os.close(of.lease)
    assert client.leases() == []
    client.remove("b")


@lasting
def test_a_load_under_way_is_lost_and_nothing_else(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path, spawn: Spawn
) -> None:
    daemon = start_daemon(manager=manager, argv=launcher(loader="stopping"))
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a")
    worker = spawn(daemon)
    worker.run(ATTACH)
    marked = checkpoints.write(tmp_path / "m.safetensors", {"t": ("U8", (2 * MIB,), STOP.ljust(2 * MIB, b"x"))})
    future = background(client.load_report, marked)
    wait_stopped(daemon)
    daemon.kill()
    with pytest.raises(weightd.DaemonUnreachableError):
        future.result(60)
    daemon.start()
    client = daemon.connect()
    assert [checkpoint.names for checkpoint in client.checkpoints()] == [("a",)]
    eventually(
        lambda: daemon.allocates(used := client.stats().devices[0].used_bytes, used), what="only what the books say"
    )
    assert worker.run("from support.content import content\nresult = content(attachment, 't3').hex()") == (
        checkpoints.random_bytes(("a", 3), MIB).hex()
    )


@pytest.mark.parametrize("tells", [True, False])
def test_what_does_not_fit_into_the_store_ends_with_the_daemon_and_is_left_alone(
    start_daemon: StartDaemon, short_path: Path, tmp_path: Path, spawn: Spawn, tells: bool
) -> None:
    """Its bytes lie in a segment that is taken up: they must not change under those who read them."""
    manager = Manager(short_path / "small", most=3, tells=tells)  # the root record, a segment, its manifest
    try:
        daemon = start_daemon(manager=manager, reader_threads=1)
        client = daemon.connect()
        client.load(saved(tmp_path, "kept"), name="kept", pin=True)
        client.load(saved(tmp_path, "b", 2, {0: ("kept", 1)}), name="b")
        worker = spawn(daemon)
        worker.run("import weightd\nclient = weightd.connect(timeout=60)\nattachment = client.attach('b')")
        warned = "ends with this daemon: the service manager keeps 3 descriptors, and has them all" in daemon.logged()
        assert warned == tells
        daemon.kill()
        daemon.start()
        client = daemon.connect()
        assert [checkpoint.names for checkpoint in client.checkpoints()] == [("kept",)]
        for round_ in range(3):  # loads that would fill every hole
            client.load(saved(tmp_path, f"more{round_}", 6))
        client.unpin("kept")
        client.remove("kept")
        check = "from support.content import content\nresult = [content(attachment, n).hex() for n in ('t0', 't1')]"
        expected = [checkpoints.random_bytes(seed, MIB).hex() for seed in (("kept", 1), ("b", 1))]
        assert worker.run(check) == expected
    finally:
        worker.kill()
        daemon.kill()
        manager.close()


def test_a_smaller_budget_evicts_what_nobody_uses(start_daemon: StartDaemon, manager: Manager, tmp_path: Path) -> None:
    daemon = start_daemon(manager=manager, budget="64MiB", pool="0")
    client = daemon.connect()
    for name in "abc":
        client.load(saved(tmp_path, name, 8), name=name)
    client.pin("a")
    with client.attach("c") as attachment:
        daemon.kill()
        daemon._settings["budget"] = "16MiB"
        daemon.start()
        client = daemon.connect()
        assert {name for checkpoint in client.checkpoints() for name in checkpoint.names} == {"a", "c"}
        eventually(lambda: client.stats().devices[0].used_bytes <= 16 * MIB, what="the budget holds")
        daemon.kill()
        daemon._settings["budget"] = "8MiB"
        daemon.start()
        client = daemon.connect()
        assert len(client.checkpoints()) == 2
        assert re.search(r"WARNING .*device host: \d+ bytes more than its budget are leased or pinned", daemon.logged())
        assert content(attachment, "t7") == checkpoints.random_bytes(("c", 7), MIB)
        with pytest.raises(weightd.CapacityError):
            client.load(saved(tmp_path, "d"))
        os.kill(daemon.pid, signal.SIGHUP)  # the budget stays as it is, which holds up nothing else
        eventually(lambda: "settings read again" in daemon.logged(), what="settings are taken up")
        assert "not taken up" not in daemon.logged()


def test_without_a_manager_nothing_is_kept(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    before = daemon.descriptors()
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a")
    assert not [link for link in os.scandir(f"/proc/{daemon.pid}/fd") if "weightd-root" in os.readlink(link)]
    assert daemon.descriptors() <= before + 20
    daemon.kill()
    daemon.start()
    assert daemon.connect().checkpoints() == []
