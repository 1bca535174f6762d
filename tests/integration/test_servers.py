"""Servers of examples/ with several workers: one copy of the weights, equal answers, through every kind of death."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from examples import _network
from safetensors.torch import load_file

from support import memory
from support.daemon import Daemon, eventually
from support.manager import Manager
from support.server import EXAMPLES, Server
from support.worker import Worker

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]

MIB = 1 << 20
DEPTH, SHALLOW = 16, 1
WORKERS = 3
TEXT = "one copy of the weights"
UVICORN = ["uvicorn", f"--workers={WORKERS}", "fastapi_workers:app"]
GUNICORN = ["gunicorn", f"--workers={WORKERS}"]
GUNICORN_FASTAPI = [*GUNICORN, "--worker-class=uvicorn_worker.UvicornWorker", "fastapi_workers:app"]
GUNICORN_WSGI = [*GUNICORN, "--preload", "--config=python:gunicorn_workers", "gunicorn_workers:app"]


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip, and say of what packages the extra `examples` has been left out."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"the recipe was NOT run: {', '.join(missing)} not installed; the extra `examples` does"
    )


pytestmark = pytest.mark.slow


@pytest.fixture
def manager(short_path: Path) -> Iterator[Manager]:
    """A service manager, which keeps what the daemon holds."""
    manager = Manager(short_path / "notify")
    yield manager
    manager.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Path]]:
    """Checkpoints by depth."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {depth: folder / f"network{depth}.safetensors" for depth in (DEPTH, SHALLOW)}
    for depth, path in paths.items():
        _network.write(path, depth)
    yield paths
    for path in paths.values():
        path.unlink()


def listening(argv: list[str], socket: Path) -> list[str]:
    return [*argv, f"--uds={socket}"] if argv[0] == "uvicorn" else [*argv, f"--bind=unix:{socket}"]


def expected(path: Path) -> list[float]:
    """Scores of the network on private memory."""
    network = _network.Network(DEPTH).eval()
    network.load_state_dict(load_file(path))
    with torch.inference_mode():
        return network(_network.tokens_of(TEXT))[0].tolist()


@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(UVICORN, id="uvicorn", marks=[needs("fastapi", "uvicorn"), pytest.mark.sweep]),
        pytest.param(GUNICORN_FASTAPI, id="gunicorn", marks=needs("fastapi", "gunicorn", "uvicorn_worker")),
        pytest.param(GUNICORN_WSGI, id="gunicorn-wsgi-preload", marks=[needs("gunicorn"), pytest.mark.sweep]),
    ],
)
def test_workers_of_a_web_server(
    argv: list[str], start_daemon: StartDaemon, manager: Manager, checkpoints: dict[int, Path], short_path: Path
) -> None:
    daemon = start_daemon(manager=manager)
    bytes_of = {depth: sum(tensor.nbytes for tensor in load_file(path).values()) for depth, path in checkpoints.items()}
    more = bytes_of[DEPTH] - bytes_of[SHALLOW]
    assert more > 200 * MIB

    # The same server with few weights: what a worker takes without them.
    sockets = {depth: short_path / f"{depth}.sock" for depth in checkpoints}
    alone = ["--workers=1" if argument.startswith("--workers=") else argument for argument in argv]
    with Server(listening(alone, sockets[SHALLOW]), sockets[SHALLOW], daemon.socket, checkpoints[SHALLOW]) as server:
        (without,) = (memory.anonymous(pid) for pid in server.answers(1, TEXT))

    def check(pids: tuple[int, ...]) -> None:
        grown = [memory.anonymous(pid) - without for pid in pids]
        print(f"anonymous memory has grown by {[round(size / MIB, 1) for size in grown]} of {more / MIB:.0f} MiB")
        assert max(grown) < more * 0.05
        assert [memory.written(pid) for pid in pids] == [0] * WORKERS
        shares = [memory.attached_pss(pid) for pid in pids]
        print(f"PSS in segments: {[round(size / MIB, 1) for size in shares]}")
        assert sum(shares) == pytest.approx(bytes_of[DEPTH], rel=0.05)

    with Server(listening(argv, sockets[DEPTH]), sockets[DEPTH], daemon.socket, checkpoints[DEPTH]) as server:
        answers = server.answers(WORKERS, TEXT)
        scores = next(iter(answers.values()))
        assert list(answers.values()) == [scores] * WORKERS
        assert scores == pytest.approx(expected(checkpoints[DEPTH]), rel=1e-4)
        assert len(set(scores)) == _network.CLASSES
        assert server.get("")[0] == 422
        check(tuple(answers))

        first = min(answers)
        os.kill(first, signal.SIGKILL)
        replaced = server.answers(WORKERS, TEXT, without=(first,))
        assert list(replaced.values()) == [scores] * WORKERS
        check(tuple(replaced))

        daemon.kill()
        assert list(server.answers(WORKERS, TEXT).values()) == [scores] * WORKERS
        daemon.start()
        assert server.answers(WORKERS, TEXT).keys() == replaced.keys()

        second = min(replaced)
        os.kill(second, signal.SIGKILL)
        late = server.answers(WORKERS, TEXT, without=(first, second))
        assert list(late.values()) == [scores] * WORKERS
        check(tuple(late))  # the next daemon has lent it the same memory
        client = daemon.connect()
        eventually(lambda: {lease.pid for lease in client.leases()} == set(late), what="leases of the workers alone")


