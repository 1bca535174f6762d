"""Peers whose command lines are what they like: gigabytes, or never to be read. It is theirs to say how long one is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import checkpoints
from support.command_lines import CONNECT, HUGE, HUGE_LINE
from support.daemon import Daemon, eventually
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20


def test_a_huge_one_costs_nothing(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    """A read of all of it took 5 s of the loop and 2.3 GB; the watch of the loop is looked at in the end."""
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "m.safetensors", 1, 1000), name="m")
    worker = spawn(daemon)
    if refused := worker.run(HUGE_LINE, size=HUGE):
        pytest.skip(f"no process can choose its command line here: {refused}")
    assert len(Path(f"/proc/{worker.pid}/cmdline").read_bytes()) == HUGE
    before = daemon.rss()
    worker.run(CONNECT, path=str(daemon.socket), times=20)
    worker.run("client = weightd.connect(path, timeout=60.0); attachment = client.attach('m')", path=str(daemon.socket))
    leases = [lease for lease in client.leases() if lease.pid == worker.pid]
    assert [lease.command for lease in leases] == [Path(f"/proc/{worker.pid}/comm").read_text().strip()]
    grown = daemon.rss() - before
    assert grown < 20 * MIB, f"{grown / MIB:.1f} MiB"
    worker.run("attachment.close()")
    eventually(lambda: not [lease for lease in client.leases() if lease.pid == worker.pid])
