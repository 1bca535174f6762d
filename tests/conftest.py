"""Fixtures for all tests: daemons and workers that are real processes, killed and checked for leaks at the end."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from support import fakecuda
from support.abandoned import end_abandoned_clients
from support.backends import HOST, Backend
from support.daemon import Daemon
from support.longest import LONGEST
from support.shared import SharedDaemons
from support.users import user_of
from support.worker import Worker

StartDaemon = Callable[..., Daemon]

# `make test-engines` runs these, in an environment that has the engines.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["engines"]

APART = [Path(__file__).parent / name for name in ("containers", "fleet_engines", "page")]
"""`make test-containers`, `test-fleet` and `test-page` run these: what is in there runs only where it is named."""

# A shell that runs the tests in the background has it ignored, and so would every process that gets a Ctrl-C here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No example is too slow: how long one takes is the machine's business.
settings.register_profile("weightd", deadline=None)
settings.load_profile("weightd")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what is run apart."""
    named = any(collection_path.name in argument for argument in config.args)
    return True if collection_path in APART and not named else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let fixtures see whether the test itself failed."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say what tests marked `gpu` run on."""
    parser.addoption(
        "--gpu", choices=("double", "hardware"), default="double",
        help="run tests marked gpu on the double of the driver, which poses as hardware, or on a real GPU",
    )  # fmt: skip
    parser.addoption("--chromium", metavar="PATH", default="/usr/bin/chromium", help="the browser of tests/page")


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist hand out the files in the order of the tests, and not those with the most tests first."""
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist 3.7; without it, files come in another order
        config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while tests are collected: that would be two fifths of the time, for objects that all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()  # once, or `short_collections` would freeze what little there is


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, and leave out what the double cannot stand for, unless there is hardware.

    A file is one worker's. One that takes minutes and is begun last has the other workers wait for it.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    ranks = {config.rootpath / file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: (ranks.get(item.path, len(ranks)), item.path not in slow))
    if config.getoption("--gpu") == "hardware":
        return
    left_out = [item for item in items if item.get_closest_marker("hardware")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Count the tests marked `gpu` that passed, and say on what."""
    passed = sum("gpu" in report.keywords for report in terminalreporter.stats.get("passed", []))
    terminalreporter.write_line(f"marked gpu: {passed} passed on the {config.getoption('--gpu')}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on what `pytest.mark.backends` names. On CUDA memory it is marked `gpu`, unless `double_only`.

    So where there is no GPU, it runs on the double posing as one, and not beside that on the double as itself. On the
    kind that `swept` names it is marked `sweep`: it takes long, and `make test` runs it on another kind.
    """
    if "backend" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("backends")
    names = marker.args if marker else ("host",)
    options = marker.kwargs if marker else {}
    parameters = []
    for name in names:
        posing = name != "host" and marker is not None and not options.get("double_only")
        marks = [pytest.mark.gpu] * posing + [pytest.mark.sweep] * (name == options.get("swept"))
        parameters.append(pytest.param(f"gpu-{name}" if posing else name, marks=marks))
    metafunc.parametrize("backend", parameters, indirect=True)


@pytest.fixture(autouse=True, scope="module")
def short_collections() -> Iterator[None]:
    """Leave what there is before a module's tests out of the collections of garbage that they ask for.

    That is all of pytest, torch and the other tests: with it, one collection takes half a second.
    """
    gc.freeze()
    yield
    gc.collect()  # what this module's tests left, or the next module would freeze it, with all that it keeps
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def no_client_is_abandoned() -> Iterator[None]:
    """End what would open sockets in the tests of other modules."""
    yield
    end_abandoned_clients()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is short enough for sockets inside folders of it: `tmp_path` can be too long for that."""
    folder = Path(tempfile.mkdtemp(prefix="weightd-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the double of libcuda, which is loaded into this process as well."""
    folder = tmp_path_factory.mktemp("fakecuda")
    fakecuda.build(folder)
    fakecuda.preload(folder)
    return folder


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """The memory that a test runs on."""
    name: str = request.param
    if name == "host":
        return HOST
    kind = name.removeprefix("gpu-")
    is_hardware = name != kind and request.config.getoption("--gpu") == "hardware"
    library = None if is_hardware else request.getfixturevalue("fake_driver")
    return Backend(name, kind, library, poses=name != kind and not is_hardware)


@pytest.fixture
def start_daemon(request: pytest.FixtureRequest, backend: Backend) -> Iterator[StartDaemon]:
    """Start daemons with settings as keywords, on the test's backend or another `on`.

    Each is checked for leaks at the end of a test that passed.
    """
    started: list[Daemon] = []

    def start(on: Backend = backend, **settings: object) -> Daemon:
        daemon = Daemon(on, **settings)  # type: ignore[arg-type]  # keywords are passed through
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


@pytest.fixture(scope="module")
def shared_daemons() -> Iterator[SharedDaemons]:
    """Daemons that the tests of a module use one after the other."""
    daemons = SharedDaemons()
    yield daemons
    daemons.close()


@pytest.fixture
def workers(start_daemon: StartDaemon) -> Iterator[list[Worker]]:
    """The client processes of a test. They ask for `start_daemon` so that they end before daemons are checked."""
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.end()


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    """A daemon with a budget of 1 GiB."""
    return start_daemon()


@pytest.fixture
def spawn(workers: list[Worker]) -> Callable[[Daemon], Worker]:
    """Spawn a client process of a daemon."""

    def spawn_worker(daemon: Daemon) -> Worker:
        worker = Worker(daemon.socket, daemon.backend.environment)
        workers.append(worker)
        return worker

    return spawn_worker


@pytest.fixture
def user(spawn: Callable[[Daemon], Worker]) -> Callable[[Daemon, int], Worker]:
    """Spawn a client process of a user; it has `client`, `load` and `attempt`."""

    def become(daemon: Daemon, uid: int) -> Worker:
        return user_of(spawn(daemon), uid)

    return become
