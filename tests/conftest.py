"""Fixtures for all tests: daemons and workers that are real processes, killed and checked for leaks at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.daemon import Daemon
from support.worker import Worker

StartDaemon = Callable[..., Daemon]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let fixtures see whether the test itself failed."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


_FAILED = pytest.StashKey[bool]()


@pytest.fixture
def start_daemon(request: pytest.FixtureRequest) -> Iterator[StartDaemon]:
    """Start daemons with settings as keywords. Each is checked for leaks at the end of a test that passed."""
    started: list[Daemon] = []

    def start(**settings: object) -> Daemon:
        daemon = Daemon(**settings)  # type: ignore[arg-type]  # keywords are passed through
        started.append(daemon)
        return daemon

    yield start
    failed = request.node.stash.get(_FAILED, True)
    errors = []
    for daemon in started:
        if failed:
            print(daemon.logged())
        try:
            daemon.close(check=not failed)
        except AssertionError as error:
            errors.append(error)
    if errors:
        raise errors[0]


@pytest.fixture
def workers(start_daemon: StartDaemon) -> Iterator[list[Worker]]:
    """The client processes of a test. They ask for `start_daemon` so that they end before daemons are checked."""
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.close()


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    """A daemon with a budget of 1 GiB."""
    return start_daemon()


@pytest.fixture
def spawn(workers: list[Worker]) -> Callable[[Daemon], Worker]:
    """Spawn a client process of a daemon."""

    def spawn_worker(daemon: Daemon) -> Worker:
        worker = Worker(daemon.socket)
        workers.append(worker)
        return worker

    return spawn_worker
