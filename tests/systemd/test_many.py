"""Many checkpoints of many tensors: what the daemon takes for itself, and that the next one takes all of them up."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon
from support.manager import Manager

StartDaemon = Callable[..., Daemon]

CHECKPOINTS, TENSORS = 100, 1000
RSS = 150 << 20


@pytest.mark.slow
def test_a_hundred_checkpoints_of_a_thousand_tensors(
    start_daemon: StartDaemon, manager: Manager, tmp_path: Path
) -> None:
    daemon = start_daemon(manager=manager)
    for number in range(CHECKPOINTS):
        tensors = {
            f"model.layers.{at}.self_attn.q_proj.weight": ("U8", (8,), struct.pack("<II", number, at))
            for at in range(TENSORS)
        }
        path = checkpoints.write(tmp_path / f"c{number}.safetensors", tensors)
        with weightd.connect(daemon.socket, timeout=30) as client:
            client.load_report(path, name=f"c{number}")
    assert daemon.rss() < RSS
    daemon.kill()
    daemon.start()
    client = daemon.connect(timeout=30)
    assert len(client.checkpoints()) == CHECKPOINTS
    assert client.stats().blobs == CHECKPOINTS * TENSORS
    with client.attach("c99") as attachment:
        assert attachment.buffer("model.layers.999.self_attn.q_proj.weight") == struct.pack("<II", 99, 999)
    assert daemon.rss() < RSS
