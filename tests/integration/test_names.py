"""Whose a name is, who sees what, and what isolation keeps apart: with real users, so most of it needs root."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints, memory
from support.daemon import Daemon, eventually
from support.users import ADMIN, ALICE, BOB, needs_root, open_to_all, user_of
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
User = Callable[[Daemon, int], Worker]
MIB = 1 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="weightd-names-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def contents(daemon: Daemon) -> dict[str, str]:
    """Owner by name, as root sees it."""
    with weightd.connect(daemon.socket, timeout=20.0) as client:
        return {name: str(c.owner_uid) for c in client.checkpoints() for name in c.names}


# -- one user --------------------------------------------------------------------------------------------------------


def test_a_tag_moves_to_new_content_and_old_leases_keep_the_old(daemon: Daemon, tmp_path: Path) -> None:
    old = checkpoints.write_random(tmp_path / "old.safetensors", 2, MIB, seed="old")
    new = checkpoints.write_random(tmp_path / "new.safetensors", 2, MIB, seed="new")
    with daemon.connect() as client:
        first = client.load(old, name="current")
        held = client.attach("current")
        second = client.load(new, name="current")
        assert second.names == ("current",)
        assert client.inspect(first.content_digest).checkpoint.names == ()
        assert held.buffer("t1") == checkpoints.random_bytes(("old", 1), MIB)
        with client.attach("current") as moved:
            assert moved.content_digest == second.content_digest
            assert moved.buffer("t1") == checkpoints.random_bytes(("new", 1), MIB)
        with pytest.raises(weightd.InUseError):
            client.remove(first.content_digest)
        with client.attach(first.content_digest) as by_digest:
            assert by_digest.buffer("t0") == checkpoints.random_bytes(("old", 0), MIB)
        held.close()
        assert client.remove(first.content_digest) == 2 * MIB


def test_several_names_of_one_content(daemon: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 2, MIB)
    with daemon.connect() as client:
        for name in ("b", "a", "c"):
            client.load(path, name=name)
        assert [c.names for c in client.checkpoints()] == [("a", "b", "c")]
        assert client.remove("b") == 0
        with client.attach("a"):
            assert client.remove("c") == 0  # only a name goes
            with pytest.raises(weightd.InUseError):
                client.remove("a")
        assert client.checkpoints()[0].names == ("a",)
        assert client.remove("a") == 2 * MIB
        assert client.checkpoints() == []


@pytest.mark.parametrize(
    "name",
    ["", "a\udcff", "a" * 12, "0123456789abcdef" * 4, "sha256:abcdef", "new\nline", "\x7f", "x" * 1025, "é" * 513],
)
def test_names_that_cannot_be(name: str, daemon: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 1, 1000)
    with daemon.connect() as client:
        with pytest.raises(weightd.InvalidReferenceError, match="name"):
            client.load(path, name=name)
        assert client.checkpoints() == []


# -- several users, one sharing domain -------------------------------------------------------------------------------


@needs_root
def test_a_name_belongs_to_who_made_it(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon)
    mine = checkpoints.write_random(folder / "mine.safetensors", 2, MIB, seed="alice")
    other = checkpoints.write_random(folder / "other.safetensors", 2, MIB, seed="bob")
    alice, bob = user(daemon, ALICE), user(daemon, BOB)
    assert alice.run("result = load(path, name='model')", path=str(mine)) == ["model"]

    kind, message = bob.run("result = load(path, name='model')", path=str(other))
    assert kind == "PermissionDeniedError"
    assert f"'model' belongs to uid {ALICE}" in message
    for action in ("remove", "pin", "unpin"):
        kind, message = bob.run(f"result = attempt(client.{action}, 'model')")
        assert (action, kind) == (action, "PermissionDeniedError")
        assert f"belongs to uid {ALICE}" in message
    # By digest it is no less hers.
    assert bob.run("result = attempt(client.remove, client.inspect('model').checkpoint.content_digest)")[0] == kind
    assert contents(daemon) == {"model": str(ALICE)}
    # Sharing is what the domain is for: he may look, attach, and load the same content under a name of his own.
    expected = checkpoints.random_bytes(("alice", 1), MIB).hex()
    assert bob.run("a = client.attach('model'); result = bytes(a.buffer('t1')).hex()") == expected
    assert bob.run("a.close(); del a; result = load(path, name='same')", path=str(mine)) == ["model", "same"]
    assert contents(daemon) == {"model": str(ALICE), "same": str(ALICE)}  # a checkpoint's owner: its first name's
    assert bob.run("result = attempt(client.remove, 'same')") == 0
    assert alice.run("result = client.pin('model').pinned") is True
    for worker in (alice, bob):  # what they loaded waits for them until they leave
        worker.run("client.close()")
    with daemon.connect() as root:  # root is an admin
        assert root.unpin("model").pinned is False
        assert root.remove("model") == 2 * MIB


@needs_root
def test_a_default_name_of_another_user_is_dropped(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon)
    path = checkpoints.write_random(folder / "m.safetensors", 2, MIB, seed=1)
    alice, bob = user(daemon, ALICE), user(daemon, BOB)
    assert alice.run("result = load(path)", path=str(path)) == [str(path)]
    alice.run("old = client.attach(path)")
    checkpoints.write_random(path, 2, MIB, seed=2)
    assert bob.run("result = load(path)", path=str(path)) == []
    assert contents(daemon) == {str(path): str(ALICE)}
    # The path is what counts for him: he gets what stands there now, she keeps what she has.
    now, before = (checkpoints.random_bytes((seed, 1), MIB).hex() for seed in (2, 1))
    assert bob.run("a = client.attach(__import__('pathlib').Path(path)); result = bytes(a.buffer('t1')).hex()") == now
    assert alice.run("result = bytes(old.buffer('t1')).hex()") == before
    assert alice.run("result = load(path)") == [str(path)]
    assert alice.run("result = bytes(client.attach(path).buffer('t1')).hex(); import gc; gc.collect()") == now


@needs_root
def test_a_name_cannot_slip_other_weights_under_a_path(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon)
    good = checkpoints.write_random(folder / "good.safetensors", 1, MIB, seed="good")
    evil = checkpoints.write_random(folder / "evil.safetensors", 1, MIB, seed="evil")
    assert user(daemon, BOB).run("result = load(evil, name=good)", good=str(good), evil=str(evil)) == [str(good)]
    alice = user(daemon, ALICE)
    source = "a = client.attach(good); result = bytes(a.buffer('t0')).hex()"
    assert alice.run(source, good=str(good)) == checkpoints.random_bytes(("good", 0), MIB).hex()


@needs_root
def test_admins_may_what_owners_may(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon, admins=str(ADMIN))
    one = checkpoints.write_random(folder / "one.safetensors", 1, MIB, seed=1)
    two = checkpoints.write_random(folder / "two.safetensors", 1, MIB, seed=2)
    alice, admin = user(daemon, ALICE), user(daemon, ADMIN)
    assert alice.run("result = load(path, name='model'); client.close()", path=str(one)) == ["model"]
    assert admin.run("result = client.pin('model').pinned") is True
    assert admin.run("result = client.unpin('model').pinned") is False
    assert admin.run("result = load(path, name='model')", path=str(two)) == ["model"]
    assert contents(daemon) == {"model": str(ALICE)}, "a name that an admin moves stays its owner's"
    admin.run("client.close(); client = weightd.connect(timeout=20.0)")
    assert admin.run("result = attempt(client.remove, 'model')") == MIB


@needs_root
def test_files_that_a_user_cannot_open(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon)
    path = checkpoints.write_random(folder / "m.safetensors", 1, MIB)
    path.chmod(0o600)
    kind, message = user(daemon, ALICE).run("result = load(path)", path=str(path))
    assert kind == "PermissionDeniedError"
    assert "m.safetensors" in message


@needs_root
def test_sockets_are_closed_to_others_by_default(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon()
    daemon.folder.chmod(0o755)
    for socket in (daemon.socket, daemon.socket.with_name("w.sock.handles")):
        assert socket.stat().st_mode & 0o777 == 0o600
    worker = spawn(daemon)
    with pytest.raises(AssertionError, match=r"PermissionDeniedError: you may not reach .*only user root may connect"):
        user_of(worker, ALICE)


@needs_root
def test_another_user_can_write_to_nothing_it_gets(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon)
    path = checkpoints.write_random(folder / "m.safetensors", 1, MIB)
    alice = user(daemon, ALICE)
    refused = """
