"""A checkpoint of 100,000 tensors: whatever is done with it, the loop never stands still for long.

That no step takes over 50 ms is seen by the loop watch of each daemon here (support/loop_watch.py), at its end.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from support import checkpoints
from support.daemon import Daemon, eventually
from support.manager import Manager

StartDaemon = Callable[..., Daemon]

TENSORS = 100_000
DIFFERING = 95_000


def write(path: Path, number: int, differing: int = TENSORS) -> Path:
    """A checkpoint of many tensors, of which the first `differing` are in no other."""
    tensors = {
        f"layers.{at:06}.weight": ("U8", (8,), struct.pack("<II", number if at < differing else 1, at))
        for at in range(TENSORS)
    }
    return checkpoints.write(path / f"many{number}.safetensors", tensors)


@pytest.mark.slow
def test_no_step_grows_with_the_tensors_of_a_checkpoint(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path
) -> None:
    daemon = start_daemon(manager=manager, books="1GiB")
    path = write(tmp_path, 1)
    client = daemon.connect()
    report = client.load_report(path, name="one")
    assert (report.tensors, report.unique_bytes) == (TENSORS, 8 * TENSORS)
    with client.attach("one") as attachment:
        assert attachment.buffer("layers.099999.weight") == struct.pack("<II", 1, 99_999)
    assert client.inspect("one").checkpoint.total_bytes == 8 * TENSORS
    assert [c.exclusive_bytes for c in client.checkpoints()] == [8 * TENSORS]
    assert client.stats().blobs == TENSORS
    daemon.kill()
    daemon.start()
    client = daemon.connect()
    assert client.stats().blobs == TENSORS
    assert client.load_report(write(tmp_path, 2, differing=DIFFERING), name="two").unique_bytes == 8 * DIFFERING
    client.remove("one")
    eventually(lambda: client.stats().blobs == TENSORS, what="what only it had to be freed")
    assert [c.exclusive_bytes for c in client.checkpoints()] == [8 * TENSORS]
    client.attach("two").close()  # before that, who loaded it has it
    client.remove("two")
    eventually(lambda: client.stats().blobs == 0, what="all to be freed")
