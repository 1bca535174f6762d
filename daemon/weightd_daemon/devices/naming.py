"""Resolves the device of a request: a UUID, an unambiguous prefix of a UUID, or no value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd.errors import InvalidReferenceError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .device import Device

_PREFIXES = ("gpu-", "mig-")
"""A part of a GPU is MIG- to nvidia-smi and GPU- to the driver: the digits tell."""
_LEAST = len("GPU-") + 8
"""Shortest beginning of a UUID that may stand for it."""


def meant(devices: Mapping[str, Device], said: str) -> str:
    """The UUID that a request says; nothing stays nothing. Errors: NotFoundError, InvalidReferenceError (ambiguous)."""
    if not said or said in devices:
        return said
    found = [uuid for uuid in devices if len(said) >= _LEAST and _is_beginning(said.lower(), uuid.lower())]
    if not found:
        raise NotFoundError(f"device {said!r}: this daemon serves {_listed(devices)}")
    if len(found) > 1:
        raise InvalidReferenceError(f"device {said!r} means more than one of {', '.join(found)}; say more of it")
    return found[0]


def _is_beginning(said: str, uuid: str) -> bool:
    return said.startswith(_PREFIXES) and uuid.startswith(_PREFIXES) and uuid[4:].startswith(said[4:])


def place(devices: Mapping[str, Device], default: str, said: str) -> str:
    """Where a load goes: the device that the request says, or the default. Errors: as in `meant`, or it must say."""
    uuid = meant(devices, said) or default
    if not uuid:
        raise InvalidReferenceError(f"this daemon serves several devices, {_listed(devices)}; say which with --device")
    return uuid


def _listed(devices: Mapping[str, Device]) -> str:
    return ", ".join(
        uuid if device.name == "host memory" else f"{uuid} ({device.name})" for uuid, device in devices.items()
    )
