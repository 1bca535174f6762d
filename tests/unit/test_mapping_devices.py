"""What callers call a device, and what the daemon is told."""

from __future__ import annotations

from ctypes.util import find_library
from pathlib import Path

import pytest

from support import fakecuda
from support.gpu_segments import check
from weightd._devices import device_name
from weightd.errors import DeviceMismatchError

REFUSED = """
from weightd._devices import device_name
try:
    device_name("cuda:0")
except weightd.DeviceMismatchError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (None, ""),
        ("", ""),
        ("host", "host"),
        ("cpu", "host"),
        ("GPU-0a1b2c3d", "GPU-0a1b2c3d"),
        ("MIG-0a1b2c3d", "MIG-0a1b2c3d"),
    ],
)
def test_names_that_need_no_driver(device: str | None, name: str) -> None:
    assert device_name(device) == name


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:", "cuda:x", "cuda:-1", "CUDA:0", "cuda:0 ", "xpu:1"])
def test_other_names_are_refused_with_what_can_be(device: str) -> None:
    with pytest.raises(DeviceMismatchError, match=f"device '{device}': must be 'host', 'cpu', 'cuda', 'cuda:N' or a"):
        device_name(device)


def test_ordinals_are_those_of_this_process(fake_driver: Path) -> None:
    source = """
from weightd._devices import device_name
print(device_name("cuda:0"), device_name("cuda:1"), device_name("cuda"))
try:
    device_name("cuda:2")
except weightd.DeviceMismatchError as error:
    print(error)
"""
    zero, one = fakecuda.uuid(0), fakecuda.uuid(1)
    refused = "device 'cuda:2': cuda:2 is not there; this process sees 2 CUDA devices\n"
    assert check(fake_driver, source, devices=3, visible="1,0") == f"{one} {zero} {one}\n{refused}"


def test_cuda_is_the_device_that_torch_uses(fake_driver: Path) -> None:
    source = """
import sys
from types import SimpleNamespace
from weightd._devices import device_name
for ready in (False, True):
    sys.modules["torch"] = SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: ready, current_device=lambda: 1)
    )
    print(device_name("cuda"))
"""
    assert check(fake_driver, source, devices=2).split() == [fakecuda.uuid(0), fakecuda.uuid(1)]


def test_a_driver_without_devices_is_said_so(fake_driver: Path) -> None:
    expected = "device 'cuda:0': no CUDA device can be used here: cuInit failed with CUDA_ERROR_NO_DEVICE\n"
    assert check(fake_driver, REFUSED, visible="") == expected


@pytest.mark.skipif(find_library("cuda") is not None, reason="a CUDA driver is installed here")
def test_no_driver_is_said_so(tmp_path: Path) -> None:
    assert check(tmp_path, REFUSED).startswith("device 'cuda:0': no CUDA driver can be used here: ")


def test_bindings_that_are_not_installed_are_said_so(fake_driver: Path) -> None:
    output = check(fake_driver, "import sys; sys.modules['cuda.bindings'] = None" + REFUSED)
    assert output.startswith("device 'cuda:0': ")
    assert "GPU memory needs the package cuda-bindings, which is not installed; pip install '.[cuda]' in" in output
