"""What NVML knows of a GPU: its free memory, whichever process uses the rest, and the number of its device file.

Unlike the driver, NVML needs no context. Each GPU is asked about on its own thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Any

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
"""How long NVML is left alone after it could not be used: at boot, or while the driver is replaced."""
_HARMLESS = (
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_NOT_FOUND",
    "NVML_ERROR_NO_PERMISSION",
    "NVML_ERROR_INVALID_ARGUMENT",
    "NVML_ERROR_FUNCTION_NOT_FOUND",
)
"""Errors that are about the question. After any other the library is made ready anew: its driver may be another."""


class _Library:
    """NVML. It is made ready when it is first needed, and again some time after it has failed."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._retry_at = 0.0
        self._lock = threading.Lock()

    def get(self) -> Any:
        """The module pynvml, ready; None where it is not installed, or does not work now."""
        with self._lock:
            if self._nvml is None and time.monotonic() >= self._retry_at:
                self._nvml = self._begin()
            return self._nvml

    def failed(self, error: Any) -> None:
        """Note an error of NVML: the library may have to be made ready again."""
        with self._lock:
            nvml = self._nvml
            if nvml is None or error.value in {getattr(nvml, name) for name in _HARMLESS}:
                return
            self._nvml = None
            self._retry_at = time.monotonic() + _RETRY_SECONDS
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as also:
            log.debug("NVML does not shut down: %s", also)

    def _begin(self) -> Any:
        try:
            import pynvml
        except ImportError:
            log.debug("no NVML: the package nvidia-ml-py is not installed")
            self._retry_at = math.inf
            return None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            log.debug("no NVML for now: %s", error)
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            return None
        return pynvml


_library = _Library()


def free_bytes(uuid: str) -> int | None:
    """Bytes that are free on a GPU now; None where nobody knows."""
    nvml = _library.get()
    if nvml is None:
        return None
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, uuid)).free)
    except nvml.NVMLError as error:
        log.debug("NVML does not say what is free on %s: %s", uuid, error)
        _library.failed(error)
        return None


def names_alike(uuid: str) -> bool:
    """Whether NVML is known to call a device as the driver does, which it does not for a part of a GPU (MIG)."""
    nvml = _library.get()
    if nvml is None:
        return False
    try:
        nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return False
    return True


def minor_number(uuid: str) -> int | None:
    """The N of /dev/nvidiaN of a GPU, or of the GPU that a MIG instance is a part of; None where nobody knows."""
    nvml = _library.get()
    if nvml is None:
        return None
    try:
        handle = _handle(nvml, uuid)
        if nvml.nvmlDeviceIsMigDeviceHandle(handle):
            handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        return int(nvml.nvmlDeviceGetMinorNumber(handle))
    except nvml.NVMLError as error:
        log.debug("NVML does not say the minor number of %s: %s", uuid, error)
        _library.failed(error)
        return None


def _handle(nvml: Any, uuid: str) -> Any:
    """NVML's handle of a device. Errors: NVMLError.

    The driver says GPU- also of a part of a GPU (MIG); NVML says MIG- of that, and knows no other name for it.
    """
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid.removeprefix('GPU-')}")
        except nvml.NVMLError:
            pass  # the answer for the driver's own name tells more
        raise
