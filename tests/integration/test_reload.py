"""SIGHUP: what changes while the daemon serves, what needs a restart, and files that cannot be."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.gated import gated_argv
from support.manager import Manager
from support.users import ALICE, needs_root, user_of
from support.worker import Worker
from weightd_daemon.config.settings import Settings

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20


class Configured:
    """A daemon with a configuration file; `change` writes the file and has it read again."""

    def __init__(self, start_daemon: StartDaemon, path: Path, text: str = "", **settings: object) -> None:
        self.path = path
        path.write_text(text)
        # A flag would count more than the file: these settings are the file's.
        self.daemon = start_daemon(config=path, unset=("log_level", "budget"), **settings)

    def change(self, text: str, answer: str = r"settings read again; changed: (.*)") -> str:
        """Returns what the log says then, from the answer on."""
        before = len(self.daemon.logged())
        self.path.write_text(text)
        os.kill(self.daemon.pid, signal.SIGHUP)
        eventually(lambda: re.search(answer, self.daemon.logged()[before:]), what=f"{answer}: {self.daemon.logged()}")
        self.daemon.connect().ping()  # a later line of the same step is there, too
        return self.daemon.logged()[before:]


def test_what_can_change_changes_and_the_rest_is_named(start_daemon: StartDaemon, tmp_path: Path) -> None:
    served = Configured(start_daemon, tmp_path / "w.toml", 'isolation = "shared"\nmax_loads = 2\n')
    said = served.change('isolation = "uid"\nmax_loads = 3\nstate_dir = "/x"\nadmins = [54321]\nmax_connections = 7\n')
    assert "changed: admins, max_loads, max_connections\n" in said
    assert "WARNING weightd_daemon.operations.reload needs a restart: isolation\n" in said  # --state-dir counts more
    said = served.change('isolation = "uid"\nmax_loads = 3\nadmins = [54321]\nmax_connections = 7\n')
    assert "changed: nothing" in said
    assert "needs a restart: isolation\n" in said
    assert "restart" not in served.change("")


def test_every_setting_does_what_its_documentation_says(start_daemon: StartDaemon, tmp_path: Path) -> None:
    other = {"socket_mode": "0666", "transport": "cuda_ipc", "budget": "64MiB", "pool": "1MiB", "isolation": "uid",
             "admins": "54321", "max_user_bytes": "1GiB", "log_level": "warning", "log_format": "json",
             "model_roots": ["/x"], "preload": ["/x/y"], "metrics": "127.0.0.1:7",
             "metrics_access": "remote"}  # fmt: skip
    flags = {"socket", "state_dir", "device"}  # this daemon has flags for these, which count more than the file
    values = {name.name: other.get(name.name, 7) for name in fields(Settings) if name.name not in flags}
    served = Configured(start_daemon, tmp_path / "w.toml", 'log_level = "info"\n')
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    said = served.change(text, r"needs a restart: ")
    left = set(re.search(r"needs a restart: ([\w, ]+)", said)[1].split(", "))  # type: ignore[index]  # it was there
    table = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \|(?:[^|]*\|){3} (yes|no) \|", table, re.MULTILINE))
    assert set(documented) == set(values) | flags
    assert left == {name for name in values if documented[name] == "no"}
    assert {documented[name] for name in flags} == {"no"}


def test_nothing_of_a_file_that_cannot_be_is_taken_up(start_daemon: StartDaemon, tmp_path: Path) -> None:
    served = Configured(start_daemon, tmp_path / "w.toml", "max_connections = 10\n")
    refused = r"ERROR weightd_daemon.operations.reload settings are not taken up, those of before stay: (.*)"
    for text, why in (
        ("max_connections = 1\nbugdet = 1\n", r"w\.toml: line 2: bugdet: no such setting \(did you mean budget\?\)"),
        ("max_connections = 1\nmax_loads = 0\n", r"w\.toml: line 2: max_loads = 0: must be at least 1"),
        ("max_connections = [\n", r"w\.toml: is not TOML"),
        ('max_connections = 1\nmodel_roots = ["/x"]\npreload = [{ref = "a", device = "cuda:1"}]\n',
         r"w\.toml: line 3: preload 'a': device 'cuda:1' is not served"),
    ):  # fmt: skip
        assert re.search(why, served.change(text, refused)), why
    served.path.unlink()
    os.kill(served.daemon.pid, signal.SIGHUP)
    eventually(lambda: "cannot be read: No such file" in served.daemon.logged())
    clients = [weightd.connect(served.daemon.socket, timeout=20.0) for _ in range(3)]  # with 1 there would be none
    for client in clients:
        client.ping()
        client.close()
    assert "changed: max_connections" in served.change("max_connections = 9\n")


def test_level_and_format_of_the_log(start_daemon: StartDaemon, tmp_path: Path) -> None:
    served = Configured(start_daemon, tmp_path / "w.toml")
    client = served.daemon.connect()
    weightd.connect(served.daemon.socket, timeout=20.0).close()
    assert "connection closed" not in served.daemon.logged()
    served.change('log_level = "debug"\nlog_format = "json"\n')
    weightd.connect(served.daemon.socket, timeout=20.0).close()
    eventually(lambda: "connection closed" in served.daemon.logged())
    line = json.loads(next(line for line in served.daemon.logged().splitlines() if "connection closed" in line))
    assert (line["level"], line["logger"]) == ("debug", "weightd_daemon.handles.handle_server")
    assert line["pid"] == os.getpid()
    served.change("", r"settings read again")
    before = len(served.daemon.logged())
    weightd.connect(served.daemon.socket, timeout=20.0).close()
    client.ping()
    assert "connection closed" not in served.daemon.logged()[before:]


@needs_root
def test_admins(start_daemon: StartDaemon, spawn: Spawn, tmp_path: Path) -> None:
    served = Configured(start_daemon, tmp_path / "w.toml", 'socket_mode = "0666"\n')
    served.daemon.folder.chmod(0o755)
    path = checkpoints.write_random(tmp_path / "m.safetensors", 1, MIB)
    served.daemon.connect().load(path, name="m")
    alice = user_of(spawn(served.daemon), ALICE)
    refused = "result = attempt(lambda: str(client.pin('m')))[0]"
    assert alice.run(refused) == "PermissionDeniedError"
    served.change(f'socket_mode = "0666"\nadmins = [{ALICE}]\n')
    assert isinstance(alice.run("result = attempt(lambda: str(client.pin('m')))"), str)
    served.change('socket_mode = "0666"\n')
    assert alice.run(refused) == "PermissionDeniedError"


@needs_root
def test_what_admins_see_is_of_another_revision(start_daemon: StartDaemon, spawn: Spawn, tmp_path: Path) -> None:
    """A page or `top` that knows the revision asks for no list again until it moves."""
    settings = 'socket_mode = "0666"\nisolation = "uid"\n'
    served = Configured(start_daemon, tmp_path / "w.toml", settings)
    served.daemon.folder.chmod(0o755)
    served.daemon.command("load", checkpoints.write_random(tmp_path / "m.safetensors", 1, MIB), "--name", "m", "--pin")
    alice = user_of(spawn(served.daemon), ALICE)
    seen = "result = [client.stats().revision, [c.name for c in client.checkpoints()]]"
    before, names = alice.run(seen)
    assert names == []
    served.change(f"{settings}admins = [{ALICE}]\n")
    after, names = alice.run(seen)
    assert names
    assert after != before


def test_budget_and_pool(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 12, MIB)
    served = Configured(start_daemon, tmp_path / "w.toml", 'budget = "8MiB"\npool = "0"\n')
    client = served.daemon.connect()
    with pytest.raises(weightd.CapacityError):
        client.load(path, name="m")
    served.change('budget = "32MiB"\npool = "0"\n')
    served.daemon.command("load", path, "--name", "m")
    assert client.stats().devices[0].budget_bytes == 32 * MIB
    refused = (
        r"settings are not taken up, those of before stay: .*: line 1: budget = '10MiB': host uses \d+ bytes by now"
    )
    served.change('budget = "10MiB"\npool = "0"\n', refused)
    assert client.stats().devices[0].budget_bytes == 32 * MIB
    served.change('budget = "host=16MiB"\npool = "16MiB"\n')
    assert client.stats().devices[0].budget_bytes == 16 * MIB
    client.remove("m")
    eventually(lambda: client.stats().devices[0].reusable_bytes >= 12 * MIB, what="the pool keeps what was freed")
    served.change('budget = "cuda=16MiB"\n', r"line 1: budget = 'cuda=16MiB': cuda is not served")


def test_more_loads_at_a_time(start_daemon: StartDaemon, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    served = Configured(start_daemon, tmp_path / "w.toml", "max_loads = 1\n", argv=gated_argv(gate))
    client = served.daemon.connect()
    one, two = (checkpoints.write_random(tmp_path / f"{n}.safetensors", 1, MIB, seed=n) for n in range(2))
    served.daemon.command("load", "--no-wait", one)
    eventually(lambda: len(served.daemon.loaders()) == 1, what="one loads")
    served.change("max_loads = 2\nmax_user_loads = 2\n")
    served.daemon.command("load", "--no-wait", two)  # returns when a loader has its files
    assert len(served.daemon.loaders()) == 2
    gate.touch()
    eventually(lambda: [c.state for c in client.checkpoints()] == ["resident"] * 2, what="both are resident")


def test_socket_mode(start_daemon: StartDaemon, tmp_path: Path, short_path: Path) -> None:
    page = short_path / "m.sock"
    served = Configured(start_daemon, tmp_path / "w.toml", metrics=page)
    served.change('socket_mode = "0660"\n')
    for path in (served.daemon.folder / "w.sock", served.daemon.folder / "w.sock.handles", page):
        assert path.stat().st_mode & 0o777 == 0o660


def test_new_preloads_are_loaded_and_failed_ones_tried_again(start_daemon: StartDaemon, tmp_path: Path) -> None:
    root = tmp_path / "models"
    one = checkpoints.write_random(root / "one.safetensors", 1, MIB, seed=1)
    text = f"model_roots = [{json.dumps(str(root))}]\npreload = {{}}\n".format
    served = Configured(start_daemon, tmp_path / "w.toml", text(json.dumps([str(one), str(root / "late")])))
    client = served.daemon.connect()

    def resident() -> set[str]:
        return {checkpoint.name for checkpoint in client.checkpoints() if checkpoint.state == "resident"}

    eventually(lambda: resident() == {str(one)} and "/late failed" in served.daemon.logged())
    late = checkpoints.write_random(root / "late" / "model.safetensors", 1, MIB, seed=2).parent
    served.change(served.path.read_text())
    eventually(lambda: resident() == {str(one), str(late)}, what="it is tried again, though nothing has changed")
    three = checkpoints.write_random(root / "three.safetensors", 1, MIB, seed=3)
    served.change(text(json.dumps([str(one), str(late), str(three)])))
    eventually(lambda: resident() == {str(one), str(late), str(three)})
    assert served.daemon.logged().count(f"preloaded {one}") == 1


def test_the_service_manager_is_told(
    start_daemon: StartDaemon, short_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = Manager(short_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    try:
        served = Configured(start_daemon, tmp_path / "w.toml")
        manager.wait_for("READY=1")
        for text in ("max_loads = 2\n", "max_loads = 0\n"):
            before = len(manager.said)
            served.change(text, "settings (read again|are not taken up)")
            eventually(lambda at=before: "READY=1" in manager.said[at:], what="READY=1")
            reloading = manager.said[before:]
            assert reloading[0] == "RELOADING=1"
            assert re.fullmatch(r"MONOTONIC_USEC=\d+", reloading[1])
            assert reloading.index("READY=1") > 1
    finally:
        manager.close()
