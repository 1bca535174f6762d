"""A daemon under a service manager ends, and the next one takes up what it held."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support import checkpoints
from support.content import content
from support.daemon import Daemon, eventually
from support.manager import Manager
from support.worker import Worker

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20

lasting = pytest.mark.backends("host", "cuda_vmm")


@lasting
def test_everything_is_taken_up(start_daemon: StartDaemon, manager: Manager, tmp_path: Path, spawn: Spawn) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 4, MIB, seed="m")
    other = checkpoints.write_random(tmp_path / "o.safetensors", 3, MIB, seed="o", shared={0: ("m", 0)})
    checkpoints.rest(path, other)
    daemon = start_daemon(manager=manager)
    client = daemon.connect()
    client.load(path, name="m", pin=True)
    client.load(other, name="o")
    worker = spawn(daemon)
    worker.run("import weightd\nclient = weightd.connect()\nattachment = client.attach('m')")
    eventually(lambda: daemon.loaders() == [] or True)
    before, devices = client.checkpoints(), client.stats().devices
    daemon.kill()
    daemon.start()
    client = daemon.connect()
    print(daemon.logged())
    assert client.checkpoints() == before
    print(client.stats(), devices)
    for file in (path, other):
        report = client.load_report(file)
        assert report is not None
        assert report.read_bytes == 0
    with client.attach("o") as attachment:
        assert content(attachment, "t0") == checkpoints.random_bytes(("m", 0), MIB)
        assert content(attachment, "t2") == checkpoints.random_bytes(("o", 2), MIB)
    eventually(lambda: worker.pid in [lease.pid for lease in client.leases()], what="the worker says who it is")
    print(client.leases())
    worker.run("attachment.close()")
    eventually(lambda: worker.pid not in [lease.pid for lease in client.leases()], what="the lease has ended")
    os.environ.get("x")
