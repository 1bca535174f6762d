"""bench/gpu.py: its command line, its report, and on the double the parts that do without torch.cuda."""

from __future__ import annotations

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
    assert "memory, attach, load, compute" in done.stdout


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
    assert done.returncode == 1
    assert "not written" in done.stderr
    assert not results.exists()


def test_memory_is_reported_beside_what_was_predicted(report: Any) -> None:
    sizes = {1: 10**9, 2: 2 * 10**9, 4: 4 * 10**9, 8: 8 * 10**9}
    found = {"size": 8 * 10**9, "loaded": 9 * 10**9, "context": sizes, "attached": sizes, "private": {**sizes, 8: None}}
    text = report({"memory": found})
    assert "| 2 | 2.00 | 10.00 | 2.00 | 2.00 | 1.00 |" in text
    assert "| 8 | 8.00 | 16.00 | 8.00 | does not fit |  |" in text


def test_unequal_results_stand_out(report: Any) -> None:
    product = {"equal": False, "ms": {"attached": spread(1), "private": spread(2)}, "ratio": spread(0.5)}
    text = report({"compute": {"product": product, "model": {"skipped": "transformers is not installed"}}})
    assert "| product | NO | 1.000 (1.000–1.000) | 2.000 (2.000–2.000) | 0.500 (0.500–0.500) |" in text
    assert "| model | transformers is not installed |" in text


def test_a_part_that_failed_says_why(report: Any) -> None:
    assert "Not measured: SystemExit: the daemon did not start" in report(
        {"attach": {"failed": "SystemExit: the daemon did not start"}}
    )