TRITON_WARM_UP = """
import gc, os
from pathlib import Path
from support.memory import anonymous
from support.triton_backend import Instance

def instance(checkpoint):
    return Instance(Path(folder), 0, checkpoint=checkpoint)

first = instance(shallow)
first.execute({"tokens": tokens})
first.finalize()
del first
gc.collect()
before = anonymous(os.getpid())
"""
TRITON_SERVE = """
one = instance(deep)
answers = one.execute({"tokens": tokens}, {"tokens": [[5000]]}, {"tokens": tokens + tokens})
result = {"answers": answers, "grown": anonymous(os.getpid()) - before}
"""
TRITON_AGAIN = 'result = one.execute({"tokens": tokens})[0]["scores"][0]'


def test_instances_of_triton(
    start_daemon: StartDaemon, manager: Manager, spawn: Spawn, checkpoints: dict[int, Path]
) -> None:
    """On a stand-in of the backend: Triton itself is on no package index."""
    daemon = start_daemon(manager=manager)
    size = sum(tensor.nbytes for tensor in load_file(checkpoints[DEPTH]).values())
    names = {
        "folder": str(EXAMPLES / "triton_repository" / "network"),
        "shallow": str(checkpoints[SHALLOW]), "deep": str(checkpoints[DEPTH]),
        "tokens": _network.tokens_of(TEXT).tolist(),
    }  # fmt: skip

    def start() -> tuple[Worker, list[float]]:
        worker = spawn(daemon)
        worker.run(TRITON_WARM_UP, **names)
        told = worker.run(TRITON_SERVE, **names)
        print(f"anonymous memory has grown by {told['grown'] / MIB:.1f} of {size / MIB:.0f} MiB")
        assert told["grown"] < size * 0.05
        single, invalid, double = told["answers"]
        assert "index out of range" in invalid["error"]
        assert double["scores"] == [pytest.approx(single["scores"][0], rel=1e-4)] * 2
        return worker, single["scores"][0]

    def check(instances: list[Worker]) -> None:
        assert [one.run(TRITON_AGAIN) for one in instances] == [scores] * WORKERS
        assert [memory.written(one.pid) for one in instances] == [0] * WORKERS
        shares = [memory.attached_pss(one.pid) for one in instances]
        print(f"PSS in segments: {[round(share / MIB, 1) for share in shares]}")
        assert sum(shares) == pytest.approx(size, rel=0.05)

    serving = [start() for _ in range(WORKERS)]
    instances, (scores, *others) = [one for one, _ in serving], [told for _, told in serving]
    assert others == [scores] * (WORKERS - 1)
    assert scores == pytest.approx(expected(checkpoints[DEPTH]), rel=1e-4)
    check(instances)

    instances[0].kill()
    instances[0], told = start()
    assert told == scores
    check(instances)

    daemon.kill()
    check(instances)
    daemon.start()
    instances[1].kill()
    instances[1], told = start()
    assert told == scores
    check(instances)

    client = daemon.connect()
    eventually(lambda: {lease.pid for lease in client.leases()} == {one.pid for one in instances}, what="their leases")
    instances[2].run("one.finalize()")  # the process lives on
    eventually(lambda: len(client.leases()) == WORKERS - 1, what="an unloaded model holds nothing")
    assert instances[2].process.poll() is None
