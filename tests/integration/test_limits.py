"""What one user may hold: another is not held up by who has reached a limit, and admins have none."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import checkpoints
from support.daemon import Daemon, eventually
from support.gated import gated_argv
from support.users import ALICE, BOB, needs_root, open_to_all, user_of
from support.worker import Worker

pytestmark = needs_root

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
MIB = 1 << 20


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="weightd-limits-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def write(folder: Path, name: str, count: int = 3) -> Path:
    return checkpoints.write_random(folder / f"{name}.safetensors", count, MIB, seed=name)


def test_leases(start_daemon: StartDaemon, spawn: Spawn, folder: Path) -> None:
    file = folder / "weightd.toml"
    file.write_text("max_user_leases = 2\n")
    daemon = open_to_all(start_daemon, config=file)
    daemon.command("load", write(folder, "m"), "--name", "m")
    alice, second, bob = (user_of(spawn(daemon), uid) for uid in (ALICE, ALICE, BOB))
    attach = "a = attempt(client.attach, 'm'); result = a if isinstance(a, list) else held.append(a)"
    for worker in (alice, second, bob):
        worker.run("held = []")
    assert alice.run(attach) is None
    assert second.run(attach) is None  # they count together
    kind, message = alice.run(attach)
    assert kind == "CapacityError"
    assert message.startswith(f"the limit max_user_leases is reached: uid {ALICE} has 2 of 2 leases; end a process")
    assert [bob.run(attach), bob.run(attach)] == [None, None]
    assert alice.run("try:\n client.attach('m')\nexcept weightd.CapacityError as error:\n result = error.limit") == (
        "max_user_leases"
    )
    with daemon.connect() as root:
        held = [root.attach("m") for _ in range(3)]  # an admin
        for attachment in held:
            attachment.close()
    second.kill()  # what a dead process held is looked for before anybody is refused
    assert alice.run(attach) is None
    assert alice.run(attach)[0] == "CapacityError"
    file.write_text("max_user_leases = 3\n")
    os.kill(daemon.pid, signal.SIGHUP)
    eventually(lambda: "changed: max_user_leases" in daemon.logged())
    assert alice.run(attach) is None


def test_nobody_keeps_the_leases_of_another_from_ending(start_daemon: StartDaemon, spawn: Spawn, folder: Path) -> None:
    """Alice locks all bytes of everything that she was lent; Bob attaches and closes more often than his limit."""
    daemon = open_to_all(start_daemon, max_user_leases=2)
    daemon.command("load", write(folder, "m"), "--name", "m")
    alice, bob = (user_of(spawn(daemon), uid) for uid in (ALICE, BOB))
    alice.run(
        """
