"""The driver's errors: which say that the device cannot do what was asked, and what an administrator can do about them.

All others may pass, also those that the installed cuda-bindings do not know. A driver says them while a service of its
own starts (802), after an upgrade (803), while another process is in the way (46, 2), or for no reason at all (999).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightd.errors import WeightdError

OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
NO_DEVICE = "CUDA_ERROR_NO_DEVICE"

_UNSUPPORTED = frozenset(
    {
        "CUDA_ERROR_NOT_SUPPORTED",
        "CUDA_ERROR_INVALID_DEVICE",
        "CUDA_ERROR_INVALID_VALUE",
        "CUDA_ERROR_NOT_PERMITTED",
    }
)
_ADVICE = {
    "CUDA_ERROR_SYSTEM_NOT_READY": "start nvidia-fabricmanager, or wait until it is up",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver was upgraded while its older kernel module is loaded: restart the "
    "machine, or reload the module",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has the GPU to itself: end it, or set the compute mode with "
    "`nvidia-smi -c DEFAULT`",
    OUT_OF_MEMORY: "other processes have taken the memory of the GPU, or of the machine",
    "CUDA_ERROR_OPERATING_SYSTEM": "the process may be out of descriptors or memory",
}
_WITHOUT_UVM = frozenset({"CUDA_ERROR_UNKNOWN", NO_DEVICE})
"""What cuInit says while the node of nvidia-uvm is missing."""


def code_of(error: WeightdError) -> str:
    """The driver's name of an error; empty if the error is not the driver's."""
    return error.metadata.get("code", "")


def is_unsupported(error: WeightdError) -> bool:
    """Return whether the driver said that the device cannot do what was asked, now or later."""
    return code_of(error) in _UNSUPPORTED


def explained(error: WeightdError, root: Path = Path("/")) -> str:
    """The message of an error in one line, with what to do about it where that is known."""
    advice = _ADVICE.get(code_of(error), "")
    if code_of(error) in _WITHOUT_UVM and (root / "proc/driver/nvidia").exists():
        uvm = root / "dev/nvidia-uvm"
        advice = "" if uvm.exists() else "/dev/nvidia-uvm is missing: run `nvidia-modprobe -c0 -u` as root"
    return f"{error.message}; {advice}" if advice else error.message
