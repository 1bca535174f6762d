"""What `weightd doctor` learns of GPUs from the driver and from NVML, on the double."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import fakecuda
from support.daemon import environment
from weightd_daemon.devices import cuda_facts


def look(fake_driver: Path, name: str, **knobs: Any) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "weightd_daemon.diagnosis", name, f"--parent={os.getpid()}"]
    variables = environment() | fakecuda.environment(fake_driver, **knobs)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=True)
    begun, answer = done.stdout.splitlines()
    assert begun == "begun"
    found: dict[str, Any] = json.loads(answer)
    return found


def test_the_driver_tells_version_uuids_and_modes(fake_driver: Path) -> None:
    found = look(fake_driver, "driver", devices=2, version=12080)
    assert found["version"] == 12080
    assert [(gpu["mode"], gpu["forbids"]) for gpu in found["gpus"]] == [(0, ""), (0, "")]
    assert all(gpu["uuid"].startswith("GPU-") for gpu in found["gpus"])
    exclusive = look(fake_driver, "driver", compute_mode=3)
    assert exclusive["gpus"][0]["forbids"].startswith("EXCLUSIVE_PROCESS: one process at a time")


def test_a_driver_that_fails_says_why_and_what_to_do(fake_driver: Path) -> None:
    found = look(fake_driver, "driver", fail="cuInit:802")
    assert found["code"] == "CUDA_ERROR_SYSTEM_NOT_READY"
    assert found["package"] is True
    assert found["error"].endswith("; start nvidia-fabricmanager, or wait until it is up")


def test_no_context_is_made(fake_driver: Path, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    look(fake_driver, "driver", log=log)
    called = {line.split()[2] for line in log.read_text().splitlines()}
    assert "cuInit" in called
    assert not any(name.startswith(("cuCtx", "cuMem")) or "Retain" in name for name in called)


def test_nvml_tells_persistence(fake_driver: Path) -> None:
    found = look(fake_driver, "nvml", devices=2)
    assert found["package"] is True
    assert found["driver"]
    assert [(gpu["persistence"], gpu["fabric"]) for gpu in found["gpus"]] == [(1, None), (1, None)]


def test_nvml_that_fails_is_an_error(fake_driver: Path) -> None:
    found = look(fake_driver, "nvml", fail="nvmlInitWithFlags:9")
    assert set(found) == {"package", "error"}


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ([], ["nvidiactl", "nvidia-uvm"]),
        (["nvidia0", "nvidiactl"], ["nvidia-uvm"]),
        (["nvidiactl", "nvidia-uvm"], ["nvidia0"]),
        (["nvidia3", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"], []),
    ],
)
def test_device_files_that_are_missing_are_named(there: list[str], missing: list[str], tmp_path: Path) -> None:
    dev, gpus = tmp_path / "dev", tmp_path / "gpus"
    dev.mkdir()
    for name in there:
        (dev / name).touch()
    if "nvidiactl" in there:
        (gpus / "0000:01:00.0").mkdir(parents=True)
    found = cuda_facts.nodes(dev, gpus)
    assert found["missing"] == missing
    assert found["nvswitch"] is False
    assert found["denied"] == []
    (dev / "nvidia-nvswitch0").touch()
    assert cuda_facts.nodes(dev, gpus)["nvswitch"] is True
