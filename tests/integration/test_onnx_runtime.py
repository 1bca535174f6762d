"""ONNX Runtime on attached weights: the recipe of examples/, and what each of its settings is for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import _network
from safetensors.torch import load_file

from support import memory
from support.daemon import ROOT, Daemon, environment, eventually
from support.manager import Manager
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
MISSING = [package for package in ("onnx", "onnxruntime") if importlib.util.find_spec(package) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"the recipe was NOT run: {', '.join(MISSING)} not installed; the extra `examples` does"
    ),
]

MIB = 1 << 20
DEPTH, SHALLOW, WORKERS = 8, 1, 3
TEXT = "one copy of the weights"

WARM_UP = """
import os, numpy as np, onnx, onnxruntime, weightd
from pathlib import Path
from support import onnx_network
import onnx_sessions

client = weightd.connect(timeout=60)

def attach(folder):
    return client.attach(Path(folder) / "weights.safetensors", device="cpu")

def values_of(attachment):
    return {
        key.name: onnxruntime.OrtValue.ortvalue_from_numpy(onnx_sessions.attached_array(attachment, key.name))
        for key in attachment.tensors
    }

with attach(shallow) as attachment:
    onnx_network.scores(onnx_sessions.SharedSession(Path(shallow), attachment).session, text)
before = onnx_network.grown(os.getpid(), 0)
"""
OPEN = """
attachment = attach(folder)
session = onnx_sessions.SharedSession(Path(folder), attachment)
scores = onnx_network.scores(session.session, text)
result = {
    "scores": scores,
    "grown": onnx_network.grown(os.getpid(), before),
    "attached": [attachment.holds(one.data_ptr(), one.numpy().nbytes) for one in session.weights.values()],
    "bytes": sum(one.numpy().nbytes for one in session.weights.values()),
}
attachment.close()
"""
AGAIN = "result = onnx_network.scores(session.session, text)"
ANOTHER_WAY = """
with attach(folder) as attachment:
    values = values_of(attachment)
session = getattr(onnx_network, way)(Path(folder), values)
scores = onnx_network.scores(session, text)
result = {"scores": scores, "grown": onnx_network.grown(os.getpid(), before)}
"""


@pytest.fixture
def manager(short_path: Path) -> Iterator[Manager]:
    """A service manager, which keeps what the daemon holds."""
    manager = Manager(short_path / "notify")
    yield manager
    manager.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By depth: a folder with torch's checkpoint, the exported model, and what `split` makes of it."""
    from examples import onnx_sessions

    from support import onnx_network

    base = tmp_path_factory.mktemp("onnx")
    made = {depth: base / str(depth) for depth in (DEPTH, SHALLOW)}
    for depth, folder in made.items():
        folder.mkdir()
        _network.write(folder / "checkpoint.safetensors", depth)
        onnx_network.write(folder / "checkpoint.safetensors", folder / "model.onnx")
        onnx_sessions.split(folder / "model.onnx", folder)
    return made


def expected(folder: Path) -> list[float]:
    """Scores of torch's network on private memory."""
    network = _network.Network(DEPTH).eval()
    network.load_state_dict(load_file(folder / "checkpoint.safetensors"))
    with torch.inference_mode():
        return network(_network.tokens_of(TEXT))[0].tolist()


def test_workers_of_onnx_runtime(
    start_daemon: StartDaemon, manager: Manager, spawn: Spawn, folders: dict[int, Path]
) -> None:
    daemon = start_daemon(manager=manager)
    names = {"folder": str(folders[DEPTH]), "shallow": str(folders[SHALLOW]), "text": TEXT}

    def opened() -> tuple[Worker, list[float]]:
        worker = spawn(daemon)
        worker.run(WARM_UP, **names)
        told = worker.run(OPEN, **names)
        print(f"anonymous memory has grown by {told['grown'] / MIB:.1f} of {told['bytes'] / MIB:.0f} MiB")
        assert told["bytes"] > 128 * MIB
        assert told["grown"] < told["bytes"] * 0.05
        assert all(told["attached"])
        return worker, told["scores"]

    def check(workers: list[Worker]) -> None:
        assert [worker.run(AGAIN, text=TEXT) for worker in workers] == [scores] * WORKERS
        assert [memory.written(worker.pid) for worker in workers] == [0] * WORKERS
        shares = [memory.attached_pss(worker.pid) for worker in workers]
        print(f"PSS in segments: {[round(size / MIB, 1) for size in shares]}")
        assert sum(shares) == pytest.approx(DEPTH * 16 * MIB, rel=0.05)

    serving = [opened() for _ in range(WORKERS)]
    workers, (scores, *others) = [worker for worker, _ in serving], [told for _, told in serving]
    assert others == [scores] * (WORKERS - 1)
    assert scores == pytest.approx(expected(folders[DEPTH]), rel=1e-4)
    check(workers)

    workers[0].kill()
    workers[0], told = opened()
    assert told == scores
    check(workers)

    daemon.kill()
    check(workers)
    daemon.start()
    workers[1].kill()
    workers[1], told = opened()
    assert told == scores
    check(workers)  # the next daemon has lent it the same memory


