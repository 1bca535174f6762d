"""Clients that die, hang or come in numbers: what they held ends with them, and nobody else notices."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY
from support.content import content
from support.daemon import Daemon, eventually
from support.descriptors import open_descriptors
from support.launch import launcher
from support.loader import STOP, resume, wait_stopped
from support.wire import Peer
from support.worker import Worker
from weightd._proto.v1 import handles_pb2

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20
PARTS = 300

everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")


def part(index: int) -> bytes:
    """The bytes of the tensor of part `index`."""
    return checkpoints.random_bytes(("part", index), 1000 + index)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 300 components of one tensor: each file gets a segment of its own."""
    folder = tmp_path_factory.mktemp("pipeline")
    for i in range(PARTS):
        checkpoints.write(folder / f"part{i:03}" / "model.safetensors", {"t": ("U8", (1000 + i,), part(i))})
    return checkpoints.describe_pipeline(folder)


def marked(folder: Path) -> Path:
    """A checkpoint at which a stopping loader stops."""
    return checkpoints.write(folder / "marked.safetensors", {"t": ("U8", (2 * MIB,), STOP.ljust(2 * MIB, b"x"))})


@everywhere
def test_more_files_and_segments_than_fit_into_one_message(daemon: Daemon, pipeline: Path) -> None:
    client = daemon.connect()
    checkpoint = client.load(pipeline, name="pipeline")
    assert checkpoint.tensors == PARTS
    assert client.inspect("pipeline").segments == PARTS
    with client.attach("pipeline") as attachment:
        assert len(attachment.components) == PARTS
        for i in range(PARTS):
            assert content(attachment, "t", f"part{i:03}") == part(i)
    some = [f"part{i:03}" for i in range(20, 280)]  # 260 handles: two batches
    with client.attach("pipeline", components=some) as attachment:
        assert content(attachment, "t", "part279") == part(279)
        with pytest.raises(weightd.NotFoundError):
            attachment.buffer("t", "part280")


@everywhere
def test_killed_while_loading(start_daemon: StartDaemon, tmp_path: Path, spawn: Spawn) -> None:
    daemon = start_daemon(argv=launcher(loader="stopping"))
    client, worker = daemon.connect(), spawn(daemon)
    worker.start("import weightd\nweightd.connect(timeout=60).load(path)", path=str(marked(tmp_path)))
    wait_stopped(daemon)
    worker.kill()
    eventually(lambda: client.checkpoints() == [], what="the load is cancelled")
    eventually(lambda: client.stats().devices[0].used_bytes == 0, what="its space is free again")
    assert daemon.loaders() == []


def test_killed_while_a_detached_load_goes_on(start_daemon: StartDaemon, tmp_path: Path, spawn: Spawn) -> None:
    daemon = start_daemon(argv=launcher(loader="stopping"))
    client, worker = daemon.connect(), spawn(daemon)
    worker.run(
        "import weightd\nweightd.connect(timeout=60).load_report(path, name='later', detached=True)",
        path=str(marked(tmp_path)),
    )
    loaders = wait_stopped(daemon)
    worker.kill()
    resume(*loaders)
    eventually(lambda: [c.names for c in client.checkpoints() if c.state == "resident"] == [("later",)])
    assert client.leases() == []


@everywhere
def test_killed_while_attached(daemon: Daemon, tmp_path: Path, spawn: Spawn) -> None:
    client = weightd.connect(daemon.socket, timeout=60)
    client.load(checkpoints.write_random(tmp_path / "m.safetensors", 2, 5000), name="m")
    client.close()
    client = daemon.connect()
    worker = spawn(daemon)
    worker.run("import weightd\nattachment = weightd.connect(timeout=60).attach('m')")
    (lease,) = client.leases()
    assert (lease.pid, lease.waiting) == (worker.pid, False)
    with pytest.raises(weightd.InUseError, match=f"in use by pid {worker.pid}"):
        client.remove("m")
    worker.kill()
    eventually(lambda: client.leases() == [], what="its lease is gone")
    client.remove("m")


