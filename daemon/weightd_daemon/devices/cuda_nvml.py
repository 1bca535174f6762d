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
_READY_SECONDS = 2.0
"""How long NVML is waited for while another thread makes it ready: much less than until a GPU counts as silent."""
_HARMLESS = (
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_NOT_FOUND",
    "NVML_ERROR_NO_PERMISSION",
    "NVML_ERROR_INVALID_ARGUMENT",
    "NVML_ERROR_FUNCTION_NOT_FOUND",
)
"""Errors that are about the question. After any other the library is made ready anew: its driver may be another."""


class _Library:
    """NVML. It is made ready when it is first needed, and again some time after it has failed.

    Whoever needs it meanwhile waits `_READY_SECONDS` at most, from when that began: it may hang for another GPU's sake.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._retry_at = 0.0
        self._begun_at: float | None = None
        """Since when a thread makes it ready; None where none does."""
        self._state = threading.Condition()
        """Guards the above; nobody holds it in a call of NVML."""

    def get(self) -> Any:
        """The module pynvml, ready; None where it is not installed, does not work now, or is not ready yet."""
        with self._state:
            if self._begun_at is not None:
                self._state.wait(max(0.0, self._begun_at + _READY_SECONDS - time.monotonic()))
            if self._nvml is not None or self._begun_at is not None or time.monotonic() < self._retry_at:
                return self._nvml
            self._begun_at = time.monotonic()
        nvml, retry_at = None, 0.0
        try:
            nvml, retry_at = _begin()
        finally:
            with self._state:
                self._nvml, self._retry_at, self._begun_at = nvml, retry_at, None
                self._state.notify_all()
        return nvml

    def failed(self, error: Any) -> None:
        """Note an error of NVML: the library may have to be made ready again."""
        with self._state:
            nvml = self._nvml
            if nvml is None or error.value in {getattr(nvml, name) for name in _HARMLESS}:
                return
            self._nvml = None
            self._retry_at = time.monotonic() + _RETRY_SECONDS
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as also:
            log.debug("NVML does not shut down: %s", also)


def _begin() -> tuple[Any, float]:
    """Make NVML ready. Returns the module, None where that does not work, and when to try again."""
    try:
        import pynvml
    except ImportError:
        log.debug("no NVML: the package nvidia-ml-py is not installed")
        return None, math.inf
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no NVML for now: %s", error)
        return None, time.monotonic() + _RETRY_SECONDS
    return pynvml, 0.0


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
