"""The device file of a GPU, /dev/nvidiaN: as long as anybody has it open, the driver keeps the GPU initialised.

Where persistence mode is off, memory that nobody has open in this sense goes when the last process does, exported or
not; what an exported descriptor holds open is /dev/nvidiactl, which does not count (NVIDIA, Driver Persistence).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .cuda_nvml import minor_number

DEV = Path("/dev")
GPUS = Path("/proc/driver/nvidia/gpus")
"""What the driver says of each GPU, in a file `information` of a folder for its place on the bus."""


def open_node(uuid: str) -> int | None:
    """Open the device file of a GPU; None where nobody knows which it is. Errors: OSError."""
    minor = minor_number(uuid)
    if minor is None:
        minor = _minor_by_proc(uuid)
    # To read and write, as libcuda does. Nothing is ever read or written.
    return None if minor is None else os.open(DEV / f"nvidia{minor}", os.O_RDWR | os.O_CLOEXEC)


def missing_uvm() -> str:
    """What is wrong where the driver is loaded and its node for unified memory is not there; empty where all is well.

    The kernel module does not make it: nvidia-modprobe, udev or nvidia-persistenced do. Without it, cuInit fails.
    """
    if not GPUS.parent.exists() or (DEV / "nvidia-uvm").exists():
        return ""
    return (
        f"NVIDIA's driver is loaded, and {DEV / 'nvidia-uvm'} is not there: as root, run `nvidia-modprobe -c0 -u`, "
        "or enable nvidia-persistenced"
    )


def _minor_by_proc(uuid: str) -> int | None:
    for path in sorted(GPUS.glob("*/information")):
        try:
            text = path.read_text(errors="replace")
        except OSError:  # it has fallen off the bus
            continue
        found = re.search(r"^GPU UUID:\s*(\S+)$", text, re.MULTILINE)
        minor = re.search(r"^Device Minor:\s*(\d+)$", text, re.MULTILINE)
        if found and minor and found[1].lower() == uuid.lower():
            return int(minor[1])
    return None
