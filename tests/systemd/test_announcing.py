"""What a service manager hears from the daemon: readiness, a line for people, signs of life, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import StartDaemon
from support import checkpoints
from support.daemon import WATCHED, Daemon, eventually
from support.launch import launcher
from support.manager import Manager
from weightd.errors import WeightdError
from weightd_daemon.operations.notify import ServiceManagerNotifier
from weightd_daemon.persistence.service_manager import ServiceManagerStore

DAEMON = WATCHED
Under = Callable[..., Daemon]


@pytest.fixture
def manager(short_path: Path) -> Iterator[Manager]:
    manager = Manager(short_path / "notify")
    yield manager
    manager.close()


@pytest.fixture
def under(start_daemon: StartDaemon, manager: Manager) -> Under:
    """Start a daemon that the manager watches, with more variables as keywords."""

    def start(argv: list[str] = DAEMON, **variables: str) -> Daemon:
        pairs = [f"{name}={value}" for name, value in manager.environment(**variables).items()]
        return start_daemon(argv=["env", *pairs, *argv])

    return start


def signs(manager: Manager) -> int:
    return manager.said.count("WATCHDOG=1")


def test_a_life(under: Under, manager: Manager, tmp_path: Path) -> None:
    daemon = under(WATCHDOG_USEC="200000")
    manager.wait_for("READY=1")
    assert manager.said[0].startswith("EXTEND_TIMEOUT_USEC=")
    assert manager.said.count("READY=1") == 1
    manager.wait_for("STATUS=Serving 0 checkpoints, 0.0 of 1.0 GiB, 0 leases")
    path = checkpoints.write_random(tmp_path / "m.safetensors", 1, 100 << 20)
    with daemon.connect().attach(path):
        manager.wait_for("STATUS=Serving 1 checkpoint, 0.1 of 1.0 GiB, 1 lease")
    manager.wait_for("STATUS=Serving 1 checkpoint, 0.1 of 1.0 GiB, 0 leases")
    assert "STOPPING=1" not in manager.said
    assert daemon.stop() == 0
    manager.wait_for("STOPPING=1")


def test_reloading_and_the_end(manager: Manager) -> None:
    async def live() -> None:
        notifier = ServiceManagerNotifier(ServiceManagerStore(manager.environment(WATCHDOG_USEC="20000")))
        notifier.start()
        notifier.ready(lambda: "up")
        with contextlib.suppress(ZeroDivisionError), notifier.reloading():
            raise ZeroDivisionError
        await asyncio.sleep(0.2)
        notifier.stop()
        await asyncio.sleep(0.2)

    asyncio.run(live())
    manager.wait_for("STATUS=Stopping")
    assert manager.said[1:4:2] == ["READY=1", "RELOADING=1"]
    assert manager.said[4].startswith("MONOTONIC_USEC=")
    assert manager.said[5] == "READY=1"
    assert set(manager.said[6:-2]) == {"WATCHDOG=1"}
    assert manager.said[-2:] == ["STOPPING=1", "STATUS=Stopping"], "no sign of life after the end"


def test_children_do_not_inherit_the_manager(under: Under, tmp_path: Path) -> None:
    daemon = under(WATCHDOG_USEC="2000000")
    daemon.connect().load(checkpoints.write_random(tmp_path / "m.safetensors", 1, 1000))
    loader = daemon.wait_for_loader()
    inherited = Path(f"/proc/{loader}/environ").read_bytes()
    assert b"PYTHONPATH=" in inherited
    assert b"NOTIFY_SOCKET=" not in inherited
    assert b"WATCHDOG_USEC=" not in inherited


def test_signs_of_life_end_with_a_stuck_loop(under: Under, manager: Manager) -> None:
    daemon = under(launcher(stuck=True), WATCHDOG_USEC="200000", PYTHONFAULTHANDLER="1")
    eventually(lambda: signs(manager) >= 5, what="signs of life")
    with contextlib.suppress(WeightdError):
        daemon.connect(timeout=1.0).version()  # this call never returns, and blocks the loop
    eventually(lambda: "support.launch: stuck" in daemon.logged(), what="the call")
    manager.settle()
    before = signs(manager)
    time.sleep(1.0)  # ten signs of life, were the loop free
    assert signs(manager) == before
    os.kill(daemon.pid, signal.SIGABRT)  # what systemd does then
    assert daemon.process is not None
    assert daemon.process.wait(60) == -signal.SIGABRT
    assert "in _stuck" in daemon.logged(), "the units set PYTHONFAULTHANDLER so that the log says where"


def test_without_a_watchdog_only_the_line_for_people_is_told(under: Under, manager: Manager) -> None:
    under(WATCHDOG_USEC="200000", WATCHDOG_PID="1")  # another process is watched
    manager.wait_for("READY=1")
    time.sleep(0.5)  # five signs of life, were they wanted
    assert signs(manager) == 0


def test_a_manager_that_went_away_is_logged_once(under: Under, manager: Manager, tmp_path: Path) -> None:
    daemon = under(WATCHDOG_USEC="200000")
    manager.wait_for("READY=1")
    manager.path.unlink()
    warning = "service manager does not take notifications: No such file or directory"
    eventually(lambda: warning in daemon.logged(), what="a warning")
    time.sleep(0.5)
    assert daemon.logged().count(warning) == 1
    daemon.connect().load(checkpoints.write_random(tmp_path / "m.safetensors", 1, 1000))
