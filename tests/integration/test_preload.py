"""Preloading: from files below model_roots, before the daemon is ready or after, in the name of its own user."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.background import background
from support.daemon import Daemon, environment, eventually
from support.gated import gated_argv
from support.leash import leashed
from support.manager import Manager

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def config(root: Path, *entries: dict[str, object]) -> Path:
    """A configuration file that preloads these; JSON's values are TOML's, too."""
    path = root.parent / "weightd.toml"
    tables = ("[[preload]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in entry.items()) for entry in entries)
    path.write_text(f"model_roots = [{json.dumps(str(root))}]\n" + "".join(tables))
    return path


def started(
    config_file: Path, folder: Path, python: Sequence[str] = (sys.executable,), **more: str
) -> subprocess.CompletedProcess[str]:
    """A daemon that is not to get ready."""
    return subprocess.run(
        [*python, "-m", "weightd_daemon", "serve", f"--config={config_file}", f"--socket={folder / 'w.sock'}",
         f"--state-dir={folder / 'state'}", "--device=host", "--budget=256MiB"],
        env=environment() | more, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_what_is_awaited_is_resident_when_the_daemon_is_ready(start_daemon: StartDaemon, root: Path) -> None:
    checkpoints.write_random(root / "a" / "model.safetensors", 3, MIB, seed="a")
    b = checkpoints.write_random(root / "b.safetensors", 2, MIB, seed="b")
    daemon = start_daemon(
        config=config(
            root,
            {"ref": str(root / "a"), "name": "first", "pin": True, "wait": True, "device": "host"},
            {"ref": str(b), "wait": True},
        )
    )
    client = daemon.connect()
    found = {checkpoint.name: checkpoint for checkpoint in client.checkpoints()}
    assert set(found) == {"first", str(b)}
    assert (found["first"].pinned, found[str(b)].pinned) == (True, False)
    assert {checkpoint.owner_uid for checkpoint in found.values()} == {os.geteuid()}
    assert client.leases() == []  # nothing but a pin keeps it
    with client.attach("first") as attachment:
        assert attachment.buffer("t2") == checkpoints.random_bytes(("a", 2), MIB)
    log = daemon.logged()
    assert log.index("preloaded") < log.index("ready socket=")


def test_in_the_background_the_daemon_is_ready_before(start_daemon: StartDaemon, root: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    path = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    daemon = start_daemon(argv=gated_argv(gate), model_roots=root, preload=path)
    client = daemon.connect()
    eventually(lambda: [c.state for c in client.checkpoints()] == ["loading"], what="it is under way")
    gate.touch()
    eventually(lambda: [c.state for c in client.checkpoints()] == ["resident"], what="it is resident")
    assert client.checkpoints()[0].name == str(path)


def test_one_that_waits_is_told_of_and_may_be_stopped(
    root: Path, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaders never get through: the daemon says what it waits for, is not ready, and ends when it is told to."""
    path = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    manager = Manager(short_path / "notify")
    process = subprocess.Popen(
        leashed([
            *gated_argv(short_path / "gate"), "serve", f"--config={config(root, {'ref': str(path), 'wait': True})}",
            f"--socket={short_path / 'w.sock'}", f"--state-dir={short_path / 'state'}", "--device=host",
        ]),
        env=environment() | manager.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        manager.wait_for(f"STATUS=Preloading {path}")
        assert "EXTEND_TIMEOUT_USEC=30000000" in manager.said
        eventually((short_path / "w.sock").exists, what="clients may look at it")
        with weightd.connect(short_path / "w.sock", timeout=20.0) as client:
            eventually(lambda: [c.state for c in client.checkpoints()] == ["loading"], what="it is under way")
        process.send_signal(signal.SIGTERM)
        output, log = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(60)
        manager.close()
    assert (process.returncode, output) == (0, "")
    assert "bug" not in log


def test_a_drain_ends_the_wait_and_not_the_daemon(root: Path, short_path: Path) -> None:
    """Else its exit code would keep a service down."""
    path = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    process = subprocess.Popen(
        leashed([
            *gated_argv(short_path / "gate"), "serve", f"--config={config(root, {'ref': str(path), 'wait': True})}",
            f"--socket={short_path / 'w.sock'}", f"--state-dir={short_path / 'state'}", "--device=host",
        ]),
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        eventually((short_path / "w.sock").exists, what="it can be reached")
        with weightd.connect(short_path / "w.sock", timeout=20.0) as client:
            eventually(lambda: [c.state for c in client.checkpoints()] == ["loading"], what="it is under way")
            client.drain()
            assert process.stdout is not None
            assert process.stdout.readline().startswith("weightd is ready on ")
            assert client.stats().state == "drained"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_an_awaited_one_that_fails_ends_the_start_with_file_line_and_key(root: Path, short_path: Path) -> None:
    file = config(root, {"ref": str(root / "gone.safetensors"), "wait": True})
    done = started(file, short_path)
    assert (done.returncode, done.stdout) == (75, "")  # its mount may be late: the service is to start again
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"weightd: {file}: line 2: preload '{root}/gone.safetensors': "
        f"{root}/gone.safetensors: no such file or directory; check the path"
    )


def test_a_start_short_of_descriptors_is_to_be_tried_again(root: Path, short_path: Path) -> None:
    """Wherever it notices: one line, and never the exit code of a configuration that cannot be."""
    path = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    file = config(root, {"ref": str(path), "wait": True})
    for limit in (14, 15, 17, 20, 23):
        limited = ["/bin/sh", "-c", f'ulimit -n {limit}; exec "$0" "$@"', sys.executable]
        done = started(file, short_path, python=limited)
        if done.returncode < 0:  # gRPC's core does not survive the lowest; which those are depends on versions
            continue
        assert (done.returncode, done.stdout) == (75, ""), (limit, done.stderr)
        assert "Traceback" not in done.stderr, (limit, done.stderr)
        assert done.stderr.splitlines()[-1].startswith("weightd: "), (limit, done.stderr)


@pytest.mark.parametrize("name", ["0123456789abcdef", "new\nline"])
def test_a_name_that_cannot_be_is_a_wrong_setting(root: Path, short_path: Path, name: str) -> None:
    done = started(config(root, {"ref": "/x"}, {"ref": "/y", "name": name}), short_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert f"line 4: preload '/y': name {name!r}: " in done.stderr.splitlines()[-1]


def test_a_device_that_is_not_served_ends_the_start(root: Path, short_path: Path) -> None:
    file = config(root, {"ref": "/x"}, {"ref": "/y", "device": "cuda:3"})
    done = started(file, short_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.splitlines()[-1] == (
        f"weightd: {file}: line 4: preload '/y': device 'cuda:3' is not served; there are host"
    )


def test_one_that_fails_in_the_background_keeps_nobody_from_the_rest(start_daemon: StartDaemon, root: Path) -> None:
    good = checkpoints.write_random(root / "good.safetensors", 2, MIB)
    daemon = start_daemon(model_roots=root, preload=f"{root / 'gone'},org/name,{good}")
    client = daemon.connect()
    eventually(lambda: [c.name for c in client.checkpoints() if c.state == "resident"] == [str(good)])
    eventually(lambda: daemon.logged().count("preload of ") == 2, what="two have failed")
    assert re.search(r"WARNING .* preload of org/name failed: .*hf download org/name", daemon.logged())
    assert re.search(r"WARNING .* preload of /.*/gone failed: .*no such file", daemon.logged())


def test_what_is_resident_is_not_loaded_again(start_daemon: StartDaemon, root: Path) -> None:
    path = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    checkpoints.rest(path)
    file = config(root, {"ref": str(path), "name": "one", "wait": True})
    daemon = start_daemon(config=file)
    config(root, {"ref": str(path), "name": "two", "pin": True})
    os.kill(daemon.pid, signal.SIGHUP)
    client = daemon.connect()
    eventually(lambda: [c.names for c in client.checkpoints()] == [("one", "two")], what="it has both names")
    assert client.checkpoints()[0].pinned
    assert daemon.logged().count("read_bytes=") == 1


@pytest.fixture
def pinned(start_daemon: StartDaemon, root: Path) -> Daemon:
    """A daemon with two preloads, of which it awaits the pinned one, "base"."""
    base = checkpoints.write_random(root / "base.safetensors", 2, MIB, seed="base")
    other = checkpoints.write_random(root / "other.safetensors", 2, MIB, seed="other")
    checkpoints.rest(base, other)
    daemon = start_daemon(
        config=config(
            root, {"ref": str(base), "name": "base", "pin": True, "wait": True}, {"ref": str(other), "name": "other"}
        )
    )
    eventually(lambda: preloaded(daemon) == [("base", True), ("other", False)], what="both are resident")
    return daemon


def preloaded(daemon: Daemon) -> list[tuple[str, bool]]:
    return [(found.name, found.pinned) for found in daemon.connect().checkpoints() if found.state == "resident"]


def test_undoing_a_drain_brings_them_back(pinned: Daemon) -> None:
    pinned.command("drain")
    assert preloaded(pinned) == []
    os.kill(pinned.pid, signal.SIGHUP)
    eventually(lambda: pinned.logged().count("preload of ") == 2, what="a drained daemon loads nothing")
    pinned.command("drain", "--undo")
    eventually(lambda: preloaded(pinned) == [("base", True), ("other", False)], what="both are back")
    assert pinned.connect().stats().state == "serving"


def test_sighup_brings_back_what_is_gone_and_leaves_the_rest(pinned: Daemon, root: Path) -> None:
    pinned.command("unpin", "base")
    pinned.command("rm", "other")
    checkpoints.write_random(root / "base.safetensors", 2, MIB, seed="changed")
    os.kill(pinned.pid, signal.SIGHUP)
    eventually(
        lambda: preloaded(pinned) == [("base", False), ("other", False)], what="the one that was removed is back"
    )
    assert pinned.logged().count(" read_bytes=") == 3


def test_one_that_is_awaited_and_gone_leaves_what_is_resident_under_its_name(
    start_daemon: StartDaemon, root: Path
) -> None:
    path = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    file = config(root)
    daemon = start_daemon(config=file)
    daemon.command("load", path, "--name", "kept")
    path.unlink()
    config(root, {"ref": str(path), "name": "kept", "wait": True}, {"ref": str(path), "name": "other", "wait": True})
    os.kill(daemon.pid, signal.SIGHUP)
    eventually(lambda: daemon.logged().count("preload of ") == 2, what="both have failed")
    assert (
        daemon.logged().count("no such file or directory; check the path; what is resident under its name stays") == 1
    )
    assert [c.name for c in daemon.connect().checkpoints()] == ["kept"]


def test_a_load_of_the_same_files_that_is_under_way_is_joined(
    start_daemon: StartDaemon, root: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    path = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    checkpoints.rest(path)
    file = config(root)
    daemon = start_daemon(argv=gated_argv(gate), config=file)
    client = daemon.connect()
    load = background(client.load, path, name="clients")
    eventually(lambda: len(client.checkpoints()) == 1, what="the client's load is under way")
    config(root, {"ref": str(path), "name": "preloaded", "pin": True})
    os.kill(daemon.pid, signal.SIGHUP)
    eventually(lambda: "changed: preload" in daemon.logged(), what="it is listed")
    gate.touch()
    assert "clients" in load.result(60).names
    eventually(lambda: client.checkpoints()[0].names == ("clients", "preloaded"), what="it has both names")
    assert client.checkpoints()[0].pinned
    assert daemon.logged().count("read_bytes=") == 1


def test_a_repository_of_the_cache_whose_files_are_symlinks(
    start_daemon: StartDaemon, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    repository = root / "models--org--name"
    checkpoints.write_random(repository / "blobs" / "abc", 2, MIB, seed="hub")
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    daemon = start_daemon(config=config(root, {"ref": "org/name", "wait": True}))
    assert [c.name for c in daemon.connect().checkpoints()] == ["org/name"]


def test_with_isolation_it_is_the_daemons_users(start_daemon: StartDaemon, root: Path) -> None:
    path = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    daemon = start_daemon(isolation="uid", config=config(root, {"ref": str(path), "wait": True, "name": "a"}))
    client = daemon.connect()
    client.load(path, name="b")
    assert [c.names for c in client.checkpoints()] == [("a", "b")]  # one content: they share a domain
