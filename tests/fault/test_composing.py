"""A daemon that is killed while it composes a checkpoint, and a client that is gone before it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.composed import sealed
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.manager import Manager
from support.worker import Worker
from weightd.composing import ComposedTensor, TensorSource
from weightd.types import CheckpointFile

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]

LENGTH = 1 << 20
PARTS = 3


@pytest.fixture
def manager(short_path: Path) -> Iterator[Manager]:
    """A service manager, which forgets everything at the end."""
    manager = Manager(short_path / "notify")
    yield manager
    manager.close()


def seed(part: int) -> tuple[str, int]:
    return "part", part


def compose(client: weightd.Client, digests: list[str]) -> weightd.LoadResult:
    tensors = [
        ComposedTensor(0, f"w{part}", "U8", (LENGTH,), TensorSource(digest, "", "t"))
        for part, digest in enumerate(digests)
    ]
    return client.compose([CheckpointFile("", "model")], tensors, name="whole", pin=True)


def check(client: weightd.Client) -> None:
    with client.attach("whole") as attachment:
        for part in range(PARTS):
            assert content(attachment, f"w{part}") == checkpoints.random_bytes(seed(part), LENGTH)


@pytest.mark.backends("host", "cuda_vmm")
def test_killed_around_the_seal_it_is_there_as_a_whole_or_not_at_all(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path
) -> None:
    armed = tmp_path / "armed"
    daemon = start_daemon(manager=manager, argv=launcher(points=armed), pool="0")
    client, digests = daemon.connect(), []
    for part in range(PARTS):
        with sealed({"t": ("U8", (LENGTH,), checkpoints.random_bytes(seed(part), LENGTH))}) as descriptor:
            loaded = client.load_memory(descriptor, name=f"part{part}")
        assert loaded is not None
        digests.append(loaded.content_digest)
    used = client.stats().devices[0].used_bytes
    for point in ("seal.barrier", "compose.seal", "torn", "flip.written"):
        armed.write_text(point)
        with pytest.raises((weightd.DaemonUnreachableError, weightd.LeaseLostError)):
            compose(client, digests)
        assert daemon.process is not None
        assert daemon.process.wait(60) == -9, point
        daemon.kill()
        daemon.start()
        client = daemon.connect()
        there = {info.name: info.pinned for info in client.checkpoints()}
        parts = dict.fromkeys((f"part{part}" for part in range(PARTS)), False)
        assert there == parts | ({"whole": True} if point == "flip.written" else {}), point
        result = compose(client, digests)
        assert result.read_bytes == 0
        check(client)
        if point != "flip.written":
            client.remove("whole")
        assert client.stats().devices[0].used_bytes == used, point
    for digest in digests:
        client.remove(digest)
    daemon.kill()
    daemon.start()
    client = daemon.connect()
    assert [info.name for info in client.checkpoints()] == ["whole"]
    check(client)
    client.verify("whole")


BEGIN = """
import threading
from weightd.composing import ComposedTensor, TensorSource
from weightd.types import CheckpointFile
tensors = [ComposedTensor(0, "w", "U8", (100,), TensorSource(digest, "", "t0"))]
tensors += [ComposedTensor(0, f"e{at}", "F32", (0,)) for at in range(50_000)]
options = {"name": "whole", "detached": detached}
threading.Thread(target=client.compose, args=([CheckpointFile("", "model")], tensors), kwargs=options).start()
"""


@pytest.mark.parametrize("detached", [False, True])
def test_a_client_that_is_gone_meanwhile_has_composed_nothing_unless_detached(
    daemon: Daemon, spawn: Spawn, tmp_path: Path, detached: bool
) -> None:
    """A composition is under way, or is done by then: in either case nothing but the checkpoint is left of it."""
    path = checkpoints.write_random(tmp_path / "a.safetensors", 1, 100)
    client = daemon.connect()
    digest = client.load(path, name="a").content_digest
    books = client.stats().books
    assert books is not None
    worker = spawn(daemon)
    worker.run("import weightd; client = weightd.connect(timeout=60.0); client.version()")
    following = client.events(follow=True)
    worker.run(BEGIN, digest=digest, detached=detached)
    load = next(event.load for event in following if event.kind == "load_begun" and event.pid == worker.pid)
    worker.kill()
    ended = next(event for event in following if event.kind == "load_ended" and event.load == load)
    assert ended.reason == "OK" if detached else ended.reason in ("CANCELLED", "OK")
    done = ended.reason == "OK"
    names = {"a", "whole"} if done else {"a"}
    eventually(lambda: {info.name for info in client.checkpoints()} == names)
    if done:
        client.remove("whole")
    eventually(lambda: client.stats().books == books)
    eventually(lambda: [lease.checkpoint for lease in client.leases()] == ["a"])
