"""What lies where on a device, and the tensors of a checkpoint, as a monitor asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.background import background
from support.daemon import Daemon, eventually
from support.gated import gated_argv
from support.users import ALICE, BOB, needs_root, open_to_all
from support.worker import Worker
from weightd.errors import NotFoundError
from weightd.inspection import DeviceMap, StoredTensor

StartDaemon = Callable[..., Daemon]
User = Callable[[Daemon, int], Worker]
MIB = 1 << 20


def bytes_by_kind(found: DeviceMap) -> Counter[str]:
    """Bytes of each kind; the extents cover each segment."""
    sizes = {one.segment: one.size_bytes for one in found.segments}
    ends = dict.fromkeys(sizes, 0)
    counted: Counter[str] = Counter()
    for extent in found.extents:
        assert ends[extent.segment] == extent.offset
        ends[extent.segment] += extent.length
        counted[extent.kind] += extent.length
    assert ends == sizes
    assert list(sizes) == sorted(sizes)
    return counted


def users_of(found: DeviceMap, tensor: StoredTensor) -> set[str]:
    """The names of the checkpoints that use the extent of a tensor."""
    around = [
        extent
        for extent in found.extents
        if extent.segment == tensor.segment and extent.offset < tensor.offset + tensor.length
        if extent.offset + extent.length > tensor.offset
    ]
    assert [extent.kind for extent in around] == ["blobs"]
    users = around[0].users
    assert users is not None
    return {found.names[digest] for digest in users.checkpoints}


@pytest.mark.backends(*EVERY)
def test_what_two_checkpoints_share_is_on_the_map(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    base = checkpoints.write_random(tmp_path / "base.safetensors", 6, MIB, seed="base")
    tuned = checkpoints.write_random(
        tmp_path / "tuned.safetensors", 6, MIB, seed="tuned", shared={at: ("base", at) for at in range(4)}
    )
    with daemon.connect() as client, weightd.connect(daemon.socket, read_only=True) as monitor:
        for path, name in ((base, "base"), (tuned, "tuned")):
            client.load_report(path, name=name)
        eventually(lambda: "leaving" not in bytes_by_kind(monitor.device_map()))
        found, stats = monitor.device_map(), monitor.stats()
        counted, device = bytes_by_kind(found), stats.devices[0]
        assert (found.device, found.revision) == (backend.uuid, stats.revision)
        assert counted["blobs"] == device.live_bytes == 8 * MIB
        assert counted["hole"] == device.reusable_bytes
        assert sum(counted.values()) - counted["hollow"] == device.used_bytes
        assert sum(extent.blobs for extent in found.extents) == stats.blobs == 8
        assert set(found.names.values()) == {"base", "tuned"}
        for name in ("base", "tuned"):
            stored = monitor.tensors(name)
            with client.attach(name) as attachment:
                there = list(attachment.tensors.values())
            assert [
                (one.component, one.name, one.dtype, one.shape, one.offset, one.length, one.digest, one.variant)
                for one in stored
            ] == [
                (one.component, one.name, one.dtype, one.shape, one.offset, one.length, one.digest, one.variant)
                for one in there
            ]
            assert len({(one.segment, other.segment) for one, other in zip(stored, there, strict=True)}) == len(
                {other.segment for other in there}
            ), "a segment has one number"
            for at, tensor in enumerate(stored):
                expected = {"base", "tuned"} if at < 4 else {name}
                assert {found.names[digest] for digest in tensor.users.checkpoints} == expected
                assert users_of(found, tensor) == expected
        client.remove("base")
        after = monitor.device_map()
        assert {users for tensor in monitor.tensors("tuned") for users in users_of(after, tensor)} == {"tuned"}
        with pytest.raises(NotFoundError):
            monitor.tensors("base")


def test_a_look_is_no_use_no_lease_and_no_event(daemon: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 3, MIB)
    with daemon.connect() as client:
        client.load_report(path, name="m")

        def state() -> tuple[object, ...]:
            return client.checkpoints(), client.leases(), client.stats().revision, len(list(client.events()))

        before = state()
        client.device_map()
        client.tensors("m")
        daemon.command("map")
        daemon.command("inspect", "m", "--tensors")
        assert state() == before


def test_memory_in_flight_is_on_the_map(start_daemon: StartDaemon, short_path: Path) -> None:
    gate = short_path / "gate"
    daemon = start_daemon(argv=gated_argv(gate))
    path = checkpoints.write_random(short_path / "m.safetensors", 3, MIB)
    with daemon.connect() as client, weightd.connect(daemon.socket, read_only=True) as monitor:
        load = background(client.load_report, path, name="m")
        eventually(lambda: bytes_by_kind(monitor.device_map())["in_flight"] >= 3 * MIB)
        found, stats = monitor.device_map(), monitor.stats()
        assert bytes_by_kind(found)["in_flight"] == stats.devices[0].in_flight_bytes
        assert {one.load for one in found.extents if one.kind == "in_flight"} == {monitor.loads()[0].load}
        gate.touch()
        load.result(60)
        assert bytes_by_kind(monitor.device_map())["blobs"] == 3 * MIB


@needs_root
def test_of_others_the_map_says_how_much(start_daemon: StartDaemon, user: User, short_path: Path) -> None:
    short_path.chmod(0o755)
    daemon = open_to_all(start_daemon, isolation="uid")
    alice, bob = user(daemon, ALICE), user(daemon, BOB)
    for one, seed in ((alice, "a"), (bob, "b")):
        path = checkpoints.write_random(short_path / f"{seed}.safetensors", 2, MIB, seed=seed)
        one.run("client.load_report(path, name='mine')", path=str(path))
    look = "m = client.device_map(); result = sorted((e.kind, e.length, e.blobs) for e in m.extents), len(m.names)"
    for one in (alice, bob):
        extents, names = one.run(look)
        assert [tuple(extent) for extent in extents] == [("blobs", 2 * MIB, 2), ("others", 2 * MIB, 0)]
        assert names == 1
        assert one.run("result = [t.users.others for t in client.tensors('mine')]") == [0, 0]
    digest = alice.run("result = client.checkpoints()[0].content_digest")
    assert bob.run(f"result = attempt(client.tensors, {digest!r})[0]") == "NotFoundError"
    with daemon.connect() as admin:
        assert {one.kind for one in admin.device_map().extents} <= {"blobs", "hole", "hollow", "leaving"}
