"""A daemon of an earlier commit is killed, and this one takes its place: nothing is lost, and its clients go on.

Whatever is kept for the next daemon or sent to a client has a version, and a test here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.content import content
from support.daemon import WATCHED, Daemon, eventually
from support.manager import Manager
from support.released import MissingHistoryError, Released
from support.worker import Worker
from weightd.client import Client

StartDaemon = Callable[..., Daemon]
OldClient = Callable[[Daemon], Worker]
MIB = 1 << 20
TENSORS = 4

lasting = pytest.mark.backends("host", "cuda_vmm")

ATTACH = "attachment = client.attach(reference)"
READ = """
from support.content import content
result = {key.name: hashlib.sha256(content(attachment, key.name)).hexdigest() for key in attachment.tensors}
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """The earlier commit."""
    try:
        return Released(tmp_path_factory.mktemp("released") / "weightd")
    except MissingHistoryError as error:
        pytest.skip(f"NO UPGRADE IS TESTED: {error}; fetch the whole history (git fetch --unshallow)")


@pytest.fixture
def old_client(released: Released, workers: list[Worker]) -> OldClient:
    """Spawn a client process of the earlier commit, with `client`."""

    def spawn(daemon: Daemon) -> Worker:
        worker = released.worker(daemon)
        workers.append(worker)
        worker.run("import hashlib, weightd\nclient = weightd.connect(timeout=60)\nresult = weightd.__file__")
        return worker

    return spawn


def saved(folder: Path, seed: str, shared: dict[int, object] | None = None) -> Path:
    return checkpoints.write_random(folder / f"{seed}.safetensors", TENSORS, MIB, seed, shared)


def hashes(seed: str) -> dict[str, str]:
    """What `READ` finds in an attachment of `saved`."""
    return {
        f"t{number}": hashlib.sha256(checkpoints.random_bytes((seed, number), MIB)).hexdigest()
        for number in range(TENSORS)
    }


def pids(client: Client) -> set[int | None]:
    return {lease.pid for lease in client.leases() if not lease.waiting}


def replaced(daemon: Daemon) -> Client:
    """Kill the earlier daemon, start this commit's in its place, and connect."""
    daemon.kill()
    daemon.argv = WATCHED
    daemon.start()
    return daemon.connect()


@lasting
def test_everything_that_an_earlier_daemon_held_is_taken_up(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path, released: Released, old_client: OldClient
) -> None:
    paths = [saved(tmp_path, "a"), saved(tmp_path, "b", {0: ("a", 0)}), saved(tmp_path, "c")]
    checkpoints.rest(*paths)
    daemon = start_daemon(manager=manager, argv=released.argv, pool="0")
    before = old_client(daemon).run(
        """
client.load(f"{folder}/a.safetensors", name="a", pin=True)
client.load(f"{folder}/b.safetensors", name="b")
client.load(f"{folder}/b.safetensors", name="another")
client.load(f"{folder}/c.safetensors")
result = [[c.content_digest, list(c.names), c.pinned, c.total_bytes, c.tensors] for c in client.checkpoints()]
""",
        folder=str(tmp_path),
    )
    assert len(before) == len(paths)
    client = replaced(daemon)
    after = [[c.content_digest, list(c.names), c.pinned, c.total_bytes, c.tensors] for c in client.checkpoints()]
    assert after == before
    for path in paths:
        report = client.load_report(path)
        assert report is not None
        assert report.read_bytes == 0
        with client.attach(path) as attachment:
            for number in range(TENSORS):
                of = "a" if (path.stem, number) == ("b", 0) else path.stem
                assert content(attachment, f"t{number}") == checkpoints.random_bytes((of, number), MIB)