@pytest.mark.backends("host", "cuda_vmm")
def test_killed_between_batches(daemon: Daemon, pipeline: Path, spawn: Spawn) -> None:
    client = daemon.connect()
    client.load_report(pipeline, name="pipeline", detached=True)
    resident = [("resident", ("pipeline",))]  # it gets its name a moment after it is there
    eventually(lambda: [(c.state, c.names) for c in client.checkpoints()] == resident)
    eventually(lambda: client.leases() == [])
    before = daemon.descriptors()
    worker = spawn(daemon)
    count = worker.run(
        "import os\nfrom support.wire import Peer\n"
        "peer = Peer(os.environ['WEIGHTD_SOCKET'])\n"
        "peer.ask(attach={'reference': 'pipeline'})\n"
        "result = len(peer.descriptors)"
    )
    assert count == 253
    assert daemon.descriptors() >= before + PARTS + 1 - 253  # what it has not sent yet
    worker.kill()
    eventually(lambda: client.leases() == [], what="its lease is gone")
    eventually(lambda: daemon.descriptors() <= before, what="its descriptors are closed")
    with client.attach("pipeline") as attachment:
        assert content(attachment, "t", "part299") == part(299)


def test_no_acknowledgement_in_time(start_daemon: StartDaemon, pipeline: Path) -> None:
    daemon = start_daemon(argv=launcher(ack=0.5))
    client = daemon.connect()
    client.load(pipeline, name="pipeline")
    before = daemon.descriptors()
    with Peer(daemon.socket) as slow, Peer(daemon.socket) as quick:
        assert slow.ask(attach=handles_pb2.AttachRequest(reference="pipeline")).attach.descriptors == 253
        assert slow.is_closed()
        # The memory that it has got it keeps: the lease is the descriptor's, not the connection's.
        assert [lease.pid for lease in client.leases() if not lease.waiting] == [os.getpid()]
        quick.ask(attach=handles_pb2.AttachRequest(reference="pipeline"))
        assert quick.ask(ack=handles_pb2.BatchAck()).batch.descriptors == PARTS + 1 - 253
        quick.ask(attach=handles_pb2.AttachRequest(reference="pipeline", manifest_only=True))  # it may go on
    eventually(lambda: all(lease.waiting for lease in client.leases()))
    eventually(lambda: daemon.descriptors() <= before, what="everything is closed")


@everywhere
def test_many_clients_attach_and_detach(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "m.safetensors", 5, 5000, seed="m"), name="m")
    with client.attach("m"):
        pass
    eventually(lambda: client.leases() == [])
    expected = checkpoints.random_bytes(("m", 4), 5000)
    before, own = daemon.descriptors(), len(open_descriptors())

    def come_and_go(_: int) -> int:
        right = 0
        with weightd.connect(daemon.socket, timeout=30.0) as one:
            for _ in range(50):
                with one.attach("m") as attachment:
                    right += content(attachment, "t4") == expected
        return right

    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(come_and_go, range(20))) == [50] * 20
    eventually(lambda: client.leases() == [], what="no lease is left")
    eventually(lambda: daemon.descriptors() <= before, what="no descriptor is left")
    assert len(open_descriptors()) <= own
    assert client.stats().leases == 0


def test_offers_end_with_the_connection(daemon: Daemon) -> None:
    """Intakes that no load has taken: the daemon's ends are closed with the connection that asked for them."""
    daemon.connect().stats()
    before = daemon.descriptors()
    with Peer(daemon.socket) as peer:
        for _ in range(10):
            peer.ask(offer=handles_pb2.OfferRequest())
        assert daemon.descriptors() >= before + 10
    eventually(lambda: daemon.descriptors() == before, what="ten intakes and a connection are closed")
