"""A daemon that is killed at every point of a load and of an eviction, while clients compute in memory it shares."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.background import background
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.manager import Manager
from support.points import POINTS
from support.worker import Worker

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]

MIB = 1 << 20
BASES, CLIENTS, PASSING, TENSORS = 4, 8, 8, 6
ROUNDS = 2
SHARED = 5

# A client that reads and hashes all the time, and again when it is asked.
COMPUTE = """
import hashlib, threading, weightd
from support.content import content

client = weightd.connect(timeout=30)
attachment = client.attach(name)
wrong, done = [], threading.Event()

def check():
    for tensor, digest in expected.items():
        if hashlib.sha256(content(attachment, tensor)).hexdigest() != digest:
            wrong.append(f"{tensor} differs")

def compute():
    try:
        while not done.wait(0.2):
            check()
    except BaseException as error:
        wrong.append(repr(error))

thread = threading.Thread(target=compute, daemon=True)
thread.start()
"""


def seeds(kind: str, number: int) -> list[tuple[str, int, int]]:
    """Of a passing checkpoint, the first tensor is the last one of another: so segments stay in part."""
    own = [(kind, number, tensor) for tensor in range(TENSORS)]
    if kind == "passing":
        own[0] = ("passing", (number + SHARED) % PASSING, TENSORS - 1)
    return own


def saved(folder: Path, kind: str, number: int) -> Path:
    tensors = {
        f"t{at}": ("U8", (MIB,), checkpoints.random_bytes(seed, MIB)) for at, seed in enumerate(seeds(kind, number))
    }
    return checkpoints.write(folder / f"{kind}{number}.safetensors", tensors)


def load_in_turn(daemon: Daemon, paths: list[Path], begin: int) -> int:
    """Load one after the other until the daemon is gone; returns where to go on."""
    number = begin
    while True:
        try:
            with weightd.connect(daemon.socket, timeout=20) as client:
                client.load_report(paths[number % len(paths)], name=f"passing{number % len(paths)}")
        except (weightd.DaemonUnreachableError, weightd.LeaseLostError):
            return number
        number += 1


def check_resident(client: weightd.Client, folder: Path, point: str) -> set[str]:
    """Whether everything that is there is what its file says, and is not read again; returns the names."""
    found = set()
    for checkpoint in client.checkpoints():
        for name in checkpoint.names:  # none where the daemon was killed between a seal and the naming
            report = client.load_report(folder / f"{name}.safetensors", name=name)
            assert report is not None
            assert report.read_bytes == 0, (point, name)
            with client.attach(name) as attachment:
                for at, seed in enumerate(seeds(name[:-1], int(name[-1]))):
                    assert content(attachment, f"t{at}") == checkpoints.random_bytes(seed, MIB), (point, name, at)
            found.add(name)
    return found


@pytest.mark.slow
@pytest.mark.backends("host", "cuda_vmm", swept="cuda_vmm")
def test_killed_at_every_point(start_daemon: StartDaemon, manager: Manager, tmp_path: Path, spawn: Spawn) -> None:
    bases = [saved(tmp_path, "base", number) for number in range(BASES)]
    passing = [saved(tmp_path, "passing", number) for number in range(PASSING)]
    checkpoints.rest(*bases, *passing)
    armed = tmp_path / "armed"
    daemon = start_daemon(
        manager=manager, argv=launcher(points=armed), budget=f"{(BASES + 3) * TENSORS}MiB", pool="0", reader_threads=2
    )
    client = daemon.connect()
    for number, path in enumerate(bases):
        client.load(path, name=f"base{number}")
    workers = []
    for number in range(CLIENTS):
        expected = {
            f"t{at}": hashlib.sha256(checkpoints.random_bytes(seed, MIB)).hexdigest()
            for at, seed in enumerate(seeds("base", number % BASES))
        }
        workers.append(spawn(daemon))
        workers[-1].start(COMPUTE, name=f"base{number % BASES}", expected=expected)
    for worker in workers:
        worker.finish()
    client.close()
    pids, turn = sorted(worker.pid for worker in workers), 0

    for point in [*POINTS, "idle"] * ROUNDS:
        loads = background(load_in_turn, daemon, passing, turn)
        if point == "idle":
            time.sleep(0.3)
            daemon.kill()
        else:
            armed.write_text(point)
            assert daemon.process is not None
            assert daemon.process.wait(60) == -9, point
            daemon.kill()
        turn = loads.result(60) + 1
        daemon.start()
        client = daemon.connect()

        names = check_resident(client, tmp_path, point)
        assert {f"base{number}" for number in range(BASES)} <= names, point
        for worker in workers:
            assert worker.run("check(); result = wrong") == [], point
        eventually(
            lambda: sorted(lease.pid or 0 for lease in client.leases()) == pids,  # noqa: B023  # called here
            what="all say who they are",
        )
        client.close()

    for path in passing:
        with weightd.connect(daemon.socket, timeout=20) as one:
            one.load_report(path, name=path.stem)
    client = daemon.connect()
    assert client.stats().evictions, "the budget is not so tight that memory is used again"
    eventually(lambda: not client.stats().devices[0].in_flight_bytes, what="loaders are done")
    eventually(
        lambda: daemon.allocates(used := client.stats().devices[0].used_bytes, used), what="the books are what is there"
    )
    for worker in workers:
        assert worker.run("check(); done.set(); thread.join(); attachment.close(); result = wrong") == []
    eventually(lambda: client.leases() == [], what="all have let go")
    for checkpoint in client.checkpoints():
        client.remove(checkpoint.content_digest)
    eventually(lambda: manager.settle() or manager.names() == ["root"], what="nothing is kept any more")
