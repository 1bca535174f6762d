"""What a monitor asks about a daemon: its loads under way, its settings, its revision."""

from __future__ import annotations

import os
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.background import background
from support.daemon import Daemon, eventually
from support.gated import gated_argv
from support.users import ALICE, BOB, needs_root, open_to_all
from support.worker import Worker
from weightd._settings import SETTINGS
from weightd_daemon.config.settings import load

StartDaemon = Callable[..., Daemon]
User = Callable[[Daemon, int], Worker]
MIB = 1 << 20


def test_loads_under_way(start_daemon: StartDaemon, short_path: Path) -> None:
    gate = short_path / "gate"
    daemon = start_daemon(argv=gated_argv(gate), max_loads=1)
    files = [checkpoints.write_random(short_path / f"{name}.safetensors", 2, MIB, seed=name) for name in "ab"]
    checkpoints.rest(*files)
    first, second, monitor = daemon.connect(), daemon.connect(), weightd.connect(daemon.socket, read_only=True)
    with monitor:
        assert monitor.loads() == []
        before = monitor.stats().revision
        loads = [background(first.load_report, files[0], name="one")]
        eventually(lambda: [one.progress for one in monitor.loads() if one.progress and one.progress.total_bytes])
        loads.append(background(second.load_report, files[0], name="two"))
        eventually(lambda: [one.waiters for one in monitor.loads()] == [2])
        loads.append(background(first.load_report, files[1], name="later"))
        eventually(lambda: len(monitor.loads()) == 2)
        one, later = monitor.loads()
        assert (one.names, one.reference, one.device, one.waiters) == (("one", "two"), str(files[0]), "host", 2)
        assert (one.pid, one.uid) == (os.getpid(), os.geteuid())
        assert one.command
        assert one.progress is not None
        assert one.progress.phase in ("hashing", "copying")
        assert 0 <= one.progress.done_bytes <= one.progress.total_bytes == 2 * MIB
        assert one.begun_at < later.begun_at
        assert one.load < later.load
        assert (later.names, later.progress, later.remaining_seconds) == (("later",), None, None), "it has no turn"
        during = monitor.stats().revision
        assert during > before
        assert monitor.stats().revision == during, "progress is no change"
        gate.touch()
        for task in loads:
            task.result(60)
        assert monitor.loads() == []
        assert monitor.stats().revision > during


def test_a_detached_load_has_nobody_waiting(start_daemon: StartDaemon, short_path: Path) -> None:
    gate = short_path / "gate"
    daemon = start_daemon(argv=gated_argv(gate))
    with daemon.connect() as client:
        path = checkpoints.write_random(short_path / "m.safetensors", 2, MIB)
        assert client.load_report(path, name="m", detached=True) is None
        eventually(lambda: [one.waiters for one in client.loads()] == [0])
        assert client.loads()[0].names == ("m",), "its name is wanted still"
        gate.touch()
        eventually(lambda: client.loads() == [])


@needs_root
def test_loads_are_seen_as_a_list_shows_them(start_daemon: StartDaemon, user: User, short_path: Path) -> None:
    gate = short_path / "gate"
    short_path.chmod(0o755)
    daemon = open_to_all(start_daemon, argv=gated_argv(gate), isolation="uid")
    path = checkpoints.write_random(short_path / "m.safetensors", 2, MIB)
    alice, bob = user(daemon, ALICE), user(daemon, BOB)
    alice.run("client.load_report(path, name='m', detached=True)", path=str(path))
    with daemon.connect() as admin:
        eventually(lambda: [one.uid for one in admin.loads()] == [ALICE])
        assert alice.run("result = [one.names for one in client.loads()]") == [["m"]]
        assert bob.run("result = client.loads()") == []
        assert bob.run("result = len(client.settings())") == len(SETTINGS), "settings are for everybody"
        gate.touch()
        eventually(lambda: admin.loads() == [])


def test_settings_in_force(start_daemon: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "w.toml"
    file.write_text('max_loads = 2\nisolation = "shared"\n')
    daemon = start_daemon(config=file, unset=("budget",), log_level="info")
    with daemon.connect() as client:
        there = {one.key: one for one in client.settings()}
        assert list(there) == list(SETTINGS)
        assert client.settings_file() == str(file)
        assert there["max_loads"] == ("max_loads", "2", f"{file}: line 1")
        assert there["log_level"] == ("log_level", '"info"', "--log-level")
        (device,) = client.stats().devices
        assert there["budget"] == ("budget", f'"host={device.budget_bytes}"', "default")
        assert there["device"].value == '"host"'
        assert int(there["reader_threads"].value) >= 1

        file.write_text('\nmax_loads = 3\nisolation = "uid"\nbudget = "64MiB"\n')
        os.kill(daemon.pid, signal.SIGHUP)
        eventually(lambda: ("max_loads", "3", f"{file}: line 2") in client.settings())
        there = {one.key: one for one in client.settings()}
        assert there["budget"] == ("budget", '"64MiB"', f"{file}: line 4")
        assert there["isolation"] == ("isolation", '"shared"', f"{file}: line 2"), "that takes a restart"


def test_running_settings_can_be_read_back(start_daemon: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "w.toml"
    file.write_text('preload = [{ ref = "/x/a, b", name = "n", pin = true }]\nmodel_roots = ["/x", "/y"]\n')
    daemon = start_daemon(config=file, max_user_bytes="2GiB")
    printed = daemon.command("config", "--running").stdout
    again = tmp_path / "again.toml"
    again.write_text(printed)
    read, started = load(again, {}, {}).settings, load(file, {"max_user_bytes": "2GiB"}, {}).settings
    assert (read.preload, read.model_roots) == (started.preload, started.model_roots)
    assert (read.max_user_bytes, read.socket, read.budget) == ("2GiB", str(daemon.socket), "1GiB")
    assert f"# {file}: line 2" in printed
    as_json = daemon.command("config", "--running", "--format", "json").stdout
    shown = tomllib.loads(printed)
    assert '"value": "2GiB",\n    "origin": "--max-user-bytes"' in as_json
    assert list(shown) == list(SETTINGS)
    refused = daemon.command("config", "--running", "--budget", "1GiB", check=False)
    assert refused.returncode == 2
    assert "--running and --budget exclude each other" in refused.stderr


@pytest.mark.parametrize("call", ["loads", "settings"])
def test_a_daemon_that_does_not_know_the_call(daemon: Daemon, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with daemon.connect() as client:
        inspection = client._rpc().inspection
        stub = inspection._stub
        unknown = client._rpc()._channel.unary_unary("/weightd.v1.InspectionService/Later", bytes, bytes)
        for method in ("ListLoads", "GetSettings"):
            monkeypatch.setattr(stub, method, lambda request, **how: unknown(b"", **how))
        with pytest.raises(weightd.ProtocolMismatchError, match="older than this client"):
            getattr(client, call)()
