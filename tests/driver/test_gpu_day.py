"""tools/gpu_day.sh: a stage that fails or hangs costs only itself. Run with a stand-in for Python, and no GPU."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_day.sh"
STAND_IN = """#!/bin/bash
case "$*" in
*gpu_smoke*) trap '' INT; echo $$; while :; do sleep 1; done ;;
*gpu_probe*) echo "fails"; exit 3 ;;
*) echo "does: $*" ;;
esac
"""
MOST_FILES = 8


def day(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run it; its exit code, and the lines of its summary."""
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(folder / "out")}
    done = subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    summary = (folder / "out" / "summary.txt").read_text().splitlines()
    return done.returncode, [line.removeprefix("=== ") for line in summary]


@pytest.mark.slow
def test_a_stage_that_hangs_or_fails_costs_only_itself(tmp_path: Path) -> None:
    code, (_, facts, *lines, _) = day(tmp_path, "first", "49")
    assert facts == "facts: left out, no time is left"
    ended = [re.sub(r", \d+ s$", "", line) for line in lines]
    assert ended == [
        "smoke: rc 137, out of time",
        "probe: rc 3",
        "survival: rc 0",
        "load-attach: rc 0",
        "pieces: rc 0",
        "cuda-ipc: rc 0",
    ]
    assert code == 1
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {*(f"{line.split(':')[0]}.tar.gz" for line in lines), "summary.txt"}
    assert len(files) <= MOST_FILES
    with tarfile.open(tmp_path / "out" / "smoke.tar.gz") as archive:
        log = archive.extractfile("smoke/log")
        assert log is not None
        hung = Path(f"/proc/{int(log.read())}/cmdline")
    assert not hung.exists() or not hung.read_bytes(), "the process lives on"  # what has ended has no arguments


def test_what_has_no_time_left_is_left_out(tmp_path: Path) -> None:
    code, (_, *lines, _) = day(tmp_path, "second", "2")
    assert lines == [f"{stage}: left out, no time is left" for stage in ("facts", "compute", "memory", "workload")]
    assert code == 1


def test_the_second_call_measures_what_can_wait(tmp_path: Path) -> None:
    code, (_, *lines, _) = day(tmp_path, "second", "60")
    assert [line.split(":")[0] for line in lines] == ["facts", "compute", "memory", "workload"]
    assert code == 0


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"\b(?:tests|tools|bench)/[\w/]+\.(?:py|sh)\b", SCRIPT.read_text())))
)
def test_what_it_runs_is_there(name: str) -> None:
    assert (ROOT / name).exists()