@lasting
def test_no_byte_that_an_earlier_client_reads_is_filled_again(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path, released: Released, old_client: OldClient
) -> None:
    for seed in ("a", "b", "c", "d", "e"):
        saved(tmp_path, seed)
    daemon = start_daemon(manager=manager, argv=released.argv, budget="16MiB", pool="0")
    holder, silent, idle = (old_client(daemon) for _ in range(3))
    holder.run("client.load(path, name='a')", path=str(tmp_path / "a.safetensors"))
    holder.run(ATTACH, reference="a")
    silent.run("client.load(path, name='b')", path=str(tmp_path / "b.safetensors"))
    silent.run(ATTACH + "\nclient.close()", reference="b")  # it will not say who it is
    idle.run("client.load(path, name='c')", path=str(tmp_path / "c.safetensors"))
    client = replaced(daemon)
    eventually(lambda: pids(client) == {holder.pid, None}, what="one says who it is, the other is held all the same")
    assert client.stats().leases == 2
    for seed in ("d", "c", "e", "d", "c"):  # beside two that are read there is room for two
        with daemon.connect() as other:
            other.load(tmp_path / f"{seed}.safetensors", name=seed)
    checkpoints.write_random(tmp_path / "big.safetensors", 3 * TENSORS, MIB, "big")
    with pytest.raises(weightd.CapacityError):
        client.load(tmp_path / "big.safetensors")
    for name in ("a", "b"):
        with pytest.raises(weightd.InUseError):
            client.remove(name)
    assert holder.run(READ) == hashes("a")
    assert silent.run(READ) == hashes("b")
    for worker in (holder, silent):
        worker.run("attachment.close()")
    eventually(lambda: client.stats().leases == 0, what="their leases end")
    client.load(tmp_path / "big.safetensors")


@lasting
def test_earlier_clients_are_served_on(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path, released: Released, old_client: OldClient
) -> None:
    """One that was there before and one that comes now: they load, attach, hold what they read, and detach."""
    for seed in ("a", "b"):
        saved(tmp_path, seed)
    daemon = start_daemon(manager=manager, argv=released.argv, pool="0")
    before = old_client(daemon)
    before.run("client.load(path, name='a')", path=str(tmp_path / "a.safetensors"))
    client = replaced(daemon)
    fresh = old_client(daemon)
    for worker, seed in ((before, "a"), (fresh, "b")):
        worker.run("client.load(path, name=name)", path=str(tmp_path / f"{seed}.safetensors"), name=seed)
        worker.run(ATTACH, reference=seed)
        assert worker.run(READ) == hashes(seed)
        assert worker.run("result = [lease.pid for lease in client.leases()]").count(worker.pid) == 1
    # Its leases hold with this daemon, and with the next one of this commit.
    for _ in range(2):
        for worker, seed in ((before, "a"), (fresh, "b")):
            with pytest.raises(weightd.InUseError):
                client.remove(seed)
            assert worker.run(READ) == hashes(seed)
        daemon.kill()
        daemon.start()
        client = daemon.connect()
        eventually(lambda: pids(client) == {before.pid, fresh.pid}, what="both say who they are")  # noqa: B023  # called here
    for worker, seed in ((before, "a"), (fresh, "b")):
        worker.run("attachment.close()")
        eventually(lambda: worker.pid not in pids(client), what="the lease ends")  # noqa: B023  # called here
        client.remove(seed)


@lasting
def test_this_client_is_served_by_an_earlier_daemon(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path, released: Released
) -> None:
    """The library may be newer than the daemon of its machine: what it sends says nothing else there."""
    daemon = start_daemon(manager=manager, argv=released.argv, pool="0")
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a")
    attachments = [client.attach("a") for _ in range(3)]
    attachments.pop().close()
    assert client.stats().leases == 2
    client = replaced(daemon)
    (first, second) = attachments
    assert client.stats().leases == 2
    for attachment in (first, second):
        assert content(attachment, "t1") == checkpoints.random_bytes(("a", 1), MIB)
        attachment.close()
    eventually(lambda: client.stats().leases == 0, what="the leases end")
