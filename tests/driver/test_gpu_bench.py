"""bench/gpu.py: its command line, its report, and on the double the parts that do without torch.cuda."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import fakecuda

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it, by default where no GPU is visible."""
    sources = {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("client", "daemon"))}
    variables = os.environ | sources | (environment or {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function that writes a report."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu  # type: ignore[import-not-found]  # a script, not on mypy's path

    return lambda parts: gpu.report(
        {"about": {"gpu": "GPU of a test", "date": "2000-01-01"}, "scale": 1, "rounds": 2, "parts": parts}
    )


def spread(*values: float) -> dict[str, float]:
    return {"median": values[0], "low": values[0], "high": values[0], "least": 0, "most": 0, "count": 3}


def test_help_names_the_parts() -> None:
    done = bench("--help")
    assert done.returncode == 0
    assert "memory, attach, load, compute, workload" in " ".join(done.stdout.split())


def test_an_unknown_part_is_refused() -> None:
    done = bench("--only", "load,speed")
    assert done.returncode == 2
    assert "speed: no such part" in done.stderr


def test_without_a_gpu_it_says_so() -> None:
    done = bench()
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: no CUDA ")


def test_on_the_double_loads_run_and_nothing_is_written(fake_driver: Path, short_path: Path) -> None:
    environment = fakecuda.environment(fake_driver, memory=8 << 30)
    results = short_path / "results"
    done = bench("--only", "attach,load", "--scale", "0.001", "--rounds", "2", "--results", results,
                 "--folder", short_path, environment=environment)  # fmt: skip
    assert "| load, GB/s | " in done.stdout, done.stderr
    assert "Not measured: torch.cuda does not run here" in done.stdout
    assert done.returncode == 0
    assert "not written" in done.stderr
    assert not results.exists()


def test_memory_is_reported_beside_what_was_predicted(report: Any) -> None:
    sizes = {1: 10**9, 2: 2 * 10**9, 4: 4 * 10**9, 8: 8 * 10**9}
    found = {"size": 8 * 10**9, "loaded": 9 * 10**9, "context": sizes, "attached": sizes, "private": {**sizes, 8: None}}
    text = report({"memory": found})
    assert "| 2 | 2.00 | 10.00 | 2.00 | 2.00 | 1.00 |" in text
    assert "| 8 | 8.00 | 16.00 | 8.00 | does not fit |  |" in text


def test_the_workload_is_reported_with_what_sharing_saved(report: Any) -> None:
    found = {
        "size": 42 * 10**9, "total": 62 * 10**9, "loaded": 42 * 10**9, "load_seconds": 5.25,
        "context": {1: 1, 2: 1, 4: 1, 8: None}, "attached": {1: 1, 2: 1, 4: 1, 8: 1},
        "private": {1: 1, 2: 1, 4: None, 8: None},
    }  # fmt: skip
    assert "| saved: 32.3 % of 62.00 GB; loaded in 5.2 s |" in report({"workload": found})


STAND_IN = """
import sys
from pathlib import Path
import weightd
from weightd._mapping import cuda_driver as driver

_, kind, socket, name, *files = sys.argv[1:]
if kind == "private":
    with driver.on_device(0):
        kept = [driver.call("cuMemAlloc", Path(file).stat().st_size) for file in files]
elif kind == "attached":
    attached = weightd.connect(socket).attach(name, device="cuda:0")
    kept = [attached.buffer(each, component) for component, each in attached.tensors]
print("ready", flush=True)
sys.stdin.read()
"""
"""A worker of bench/gpu.py that holds memory without torch."""


@pytest.mark.slow
def test_processes_that_serve_the_workload_share_its_memory(fake_driver: Path, short_path: Path) -> None:
    (short_path / "_gpu_worker.py").write_text(STAND_IN)
    source = f"""
import json, _gpu_parts
from pathlib import Path
from support import fakecuda

_gpu_parts.cuda_driver.initialise()
_gpu_parts.used_bytes = lambda: fakecuda.device_bytes(0)
_gpu_parts.HERE = Path({str(short_path)!r})
print(json.dumps(_gpu_parts.workload(_gpu_parts.Setting(Path({str(short_path)!r}), 1 / 512, 2, torch=True))))
"""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("client", "daemon", "bench", "tests"))
    environment = os.environ | fakecuda.environment(fake_driver, memory=64 << 30) | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=200,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1 - found["size"] / found["total"] == pytest.approx(0.324, abs=0.005)  # rows are rounded
    assert found["attached"]["1"] == found["attached"]["8"] == found["loaded"]  # on the double a context is nothing
    assert found["loaded"] == pytest.approx(found["size"], rel=0.1)  # whole pages, and 256 bytes between tensors
    assert found["private"]["2"] == pytest.approx(found["total"], rel=0.2)  # each of eleven files in whole pages
    assert found["private"]["8"] == 4 * found["private"]["2"]


def test_pieces_are_measured_and_called_nothing(fake_driver: Path, short_path: Path) -> None:
    environment = os.environ | fakecuda.environment(fake_driver)
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("client", "daemon"))
    options = ["--size", "32MiB", "--pieces", "1,4", "--threads", "2", "--rounds", "2", "--folder", str(short_path)]
    command = [sys.executable, str(ROOT / "bench" / "pieces.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[:2] for line in done.stdout.splitlines()[2:]] == [["| 1 MiB", "2"], ["| 4 MiB", "2"]]
    assert done.stdout.count("GB/s") == 4
    assert "say nothing about a GPU" in done.stderr


def test_unequal_results_stand_out(report: Any) -> None:
    product = {"equal": False, "ms": {"attached": spread(1), "private": spread(2)}, "ratio": spread(0.5)}
    text = report({"compute": {"product": product, "model": {"skipped": "transformers is not installed"}}})
    assert "| product | NO | 1.000 (1.000–1.000) | 2.000 (2.000–2.000) | 0.500 (0.500–0.500) |" in text
    assert "| model | transformers is not installed |" in text


def test_a_part_that_failed_says_why(report: Any) -> None:
    assert "Not measured: SystemExit: the daemon did not start" in report(
        {"attach": {"failed": "SystemExit: the daemon did not start"}}
    )
