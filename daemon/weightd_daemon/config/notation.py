"""The notation of sizes, shares and devices in settings."""

from __future__ import annotations

import re
from itertools import permutations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UUID_SHAPE = "00000000-0000-0000-0000-000000000000"
_UUID_PREFIXES = ("GPU-", "MIG-")
"""Of a GPU and of a part of one. The driver says GPU- of either, nvidia-smi and NVML do not; the digits tell."""
_UUID_LEAST = 8


def parse_size(text: str) -> int:
    """Bytes from "12GiB", "500M" or "1073741824"; units are powers of 1024. Errors: ValueError."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r:.100} is not a size such as 12GiB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size >= 1 << 63:
        raise ValueError(f"{text!r:.100} is more than 64 bits can count")
    return size


def parse_budget(text: str) -> float | int:
    """Bytes as an int, or a share as a float. Errors: ValueError."""
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    try:
        amount = float(percent[1]) / 100 if percent else parse_size(text)
    except ValueError:
        raise ValueError(f"{text!r:.100} is not a size such as 12GiB, nor a share such as 80%") from None
    if amount <= 0 or (isinstance(amount, float) and amount > 1):
        raise ValueError(f"{text!r:.100}: must be more than 0 and at most 100%")
    return amount


def parse_device(text: str) -> str:
    """A device as people name it, a UUID in lower case as drivers write it. Errors: ValueError."""
    text = text.strip()
    if re.fullmatch(r"host|cuda(:(0|[1-9][0-9]{0,3}))?", text):
        return text
    prefix, digits = text[:4], text[4:].lower()
    shape = re.sub(r"[0-9a-f]", "0", digits)
    if prefix in _UUID_PREFIXES and len(digits) >= _UUID_LEAST and _UUID_SHAPE.startswith(shape):
        return prefix + digits
    raise ValueError(
        f"{text!r:.100} is not a device; "
        f"use host, cuda, cuda:N, or GPU- or MIG- and a UUID or its first {_UUID_LEAST} digits or more"
    )


def is_uuid(said: str) -> bool:
    """Whether a setting names a device by its UUID, or by the beginning of it."""
    return said.startswith(_UUID_PREFIXES)


def whole_uuid(said: str) -> str:
    """The UUID, as the driver writes it, of a device that a setting names by all of it; empty if it does not."""
    return f"GPU-{said[4:]}" if is_uuid(said) and len(said) == len("GPU-") + len(_UUID_SHAPE) else ""


def means(said: str, name: str) -> bool:
    """Whether a device that is called `name` is what a setting says; of a UUID the beginning will do."""
    if is_uuid(said) and is_uuid(name):
        return name[4:].startswith(said[4:])
    return name == said


def refuse_twice(names: Sequence[str]) -> None:
    """Errors: ValueError where two of these may be one device."""
    for one, other in permutations(names, 2):
        if means(one, other):
            raise ValueError(f"{one} and {other} do not name two devices")
