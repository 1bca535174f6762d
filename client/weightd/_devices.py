"""Translate the caller's name of a device into a UUID for the daemon, because ordinals differ between processes."""

from __future__ import annotations

import re
import sys

from ._mapping import cuda_driver
from .errors import DeviceMismatchError

_HOST = ("host", "cpu")
_UUID = ("GPU-", "MIG-")
_CUDA = re.compile(r"cuda(?::(\d+))?")


def device_name(device: str | None) -> str:
    """The daemon's name for a device; "" for its default. "cuda" is torch's current device, or the first.

    A UUID goes as it is, also one that this process does not see. Errors: DeviceMismatchError.
    """
    if not device:
        return ""
    if device in _HOST:
        return "host"
    if device.startswith(_UUID):
        return device
    matched = _CUDA.fullmatch(device)
    if matched is None:
        raise DeviceMismatchError(f"device {device!r}: must be 'host', 'cpu', 'cuda', 'cuda:N' or a GPU's UUID")
    try:
        return cuda_driver.uuid_of(int(matched[1]) if matched[1] else _current())
    except DeviceMismatchError as error:
        raise DeviceMismatchError(f"device {device!r}: {error}") from error


def _current() -> cuda_driver.Ordinal:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.current_device())
