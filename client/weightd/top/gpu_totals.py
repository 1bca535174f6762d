"""The memory of whole GPUs, as NVML knows it if pynvml is installed."""

from __future__ import annotations

from collections.abc import Iterable

try:
    import pynvml
except ImportError:  # the extra `cuda` has it
    pynvml = None


def total_bytes(uuids: Iterable[str]) -> dict[str, int]:
    """Return the bytes of each GPU that NVML finds by its UUID; empty without pynvml, a driver or a GPU."""
    wanted = list(uuids)
    if pynvml is None or not wanted:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    found = {}
    try:
        for uuid in wanted:
            try:
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                found[uuid] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            except pynvml.NVMLError:
                continue
    finally:
        pynvml.nvmlShutdown()
    return found
