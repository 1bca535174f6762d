"""A drain: nothing new is lent or loaded, holders go on, and when the last has gone everything goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.background import background
from support.daemon import Daemon, environment, eventually
from support.launch import launcher
from support.loader import STOP, wait_stopped
from support.users import needs_root, open_to_all
from support.worker import Worker
from weightd.types import DrainResult, LeaseInfo

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
User = Callable[[Daemon, int], Worker]
KIB = 1 << 10
HOLD = """
import weightd
client = weightd.connect(timeout=20.0)
attachment = client.attach(name)
digest = lambda: hash(bytes(attachment.buffer("t0")))
before = digest()
"""


def load(daemon: Daemon, path: Path, seed: object = 0, **options: object) -> str:
    """A checkpoint that nobody waits for; its name is that of the file."""
    with weightd.connect(daemon.socket, timeout=20.0) as client:
        options.setdefault("device", daemon.backend.device)
        found = client.load(checkpoints.write_random(path, 3, 100 * KIB, seed), name=path.name, **options)  # type: ignore[arg-type]  # passed through
    return found.content_digest


def test_it_waits_for_two_holders_and_frees_what_is_pinned(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    load(daemon, tmp_path / "held", pin=True)
    load(daemon, tmp_path / "idle", seed=1, pin=True)
    holders = [spawn(daemon), spawn(daemon)]
    for holder in holders:
        holder.run(HOLD, name="held")
    seen: list[list[LeaseInfo]] = []
    client = daemon.connect()
    draining = background(client.drain, on_holders=seen.append)
    eventually(lambda: seen)
    assert sorted(lease.pid for lease in seen[0]) == sorted(holder.pid for holder in holders)

    stats = client.stats()
    assert (stats.state, stats.checkpoints, stats.leases) == ("draining", 2, 2), "nothing goes while anybody holds"
    for call in (lambda: client.attach("held"), lambda: client.attach("idle"), lambda: client.verify()):
        with pytest.raises(weightd.DrainingError, match="the daemon is draining"):
            call()
    with pytest.raises(weightd.DrainingError, match="the daemon is draining"):
        client.load(checkpoints.write_random(tmp_path / "new", 1, KIB))
    with pytest.raises(weightd.DrainingError, match="the daemon is draining"):
        client.load(tmp_path / "idle")
    done = daemon.command("load", tmp_path / "new", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (69, 1)
    assert "it accepts no attaches or loads; `weightd drain --undo`" in daemon.command("ls").stdout
    assert "the daemon is draining" in daemon.command("stats").stdout

    holders[0].kill()
    eventually(lambda: len(seen) == 2)
    assert [lease.pid for lease in seen[1]] == [holders[1].pid]
    assert holders[1].run("result = before == digest()"), "who holds goes on"
    assert not draining.done()
    holders[1].run("attachment.close(); del attachment; import gc; gc.collect()")
    assert draining.result(60) == DrainResult(2, 600 * KIB)
    stats = client.stats()
    assert (stats.state, stats.checkpoints, stats.blobs) == ("drained", 0, 0)
    assert client.drain() == DrainResult(2, 600 * KIB), "a drain that is over stays over"

    client.undrain()
    assert client.stats().state == "serving"
    load(daemon, tmp_path / "held")
    with client.attach("held"):
        pass


@pytest.mark.backends(*EVERY)
def test_an_empty_daemon_is_drained_at_once(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    assert daemon.connect().drain() == DrainResult(0, 0)
    daemon.connect().undrain()
    load(daemon, tmp_path / "a")
    assert daemon.connect().drain(timeout=5) == DrainResult(1, 300 * KIB)
    if not backend.is_host:
        eventually(lambda: daemon.allocates(0, 0), what="the memory of a GPU goes back")


def test_loads_under_way_end(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(argv=launcher(loader="stopping"))
    path = checkpoints.write(tmp_path / "a", {"t": ("U8", (100 * KIB,), STOP.ljust(100 * KIB, b"."))})
    client = daemon.connect()
    loading = background(client.load, path)
    wait_stopped(daemon)
    assert daemon.connect().drain(timeout=10) == DrainResult(0, 0)
    with pytest.raises(weightd.DrainingError, match="the load was ended"):
        loading.result(60)


def test_its_time_and_its_undoing(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    load(daemon, tmp_path / "held")
    holder = spawn(daemon)
    holder.run(HOLD, name="held")
    done = daemon.command("drain", "--timeout", "0.3", check=False)
    assert done.returncode == 4
    first, last = done.stderr.splitlines()
    assert first.startswith(f"weightd: waiting for pid {holder.pid} (")
    assert last.startswith(f"weightd: still held after 0.3 s by pid {holder.pid} (")
    assert last.endswith("the daemon continues to drain")
    client = daemon.connect()
    assert client.stats().state == "draining"

    watching = background(client.drain)
    eventually(lambda: not watching.done())
    assert daemon.command("drain", "--undo").stdout == "serving again\n"
    with pytest.raises(weightd.LeaseLostError, match="was taken back"):
        watching.result(60)
    assert holder.run("result = before == digest()")
    with client.attach("held"):
        assert client.stats().state == "serving"
    assert daemon.command("drain", "--undo").stdout == "serving again\n", "nothing to take back is no error"


def test_who_has_loaded_and_not_attached_counts(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a", 1, KIB), name="a")
    with pytest.raises(weightd.InUseError, match=rf"still held after 0\.2 s by pid {os.getpid()} \("):
        daemon.connect().drain(timeout=0.2)
    assert client.leases()[0].waiting
    client.close()
    assert daemon.connect().drain(timeout=20).checkpoints == 1


def test_it_goes_on_without_whoever_began_it(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    load(daemon, tmp_path / "held")
    holder = spawn(daemon)
    holder.run(HOLD, name="held")
    command = subprocess.Popen(
        [sys.executable, "-m", "weightd", "drain"], env=environment(daemon.socket), stderr=subprocess.PIPE, text=True
    )
    try:
        assert command.stderr is not None
        assert "waiting for pid" in command.stderr.readline()
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
        assert command.stderr.read() == (
            "weightd: interrupted: the daemon continues to drain; `weightd drain --undo` ends the drain\n"
        )
    finally:
        command.kill()
        command.wait(60)
        command.stderr.close()
    holder.close()
    client = daemon.connect()
    eventually(lambda: client.stats().state == "drained")
    assert client.stats().checkpoints == 0


def test_the_command_reports(daemon: Daemon, tmp_path: Path) -> None:
    load(daemon, tmp_path / "a")
    found = json.loads(daemon.command("drain", "--format", "json").stdout)
    assert 0 <= found.pop("seconds") < 20
    assert found == {"state": "drained", "checkpoints": 1, "freed_bytes": 300 * KIB}
    assert daemon.command("drain").stdout == "drained 1 checkpoint, freed 300 KiB\n"
    assert daemon.command("drain", "-q").stdout == ""
    assert json.loads(daemon.command("stats", "--format", "json").stdout)["state"] == "drained"
    assert daemon.command("drain", "--timeout", "-1", check=False).returncode == 2
    assert daemon.command("drain", "--timeout", "nan", check=False).returncode == 2


def test_the_pool_goes_back_to_the_system_and_is_used_again_when_the_drain_is_undone(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(pool="64MiB")
    client = daemon.connect()

    def pooled() -> tuple[int, int]:
        (device,) = client.stats().devices
        return device.used_bytes, daemon.allocated()

    for number in range(2):
        load(daemon, tmp_path / f"a{number}", seed=number)
    client.remove("a0")
    client.remove("a1")
    eventually(lambda: pooled()[0] > 0, what="the pool has kept what was removed")
    load(daemon, tmp_path / "b", seed=2)
    client.drain()
    eventually(lambda: pooled() == (0, 0), what="nothing is kept after a drain")
    client.undrain()
    load(daemon, tmp_path / "b", seed=2)
    client.remove("b")
    assert pooled()[0] > 0


def test_names_stay_their_owners(daemon: Daemon, tmp_path: Path) -> None:
    digest = load(daemon, tmp_path / "a")
    client = daemon.connect()
    client.drain()
    client.undrain()
    client.load(tmp_path / "a", name="other")
    assert client.inspect("a").checkpoint.content_digest == digest


@needs_root
def test_only_admins_may(start_daemon: StartDaemon, user: User) -> None:
    daemon = open_to_all(start_daemon, admins="54323")
    other, admin = user(daemon, 54321), user(daemon, 54323)
    for call in ("drain", "undrain"):
        name, message = other.run(f"result = attempt(client.{call})")
        assert (name, "only admins may" in message) == ("PermissionDeniedError", True)
    assert other.run("result = client.stats().state") == "serving"
    assert admin.run("result = client.drain().checkpoints") == 0
    admin.run("client.undrain()")


def test_fallback_treats_it_as_no_daemon(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "a.safetensors", 1, KIB)
    daemon.connect().drain()
    client = spawn(daemon)
    source = """
import warnings, weightd.torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tensors = weightd.torch.load_file(path, fallback="local")
result = [sorted(tensors), str(caught[0].message)]
"""
    names, warned = client.run(source, path=str(path))
    assert names == ["t0"]
    assert "loaded privately" in warned
    assert "the daemon is draining" in warned