# Shares of the weights' bytes that became the process's own.
@pytest.mark.parametrize(
    ("way", "least", "most"),
    [
        ("inline", 0, 0.05),
        ("inputs", 0, 0.05),
        ("prepacked", 0.95, 1.1),
        ("folded", 0.95, 1.1),
        ("external", 0.95, 1.1),
    ],
)
def test_ways_to_give_a_session_its_weights(
    way: str, least: float, most: float, daemon: Daemon, spawn: Spawn, folders: dict[int, Path]
) -> None:
    worker = spawn(daemon)
    names = {"folder": str(folders[DEPTH]), "shallow": str(folders[SHALLOW]), "text": TEXT}
    worker.run(WARM_UP, **names)
    told = worker.run(ANOTHER_WAY, **names, way=way)
    share = told["grown"] / (DEPTH * 16 * MIB)
    print(f"{way}: {told['grown'] / MIB:.1f} of {DEPTH * 16} MiB became private")
    assert least <= share < most
    assert told["scores"] == pytest.approx(expected(folders[DEPTH]), rel=1e-4)


def test_split_restores_the_bytes_of_the_checkpoint(daemon: Daemon, folders: dict[int, Path]) -> None:
    import onnx
    from onnx import numpy_helper

    folder = folders[SHALLOW]
    kept = load_file(folder / "checkpoint.safetensors")["layers.0.weight"].numpy()
    exported = next(one for one in onnx.load(folder / "model.onnx").graph.initializer if one.name == "layers.0.weight")
    assert not np.array_equal(numpy_helper.to_array(exported), kept)
    assert np.array_equal(numpy_helper.to_array(exported), kept.T)

    client = daemon.connect()
    client.load(folder / "checkpoint.safetensors")
    report = client.load_report(folder / "weights.safetensors")
    assert report is not None
    assert (report.unique_bytes, report.shared_bytes) == (0, report.total_bytes)
    assert report.total_bytes > 16 * MIB
    graph = folder / "graph.onnx"
    assert graph.stat().st_size < 4096
    onnx.checker.check_model(graph)


def test_folding_takes_the_weights_of_the_file(
    daemon: Daemon, spawn: Spawn, folders: dict[int, Path], tmp_path: Path
) -> None:
    """Where the file that a graph refers to has other bytes, a session that folds constants gives wrong answers."""
    right = folders[SHALLOW]
    other = tmp_path / "other"
    other.mkdir()
    (other / "graph.onnx").write_bytes((right / "graph.onnx").read_bytes())
    with (other / "weights.safetensors").open("wb") as file:
        file.truncate((right / "weights.safetensors").stat().st_size)
    worker = spawn(daemon)
    worker.run(WARM_UP, shallow=str(right), text=TEXT)
    told = worker.run(
        """
with attach(folder) as attachment:
    session = onnx_sessions.SharedSession(Path(other), attachment)
    values = session.weights
    result = {"recipe": onnx_network.scores(session.session, text)}
    result["folded"] = onnx_network.scores(onnx_network.folded(Path(other), values), text)
    result["right"] = onnx_network.scores(onnx_network.folded(Path(folder), values), text)
""",
        folder=str(right), other=str(other), text=TEXT,
    )  # fmt: skip
    assert told["recipe"] == pytest.approx(told["right"], rel=1e-4)
    assert told["folded"] != pytest.approx(told["right"], rel=1e-4)


def test_the_script(daemon: Daemon, folders: dict[int, Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    for arguments in (["split", folders[SHALLOW] / "model.onnx", tmp_path / "it"], ["run", tmp_path / "it"]):
        finished = subprocess.run(
            [sys.executable, ROOT / "examples" / "onnx_sessions.py", *arguments],
            env=environment(daemon.socket), capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
    assert "outputs: [(1, 8)]" in finished.stdout
    assert "18.1 MiB of weights; anonymous memory grew by" in finished.stdout
    eventually(lambda: not daemon.connect().leases(), what="no lease is left")
