"""A daemon whose event stream and metrics fail at an event serves on, logs on, and says so to whoever asks them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints, http
from support.daemon import Daemon, eventually
from support.launch import launcher

StartDaemon = Callable[..., Daemon]
KINDS = ("LoadBegun", "CheckpointSealed", "LoadEnded", "LeaseBegun", "LeaseEnded", "CheckpointEvicted", "DrainChanged")
"""All but the loss of a device: tests/unit/test_listeners.py has every class of events."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_daemon_serves_on(start_daemon: StartDaemon, short_path: Path, tmp_path: Path, kind: str) -> None:
    page = short_path / "metrics.sock"
    daemon = start_daemon(argv=launcher(deaf=kind), metrics=page)
    client = daemon.connect()
    with weightd.connect(daemon.socket, timeout=60.0) as loader:
        for name in ("a", "b"):
            path = checkpoints.write_random(tmp_path / f"{name}.safetensors", 3, 1 << 16, seed=name)
            loader.load(path, name=name)
    with client.attach("a") as attachment:
        assert len(attachment.tensors) == 3
    eventually(lambda: not client.leases(), what="all leases end")
    client.remove("a")
    assert [info.names for info in client.checkpoints()] == [("b",)]
    daemon.command("drain", "--timeout", "60")
    daemon.command("drain", "--undo")
    with pytest.raises(weightd.ServerError, match="events are no longer recorded"):
        list(client.events())
    assert http.get(page, "/metrics") == (500, "counting has failed; the daemon's log says why\n")
    logged = daemon.logged()
    assert logged.count(f"failed at {kind}") == 2
    for line in ("loaded a by", "loaded b by", "attached a by", "evicted a by", "evicted b content"):
        assert f" {line}" in logged, "the log does not hang on the event stream"
