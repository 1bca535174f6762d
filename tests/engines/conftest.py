"""Fixtures for tests of engines: checkpoints, and the environment of processes with engines in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support import engine_models
from support.checkpoints import rest
from support.daemon import Daemon
from support.engines import EngineProcess, engine_environment

SpawnEngine = Callable[..., EngineProcess]

_CHECKPOINTS = "checkpoints"


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all of pytest's processes share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def checkpoints(session_folder: Path) -> dict[str, Path]:
    """Folders of checkpoints by name, for all names in `support.engine_models.EVERY`; see there.

    Their files have rested: a daemon that has loaded them once knows them again.
    """
    paths = engine_models.written(_made(session_folder / _CHECKPOINTS))
    rest(*(file for path in paths.values() for file in path.iterdir()))
    return paths


@pytest.fixture(scope="session")
def engine_folder(session_folder: Path) -> Path:
    """Where processes with engines keep what they cache."""
    return _made(session_folder / "engines")


@pytest.fixture(scope="session")
def engine_variables(engine_folder: Path) -> dict[str, str]:
    """The environment of a process with an engine that a test starts by itself; the daemon's socket is not in it."""
    return engine_environment(engine_folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the checkpoints, of half a GiB: pytest keeps the folders of the last three sessions."""
    if hasattr(config, "workerinput"):
        return  # another of pytest's processes may need them still
    base: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # there is no other way to it
    shutil.rmtree(base / _CHECKPOINTS, ignore_errors=True)


@pytest.fixture
def spawn_engine(workers: list[EngineProcess], engine_folder: Path) -> SpawnEngine:
    """Spawn a process for an engine as a client of a daemon: `spawn_engine(daemon, VARIABLE="value")`.

    It executes what it is told (`support.worker.Worker`). At the end of the test all of its processes are gone.
    """

    def spawn(daemon: Daemon, **more: str) -> EngineProcess:
        process = EngineProcess(daemon.socket, engine_folder, more)
        workers.append(process)
        return process

    return spawn


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write what tests have recorded as a property: shares and sizes."""
    for report in terminalreporter.getreports("passed"):
        if report.when == "call":
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {value}")