import mmap
from weightd._proto.v1 import handles_pb2
client.load(path, name="m")
received = client._handles.attach(handles_pb2.AttachRequest(reference="m"))
ways = {
    "write": lambda fd: os.pwrite(fd, b"x", 0),
    "shared map": lambda fd: mmap.mmap(fd, 1, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    "open again": lambda fd: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
    "chmod": lambda fd: os.fchmod(fd, 0o600),
    "truncate": lambda fd: os.ftruncate(fd, 0),
    "punch": lambda fd: os.posix_fallocate(fd, 0, 4096),
}
result = []
for fd in received.descriptors:
    for name, way in ways.items():
        try:
            way(fd)
        except OSError:
            pass
        except ValueError:
            assert os.fstat(fd).st_size == 0  # a lease file: there is nothing to map
        else:
            result.append(name)
    os.close(fd)
"""
    assert alice.run(refused, path=str(path)) == []


# -- isolation by user -----------------------------------------------------------------------------------------------


@needs_root
def test_isolated_users_share_nothing_and_see_nothing(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon, isolation="uid")
    path = checkpoints.write_random(folder / "m.safetensors", 2, MIB)
    alice, bob = user(daemon, ALICE), user(daemon, BOB)
    report = "r = client.load_report(path, name='model'); result = [r.unique_bytes, r.shared_bytes]"
    assert alice.run(report, path=str(path)) == [2 * MIB, 0]
    look = "result = [len(client.checkpoints()), len(client.leases()), attempt(client.attach, 'model')[0]]"
    alice.run("a = client.attach('model')")
    assert bob.run(look) == [0, 0, "NotFoundError"]
    for action in ("inspect", "pin", "unpin", "remove"):
        assert bob.run(f"result = attempt(client.{action}, 'model')[0]") == "NotFoundError", action
    digest = alice.run("result = a.content_digest")
    assert bob.run(f"result = attempt(client.attach, {digest!r})[0]") == "NotFoundError"

    assert bob.run(report, path=str(path)) == [2 * MIB, 0], "bytes of another user were shared"
    bob.run("a = client.attach('model')")
    with daemon.connect() as root:
        stats = root.stats()
        assert (stats.checkpoints, stats.blobs, stats.resident_bytes) == (2, 4, 4 * MIB)
        assert {c.owner_uid for c in root.checkpoints()} == {ALICE, BOB}
        assert {lease.uid for lease in root.leases()} == {ALICE, BOB}
    assert daemon.allocates(4 * MIB)
    assert not segments(alice.pid) & segments(bob.pid), "two users map one segment"
    # Each his own name, and each his own.
    assert bob.run("a.close(); del a; result = attempt(client.remove, 'model')") == 2 * MIB
    assert alice.run("result = len(client.checkpoints())") == 1
    assert memory.mappings(bob.pid) == 0


def segments(pid: int) -> set[str]:
    """Inodes of the segments that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:weightd-" in line}


@needs_root
def test_memory_that_a_user_gave_up_reaches_no_other_user(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon, isolation="uid", budget="8MiB", pool="8MiB")
    one = checkpoints.write_random(folder / "one.safetensors", 5, MIB, seed=1)
    two = checkpoints.write_random(folder / "two.safetensors", 5, MIB, seed=2)
    alice, bob = user(daemon, ALICE), user(daemon, BOB)
    source = """
client.load(path, name="model")
with client.attach("model") as a:
    buffers = [a.buffer("t0")]
with open("/proc/self/maps") as maps:
    result = sorted({line.split()[4] for line in maps if "/memfd:weightd-" in line})
"""
    before = alice.run(source, path=str(one))
    assert before
    alice.run("del buffers; a = None; client.remove('model')")
    with daemon.connect() as root:
        eventually(lambda: root.stats().devices[0].reusable_bytes >= 5 * MIB, what="the pool to hold what she gave up")
    after = bob.run(source, path=str(two))
    assert not set(before) & set(after)


def test_a_name_is_not_mistaken_for_a_path_that_happens_to_exist(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 2, 1000)
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    client = daemon.connect()
    client.load(path, name="base")
    client.load(path)
    assert client.pin("base").pinned
    assert client.unpin("m.safetensors").names == ("base", str(path))
    assert client.verify("base").total_blobs == 2
    client.remove("base")
    assert client.inspect(path).checkpoint.names == (str(path),)


def test_a_path_that_is_also_the_name_of_another_content_is_refused(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = checkpoints.write_random(tmp_path / "m.safetensors", 2, 1000, seed="named")
    folder = checkpoints.write_random(tmp_path / "prod" / "model.safetensors", 2, 1000, seed="folder").parent
    checkpoints.rest(folder / "model.safetensors")  # else nobody knows the file again
    client = daemon.connect()
    digest = client.load(folder, name="prod").content_digest
    with client.attach("prod") as attachment:
        assert attachment.content_digest == digest, "both are the same content"
    assert client.pin("prod").pinned
    client.unpin("prod")
    client.load(named, name="prod")
    for call in (client.attach, client.inspect, client.pin, client.verify, client.remove):
        with pytest.raises(weightd.InvalidReferenceError, match=r"prod: is a path here, and the name of a checkpoint"):
            call("prod")
    with client.attach("./prod") as attachment:
        assert attachment.content_digest == digest
    assert not [lease for lease in client.leases() if not lease.waiting]


def test_a_name_outlives_the_eviction_of_its_content(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Nobody can push a checkpoint out of memory to get hold of its name."""
    daemon = start_daemon(budget="4MiB", pool="0")
    client = daemon.connect()
    one = checkpoints.write_random(tmp_path / "one.safetensors", 3, 1 << 20, seed="one")
    two = checkpoints.write_random(tmp_path / "two.safetensors", 3, 1 << 20, seed="two")
    with daemon.connect() as first:
        digest = first.load(one, name="prod").content_digest
    with daemon.connect() as second:
        second.load(two, name="other")
    with pytest.raises(weightd.NotFoundError, match="prod"):
        client.inspect("prod")
    client.remove("other")
    client.load(one)
    assert client.inspect("prod").checkpoint.content_digest == digest
    assert client.remove("prod") == 0  # the path is a name of it, too
    with pytest.raises(weightd.NotFoundError):
        client.remove("prod")


def test_paths_that_came_and_went_leave_no_names_and_chosen_names_are_listed(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(budget="2MiB", pool="0")
    for number in range(9):
        path = checkpoints.write_random(tmp_path / f"{number}.safetensors", 1, MIB, seed=number)
        with daemon.connect() as client:
            client.load(path)
            if number == 3:
                client.load(path, name="chosen")
                chosen = client.load(path, name=str(path)).content_digest  # chosen, too, by who says so
                old = str(path)
    client = daemon.connect()
    there = {name for checkpoint in client.checkpoints() for name in checkpoint.names}
    assert there <= {str(tmp_path / f"{number}.safetensors") for number in range(9)}
    assert 1 <= len(there) <= 2
    listed = client.names()
    assert {name.name: name.state for name in listed} == {
        "chosen": "evicted",
        old: "evicted",
        **dict.fromkeys(there, "resident"),
    }
    assert {name.content_digest for name in listed if name.state == "evicted"} == {chosen}
    assert {name.name for name in listed if name.is_default} == there
    rows = json.loads(daemon.command("ls", "--names", "--format", "json").stdout)
    assert [row["name"] for row in rows] == [name.name for name in listed] == sorted({"chosen", old, *there})
    assert rows[-1].keys() == {"name", "content_digest", "state", "owner", "owner_uid", "is_default"}
    assert daemon.command("ls", "--names", "-q").stdout.splitlines() == [name.name for name in listed]
    lines = daemon.command("ls", "--names").stdout.splitlines()
    assert lines[0].split() == ["NAME", "DIGEST", "STATE", "OWNER"]
    assert any(line.startswith("chosen ") and " evicted " in line for line in lines)
    client.remove("chosen")
    assert "chosen" not in {name.name for name in client.names()}


def test_a_path_means_the_files_whatever_their_checkpoint_is_called(daemon: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 2, 1000)
    other = checkpoints.write_random(tmp_path / "other.safetensors", 2, 1000, seed="other")
    checkpoints.rest(path, other)
    client = daemon.connect()
    digest = client.load(path, name="base").content_digest
    assert client.inspect(path).checkpoint.content_digest == digest
    assert client.verify(path).total_blobs == 2
    assert client.pin(path).pinned
    assert not client.unpin(path).pinned
    with pytest.raises(weightd.NotFoundError):
        client.inspect(other)
