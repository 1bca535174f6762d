"""kill -9 at each point of a fetch, on either side: the next fetch goes on, and receives no verified row again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightd
from failpoints.points import POINTS
from support import checkpoints
from support.agents import Agent, Receiver, agent, published
from support.daemon import Daemon, environment
from weightd.errors import DaemonUnreachableError
from weightd_fleet.agent.staging import StagingFolder
from weightd_fleet.core.digests import blob_digest

SIZE, ROWS = 3000, 6
# The first three blobs of a fetch are two frames and the index.
ROW = [("after", "fetch.write", 3 + 2, 2), ("before", "fetch.keep", 3 + 2, 2), ("after", "fetch.keep", 3 + 2, 2)]
FILES = [*ROW, ("after", "fetch.rename", 1, 3), ("after", "fetch.rename", 3, 6)]
MEMORY = [*ROW, ("after", "fetch.load", 1, 6), ("after", "fetch.compose", 1, 6)]
"""When and where a fetch kills itself, at which time, and how many rows the next one need not receive."""


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    daemon = Daemon()
    yield daemon
    daemon.close(check=True)


@pytest.fixture
def daemon(shared_daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that holds nothing."""
    yield shared_daemon
    with weightd.connect(shared_daemon.socket, timeout=60.0) as client:
        for checkpoint in client.checkpoints():
            client.remove(checkpoint.content_digest)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two files with three rows each, and an index: five blobs of the checkpoint are no tensors."""
    folder = tmp_path / "m"
    owners = {}
    for number in range(2):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        tensors = {f"f{number}.{row}": (number, row) for row in range(3)}
        owners |= dict.fromkeys(tensors, name)
        data = {key: ("U8", (SIZE,), checkpoints.random_bytes(seed, SIZE)) for key, seed in tensors.items()}
        checkpoints.write(folder / name, data)
    checkpoints.index(folder, owners)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Agent]:
    with agent(tmp_path / "source") as started:
        yield started


def killed(receiver: Receiver, source: Agent, digest: str, sink: str, when: str, point: str, number: int) -> None:
    """Run a fetch that kills itself."""
    arguments = [when, point, str(number), "asking", f"--parent={os.getpid()}"]
    arguments += [f"--from={source.address}", f"--sink={sink}"]
    arguments += [f"--state-dir={receiver.state}", f"--socket={receiver.socket}", "--name=m", "fetch", digest]
    done = subprocess.run(
        [sys.executable, "-m", "support.fetch_points", *arguments],
        env=environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == -9, done.stdout + done.stderr


@pytest.mark.parametrize(("when", "point", "number", "kept"), FILES)
def test_files(when: str, point: str, number: int, kept: int, source: Agent, model: Path, tmp_path: Path) -> None:
    digest = published(tmp_path / "source", model)
    receiver = Receiver(tmp_path / "receiver")
    killed(receiver, source, digest, "files", when, point, number)
    fetched = receiver.fetch(digest, source.address)
    assert fetched.moved_bytes == (ROWS - kept) * SIZE
    assert fetched.small_bytes == 0
    for path in model.iterdir():
        assert (Path(fetched.folder) / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in Path(fetched.folder).iterdir()) == sorted(os.listdir(model))


@pytest.mark.parametrize(("when", "point", "number", "kept"), MEMORY)
def test_memory(
    when: str, point: str, number: int, kept: int, daemon: Daemon, source: Agent, model: Path, tmp_path: Path
) -> None:
    digest = published(tmp_path / "source", model)
    receiver = Receiver(tmp_path / "receiver", daemon.socket)
    killed(receiver, source, digest, "memory", when, point, number)
    fetched = receiver.fetch(digest, source.address, sink="memory", name="m")
    assert fetched.moved_bytes == (ROWS - kept) * SIZE
    assert fetched.small_bytes == 0
    with daemon.connect() as client:
        assert client.load(model).content_digest == fetched.content_digest
        assert "m" in {name for found in client.checkpoints() for name in found.names}


def test_a_source_that_is_killed(model: Path, tmp_path: Path) -> None:
    digest = published(tmp_path / "source", model)
    receiver = Receiver(tmp_path / "receiver")
    dying = Agent(
        tmp_path / "source", argv=("-m", "support.fetch_points", "before", "fetch.serve", str(3 + 3), "agent")
    )
    with pytest.raises(DaemonUnreachableError):
        receiver.fetch(digest, dying.address)
    dying.kill()
    with agent(tmp_path / "source") as other:
        fetched = receiver.fetch(digest, other.address)
    assert fetched.moved_bytes < ROWS * SIZE
    assert fetched.small_bytes == 0


def test_every_point_of_a_fetch_is_tried() -> None:
    tried = {point for _, point, *_ in (*FILES, *MEMORY)} | {"fetch.serve"}
    assert tried == {point.name for point in POINTS if point.process in ("fetch", "agent")}


@pytest.mark.parametrize("content", [b"", b"other bytes"])
def test_a_staged_row_that_a_crash_has_cut_off_is_fetched_again(content: bytes, tmp_path: Path) -> None:
    whole = blob_digest(b"whole")
    for digest, found in ((whole, b"whole"), (blob_digest(b"cut off"), content)):
        (tmp_path / digest.hex()).write_bytes(found)
    staged = StagingFolder(tmp_path)
    assert blob_digest(b"cut off") not in staged
    assert whole in staged
    assert [path.name for path in tmp_path.iterdir()] == [whole.hex()]
