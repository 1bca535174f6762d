"""The free memory of a GPU, whichever process uses the rest. Unlike the driver, NVML needs no context."""

from __future__ import annotations

import functools
import logging
from typing import Any

log = logging.getLogger(__name__)


def free_bytes(uuid: str) -> int | None:
    """Bytes that are free on a GPU now; None where nobody knows."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid)).free)
    except nvml.NVMLError as error:
        log.debug("NVML does not say what is free on %s: %s", uuid, error)
        return None


@functools.cache
def _nvml() -> Any:
    """The library, ready; None where it is not installed, or there is no driver."""
    try:
        import pynvml
    except ImportError:
        log.debug("no NVML: the package nvidia-ml-py is not installed")
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no NVML: %s", error)
        return None
    return pynvml
