"""A thousand clients at once, each with a connection and a lease: at the limits one more is refused, and told why.

They are 250 each in four processes; a process for each would take more memory than a small machine has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.worker import Worker
from weightd.errors import DaemonBusyError

PROCESSES, EACH = 4, 250
SPARE = 2
"""Connections beside theirs: the test's own, and a bystander's."""

ATTACH = """
import weightd
clients = [weightd.connect(socket, timeout=60.0) for _ in range(each)]
held = [one.attach("m") for one in clients]
result = sum(len(attachment.tensors) for attachment in held)
"""


@pytest.mark.slow
def test_a_thousand_clients(
    start_daemon: Callable[..., Daemon], spawn: Callable[[Daemon], Worker], tmp_path: Path
) -> None:
    many = PROCESSES * EACH
    daemon = start_daemon(max_connections=many + SPARE, pool=0)
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "m.safetensors", 3, 4096), name="m")
    client.attach("m").close()  # the lease that waits for it ends
    workers = [spawn(daemon) for _ in range(PROCESSES)]
    for worker in workers:
        worker.start(ATTACH, socket=str(daemon.socket), each=EACH)
    assert [worker.finish() for worker in workers] == [3 * EACH] * PROCESSES
    eventually(lambda: len(client.leases()) == many, what=f"{many} leases")
    assert client.stats().leases == many

    bystander = daemon.connect()
    with pytest.raises(DaemonBusyError, match=f"max_connections = {many + SPARE}"):
        weightd.connect(daemon.socket, timeout=60.0)
    with bystander.attach("m") as attachment:
        assert len(attachment.tensors) == 3
    bystander.close()

    for worker in workers[:2]:
        worker.kill()
    eventually(lambda: len(client.leases()) == many // 2, what="the killed clients' leases to end")
    eventually(lambda: daemon.connections() == many // 2 + 1, what="their connections to end")
    assert workers[2].run("result = len(held[0].buffer('t0'))") == 4096
