"""tools/gpu_probe.py: it writes what a GPU answered, and nothing else. Run on the double and on no GPU at all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import fakecuda

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu-facts.md"
UNKNOWN = "not yet measured"


def probe(
    *arguments: object, environment: dict[str, str] | None = None, seconds: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run the tool, by default where no GPU is visible."""
    sources = {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("client", "daemon"))}
    variables = os.environ | sources | (environment or {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, str(ROOT / "tools" / "gpu_probe.py"), *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=seconds, check=False)


def rows(text: str) -> list[list[str]]:
    """The cells of the page's table, without its head."""
    return [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]


@pytest.fixture
def double(fake_driver: Path) -> dict[str, str]:
    return fakecuda.environment(fake_driver, memory=64 << 30)


def test_the_page_lists_exactly_the_questions() -> None:
    listed = [tuple(line.split(": ", 1)) for line in probe("--list").stdout.splitlines()]
    assert len(listed) > 30
    assert [(row[0].strip(), row[1]) for row in rows(PAGE.read_text())] == listed


def test_each_question_says_what_its_answer_decides() -> None:
    assert all(row[3].strip() for row in rows(PAGE.read_text()))


def test_without_a_gpu_every_answer_is_open(tmp_path: Path) -> None:
    page = tmp_path / "facts.md"
    done = probe("--write", page)
    assert done.returncode == 0, done.stderr
    assert {row[2] for row in rows(page.read_text())} == {UNKNOWN}
    if UNKNOWN in PAGE.read_text():
        assert page.read_text() == PAGE.read_text()


def test_without_a_gpu_answers_are_not_overwritten(tmp_path: Path) -> None:
    page = tmp_path / "facts.md"
    page.write_text("measured\n")
    done = probe("--write", page)
    assert done.returncode == 1
    assert "not overwritten" in done.stderr
    assert page.read_text() == "measured\n"


def test_without_a_gpu_it_prints_no_answers() -> None:
    done = probe()
    assert done.returncode == 1
    assert done.stdout.startswith("no GPU: ")


def test_answers_of_the_double_are_not_written(double: dict[str, str], tmp_path: Path) -> None:
    done = probe("--write", tmp_path / "facts.md", environment=double)
    assert done.returncode == 1
    assert "test double" in done.stderr
    assert not (tmp_path / "facts.md").exists()


def test_nvml_without_a_function_leaves_the_other_facts(double: dict[str, str]) -> None:
    source = """
import json
from types import SimpleNamespace
import gpu_probe

class NVMLError(Exception):
    pass

def missing(handle):
    raise NVMLError("Function Not Found")

nvml = SimpleNamespace(
    NVMLError=NVMLError, nvmlSystemGetDriverVersion=lambda: "580.1",
    nvmlDeviceGetMemoryInfo=missing, nvmlDeviceGetMigMode=missing,
    nvmlDeviceGetPersistenceMode=lambda handle: 1, nvmlDeviceGetComputeMode=lambda handle: 3,
)
gpu_probe.nvml_device = lambda: (nvml, None)
print(json.dumps(gpu_probe.describe()))
"""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("client", "daemon", "tools"))
    done = subprocess.run(
        [sys.executable, "-c", source], env=os.environ | double | {"PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["GPU"].startswith("FakeCUDA")
    facts = [found[name] for name in ("driver", "used beforehand", "persistence mode", "MIG mode", "compute mode")]
    assert facts == ["580.1", "unknown: function not found", "on", "unknown: function not found", "exclusive process"]


def test_answers_are_written_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu_probe  # type: ignore[import-not-found]  # a script, not on mypy's path

    page = tmp_path / "facts.md"
    asked: list[str] = []

    def ask(name: str) -> str:
        if len(asked) == 2:
            raise KeyboardInterrupt  # as of somebody who has no more time
        asked.append(name)
        return f"the answer to {name}"

    monkeypatch.setattr(gpu_probe, "ask", ask)
    monkeypatch.setattr(gpu_probe, "in_own_process", lambda *_: {"GPU": "GPU of a test", "double": False})
    monkeypatch.setattr(sys, "argv", ["gpu_probe.py", "--write", str(page)])
    with pytest.raises(KeyboardInterrupt):
        gpu_probe.main()
    assert [row[2] for row in rows(page.read_text())[:3]] == [f"the answer to {name}" for name in asked] + [UNKNOWN]


@pytest.mark.slow
def test_every_probe_runs_on_the_double(double: dict[str, str]) -> None:
    done = probe(environment=double)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    answers = {question.split(":")[0]: answer.strip() for question, answer in zip(lines[::2], lines[1::2], strict=True)}
    listed = [line.split(":")[0] for line in probe("--list").stdout.splitlines()]
    assert list(answers) == listed
    unmeasured = {name for name, answer in answers.items() if answer.startswith("not measured: ")}
    assert unmeasured == {"kernel-into-readonly", "attached", "torch-on-readonly"}
    assert answers["import-after-kill"] == "import succeeds, reading gives the bytes that were written"
    assert answers["copy-into-readonly"].startswith("cuMemcpyHtoD: CUDA_ERROR_ILLEGAL_ADDRESS")
    assert answers["ipc-open-after-kill"].startswith("no: ")
    assert answers["two-importers"].startswith("yes; ")
    assert answers["one-access"].startswith("yes; ")
    assert answers["zeroed-for-others"].startswith("0 bytes of ")
    assert answers["default-stream"].startswith(
        "cuEventQuery: CUDA_SUCCESS, where the stream does not block: CUDA_SUCCESS"
    )
    assert answers["after-fork"].startswith("cuInit: CUDA_ERROR_NOT_INITIALIZED")


@pytest.mark.gpu
@pytest.mark.hardware
@pytest.mark.timeout(600)
def test_every_probe_runs_on_a_gpu() -> None:
    done = probe(environment={"CUDA_VISIBLE_DEVICES": "0"}, seconds=580)
    assert done.returncode == 0, done.stdout
    assert "not measured" not in done.stdout


def test_a_probe_that_breaks_says_so(fake_driver: Path) -> None:
    broken = fakecuda.environment(fake_driver, fail="cuMemCreate:2")
    done = probe("--only", "two-mappings", environment=broken)
    assert done.returncode == 1
    assert "failed: DeviceError: cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY" in done.stdout


def test_a_probe_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu_probe  # type: ignore[import-not-found]  # a script, not on mypy's path

    script = tmp_path / "hangs.py"
    script.write_text("import os, time\nos.fork()\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu_probe, "__file__", str(script))
    assert gpu_probe.in_own_process([], 1.0) == {"failed": "no answer within 1 s"}


def test_an_interrupt_ends_the_process_of_a_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import gpu_probe  # type: ignore[import-not-found]  # a script, not on mypy's path

    script, started = tmp_path / "hangs.py", []
    script.write_text("import time\ntime.sleep(60)\n")

    def interrupted(process: subprocess.Popen[str], timeout: float) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_probe, "__file__", str(script))
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_probe.in_own_process([], 60.0)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_ioctls_on_the_drivers_files_are_traced(double: dict[str, str], tmp_path: Path) -> None:
    """The double makes none, so a file that is named like one of the driver's stands in for it."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("client", "daemon", "tools"))
    environment = os.environ | double | {"PYTHONPATH": paths}
    source = f"import _gpu_keeping, pathlib; print(*_gpu_keeping._traced_export(pathlib.Path({str(tmp_path)!r})))"
    done = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert re.fullmatch(r"\d+ \[\]\n", done.stdout), done.stderr

    source = """
import contextlib, fcntl, os
for name in ("nvidiactl", "other"):
    with contextlib.suppress(OSError):
        fcntl.ioctl(os.memfd_create(name), 0xC00046D4, bytes(12))
with contextlib.suppress(OSError):
    fcntl.ioctl(os.memfd_create("nvidia0"), 0xC020462A, bytes(8) + (0x3D05).to_bytes(4, "little"))
"""
    trace = tmp_path / "traced"
    tracing = {"LD_PRELOAD": str(tmp_path / "trace.so"), "TRACE_TO": str(trace)}
    subprocess.run([sys.executable, "-c", source], env=os.environ | tracing, timeout=60, check=True)
    lines = [line.split() for line in trace.read_text().splitlines()]
    assert [(number, command, path) for number, command, _, path, *_ in lines] == [
        ("212", "0", "/memfd:nvidiactl"),
        ("42", "3d05", "/memfd:nvidia0"),
    ]
