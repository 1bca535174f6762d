"""What is said at the start about MPS and compute modes, and that weightd's processes stay outside MPS."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from weightd.errors import DeviceError
from weightd_daemon.devices import cuda_modes
from weightd_daemon.devices.cuda_modes import stay_outside_mps, tell_compute_mode, tell_mps

PIPES = "CUDA_MPS_PIPE_DIRECTORY"
INSIDE = {PIPES: "/run/mps"}
OUTSIDE = {PIPES: "/dev/null"}


@pytest.mark.parametrize(("before", "after"), [({}, OUTSIDE), ({PIPES: ""}, OUTSIDE), (INSIDE, INSIDE)])
def test_processes_stay_outside_mps_unless_they_are_told_where_it_is(
    before: dict[str, str], after: dict[str, str]
) -> None:
    environment = dict(before)
    stay_outside_mps(environment)
    assert environment == after


def test_mps_is_told_of_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tell_mps(OUTSIDE, tmp_path)
        assert not caplog.records
        (tmp_path / "control").touch()
        tell_mps(OUTSIDE, tmp_path)
        tell_mps(INSIDE, tmp_path)
    assert [record.message for record in caplog.records] == [
        f"MPS runs here ({tmp_path}), and loaders and holders stay outside; set {PIPES} to have them inside",
        f"loaders and holders are clients of MPS, by {PIPES}=/run/mps: clients of the daemon must be of its user",
    ]


@pytest.mark.parametrize(
    ("mode", "environment", "message"),
    [
        (2, OUTSIDE, "PROHIBITED: nothing can be loaded or attached"),
        (2, INSIDE, "PROHIBITED: nothing can be loaded or attached"),
        (3, OUTSIDE, "EXCLUSIVE_PROCESS: one process at a time has the GPU"),
        (3, INSIDE, f"EXCLUSIVE_PROCESS: clients must be clients of MPS ({PIPES}=/run/mps)"),
    ],
)
def test_a_compute_mode_that_forbids_something_is_a_warning(
    mode: int,
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cuda_modes.driver, "compute_mode", lambda _: mode)
    tell_compute_mode(0, "GPU-a", environment)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith(f"device GPU-a is in compute mode {message}")


def test_no_word_of_the_usual_mode_or_of_one_that_is_not_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(_: int) -> int:
        raise DeviceError("cuDeviceGetAttribute failed")

    for answer in (lambda _: 0, lambda _: 7, unknown):
        monkeypatch.setattr(cuda_modes.driver, "compute_mode", answer)
        tell_compute_mode(0, "GPU-a", OUTSIDE)
    assert not caplog.records
