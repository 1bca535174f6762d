"""examples/ray_serve.py without a cluster: it starts one of its own, and ends it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import ROOT, Daemon, environment, eventually
from support.ray_nodes import ray_processes, ray_variables


@pytest.mark.slow
def test_replicas_on_one_machine_share(daemon: Daemon, short_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, ROOT / "examples" / "ray_serve.py"], cwd=short_path,
        env=environment(daemon.socket) | ray_variables(short_path), capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    answers = re.findall(r"^(\w+): (\d+) tensors in process (\d+) on node", finished.stdout, re.MULTILINE)
    assert {(name, tensors) for name, tensors, _ in answers} == {("base", "37"), ("tuned", "38")}
    assert len({pid for _, _, pid in answers}) == 2, "one replica answered all requests"
    assert finished.stdout.splitlines()[-1].endswith(": 129.5 MiB of models in 66.3 MiB")
    eventually(lambda: not ray_processes(short_path), what="Ray's processes to end")
