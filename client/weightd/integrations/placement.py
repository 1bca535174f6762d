"""Resolve a framework's `device_map` to one device."""

from __future__ import annotations

from typing import Any

import torch

from weightd.errors import InvalidReferenceError
from weightd.torch import device_name

from .pretrained import transformers

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values that leave the devices to accelerate."""


def one_device(device_map: Any) -> str:
    """The device that a `device_map` comes to, by name; None is the one that torch makes tensors on.

    A strategy has one device to place on where there is one GPU or none; whether a model fits there, the store says.
    Errors: InvalidReferenceError (several devices, one that memory cannot be attached on, or no device at all).
    """
    try:
        resolved = _resolved(device_map)
        if resolved is None:
            return "cpu"
        places: set[Any] = set(resolved.values()) if isinstance(resolved, dict) else _usable()
        devices = {torch.device("cuda", place) if isinstance(place, int) else torch.device(place) for place in places}
    except (RuntimeError, ValueError, TypeError) as error:
        raise InvalidReferenceError(f"device_map {device_map!r}: {error}") from error
    if len(devices) != 1:
        raise InvalidReferenceError(
            f"device_map {device_map!r} means {len(devices)} devices, and attached tensors are all on one"
        )
    (device,) = devices
    if device.type not in ("cpu", "cuda"):
        raise InvalidReferenceError(f"device_map {device_map!r} means {device}, where no memory can be attached")
    return device_name(device)


def device_of(device: str | int | torch.device, device_map: Any) -> str:
    """The device of a call that may say `device` or `device_map`. Errors: InvalidReferenceError, as `one_device`."""
    place = device_name(device)
    if device_map is None:
        return place
    mapped = one_device(device_map)
    if place not in ("cpu", mapped, mapped.partition(":")[0]):
        raise InvalidReferenceError(f"device {place} and device_map {device_map!r}, which means {mapped}: say one")
    return mapped


def _usable() -> set[Any]:
    """What accelerate would place on: GPUs, else the CPU."""
    from accelerate.utils import get_max_memory  # transformers has looked whether it is installed

    return {place for place in get_max_memory() if place not in ("cpu", "disk")} or {"cpu"}


def _resolved(device_map: Any) -> Any:
    """A map from modules to devices, a strategy or None, as transformers makes of it."""
    check = getattr(transformers.integrations.accelerate, "check_and_set_device_map", None)
    if check is not None:
        return check(device_map)
    if device_map is None:  # before 5.0 it had no function for that
        modeling: Any = transformers.modeling_utils  # Any: what is called here has no types
        device_map = modeling.get_torch_context_manager_or_global_device()
    if device_map is None or isinstance(device_map, dict) or device_map in STRATEGIES:
        return device_map
    return {"": device_map if isinstance(device_map, int) else torch.device(device_map)}