import fcntl, struct
from weightd._proto.v1 import handles_pb2
received = client._handles.attach(handles_pb2.AttachRequest(reference="m"))
for descriptor in (received.manifest, received.lease):
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0))
"""
    )
    for _ in range(5):
        assert bob.run("a = attempt(client.attach, 'm'); result = a if isinstance(a, list) else a.close()") is None
    with daemon.connect() as root:
        assert [lease.uid for lease in root.leases() if not lease.waiting] == [ALICE]
    alice.close()


def test_leases_that_wait_count_and_make_no_load_fail(start_daemon: StartDaemon, spawn: Spawn, folder: Path) -> None:
    daemon = open_to_all(start_daemon, max_user_leases=2)
    paths = [write(folder, name) for name in ("m", "n", "o")]
    checkpoints.rest(*paths)
    for path in paths:
        daemon.command("load", path, "--name", path.stem)
    alice = user_of(spawn(daemon), ALICE)
    for path in paths:
        assert alice.run("result = load(path)", path=str(path)) == sorted({path.stem, str(path)})
    with daemon.connect() as root:
        assert sum(lease.waiting for lease in root.leases()) == 2
        attach = "a = attempt(client.attach, name); result = a if isinstance(a, list) else None"
        assert alice.run(attach, name="o")[0] == "CapacityError"
        assert alice.run(attach, name="m") is None, "in place of the one that waits"
        root.remove("o")


def test_leases_of_a_verification_count(start_daemon: StartDaemon, spawn: Spawn, folder: Path) -> None:
    daemon = open_to_all(start_daemon, max_user_leases=2)
    for name in ("m", "n", "o"):
        daemon.command("load", write(folder, name), "--name", name)
    alice = user_of(spawn(daemon), ALICE)
    kind, message = alice.run("result = attempt(client.verify)")
    refused = f"the limit max_user_leases is reached: uid {ALICE} has 0 of 2 leases"
    assert (kind, message.startswith(refused)) == ("CapacityError", True), message
    assert alice.run("result = attempt(client.verify, 'm').done_blobs") > 0
    with daemon.connect() as root:
        assert root.verify().done_blobs > 0, "an admin has no limit"


def test_bytes(start_daemon: StartDaemon, spawn: Spawn, folder: Path) -> None:
    daemon = open_to_all(start_daemon, max_user_bytes="5MiB")
    mine, other, same, large = (write(folder, name) for name in ("mine", "other", "same", "large"))
    shutil.copy(mine, same)
    write(folder, "large", count=6)
    write(folder, "bobs")
    alice, bob = (user_of(spawn(daemon), uid) for uid in (ALICE, BOB))
    load = "result = load(path, name=name)"
    refused = f"the limit max_user_bytes is reached: uid {ALICE} has 3.01 MiB of 5.00 MiB, and this takes "
    assert alice.run(load, path=str(mine), name="mine") == ["mine"]
    for path, size in ((other, 3), (large, 6)):
        kind, message = alice.run(load, path=str(path), name="no")
        assert (kind, message.startswith(f"{refused}{size}.0")) == ("CapacityError", True), message
        assert " MiB; remove or unpin" in message
    assert alice.run(load, path=str(same), name="same") == ["mine", "same"]  # what is resident costs nothing
    assert alice.run("result = load(path, name='mine', verify=True)", path=str(mine)) == ["mine", "same"]
    # Others may bring as much, and a pin is as good as bringing it.
    assert bob.run(load, path=str(folder / "bobs.safetensors"), name="bobs") == ["bobs"]
    kind, message = alice.run("result = load(path, pin=True)", path=str(folder / "bobs.safetensors"))
    assert (kind, message.startswith(f"{refused}3.01 MiB")) == ("CapacityError", True), message
    assert daemon.command("load", large).returncode == 0  # an admin
    assert (
        alice.run("client.close(); client = weightd.connect(timeout=60); result = attempt(client.remove, 'mine')") == 0
    )
    assert alice.run("result = attempt(client.remove, 'same')") == 3 * MIB
    assert alice.run(load, path=str(other), name="other") == ["other"]


def test_bytes_of_loads_under_way_count(start_daemon: StartDaemon, spawn: Spawn, folder: Path) -> None:
    gate = folder / "gate"
    daemon = open_to_all(start_daemon, argv=gated_argv(gate), max_user_bytes="5MiB", max_loads=4)
    first, second = write(folder, "first"), write(folder, "second")
    alice, again = (user_of(spawn(daemon), ALICE) for _ in range(2))
    alice.start("result = load(path, name='first')", path=str(first))
    eventually(lambda: any(c.total_bytes for c in daemon.connect().checkpoints()), what="its size is known")
    kind, message = again.run("result = load(path, name='second')", path=str(second))
    assert (kind, "has 3.01 MiB of 5.00 MiB" in message) == ("CapacityError", True), message
    gate.touch()
    assert alice.finish() == ["first"]


def test_names(start_daemon: StartDaemon, spawn: Spawn, folder: Path) -> None:
    daemon = open_to_all(start_daemon, max_user_names=2)
    path = write(folder, "m")
    alice, bob = (user_of(spawn(daemon), uid) for uid in (ALICE, BOB))
    for name in ("one", "two", "two"):
        assert name in alice.run("result = load(path, name=name)", path=str(path), name=name)
    kind, message = alice.run("result = load(path, name='three')", path=str(path))
    assert (kind, f"uid {ALICE} has 2 of 2 names; remove a name" in message) == ("CapacityError", True)
    assert alice.run("result = load(path)", path=str(path)) == ["one", "two"]  # a name of its own accord is left out
    assert bob.run("result = load(path, name='bobs')", path=str(path)) == ["bobs", "one", "two"]


def test_offers(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = open_to_all(start_daemon, max_user_offers=3)
    alice, again, bob = (user_of(spawn(daemon), uid) for uid in (ALICE, ALICE, BOB))
    offer = "result = attempt(lambda: client._handles.offer()[0])"
    assert all(isinstance(worker.run(offer), int) for worker in (alice, again, alice))
    for worker in (alice, again):
        kind, message = worker.run(offer)
        assert (kind, f"uid {ALICE} has 3 of 3 offers" in message) == ("CapacityError", True)
    assert isinstance(bob.run(offer), int)
    assert isinstance(alice.run("client.close(); client = weightd.connect(timeout=60); " + offer), int)


def test_loads_that_wait_their_turn_are_offers_and_loads_at_a_time(
    start_daemon: StartDaemon, spawn: Spawn, folder: Path
) -> None:
    gate = folder / "gate"
    daemon = open_to_all(
        start_daemon, argv=gated_argv(gate), max_loads=4, max_user_loads=1, max_user_offers=1, reader_threads=1
    )
    paths = [write(folder, f"m{number}") for number in range(4)]
    first, second, third = (user_of(spawn(daemon), ALICE) for _ in range(3))
    bob = user_of(spawn(daemon), BOB)
    load = "result = load(path, name=name)"
    first.start(load, path=str(paths[0]), name="a")
    daemon.wait_for_loader()
    root = daemon.connect()
    eventually(lambda: len(root.checkpoints()) == 1 and any(c.total_bytes for c in root.checkpoints()))
    second.start(load, path=str(paths[1]), name="b")  # waits: one at a time
    eventually(lambda: len(root.checkpoints()) == 2, what="it waits")
    kind, message = third.run(load, path=str(paths[2]), name="c")  # and more may not wait
    assert (kind, f"uid {ALICE} has 1 of 1 offers" in message) == ("CapacityError", True), message
    bob.start(load, path=str(paths[3]), name="d")
    eventually(lambda: len(daemon.loaders()) == 2, what="another user has a turn")
    gate.touch()
    assert [first.finish(), second.finish(), bob.finish()] == [["a"], ["b"], ["d"]]
