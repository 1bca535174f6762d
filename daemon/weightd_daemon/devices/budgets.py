"""What the settings say of devices that are there: the budget of each, and which one is meant."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from weightd._sizes import size
from weightd.errors import DeviceAbsentError
from weightd_daemon.config.notation import means, parse_size
from weightd_daemon.config.settings import ConfigError, TemporaryConfigError

from .host import HostDevice

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from weightd_daemon.config.settings import Settings
    from weightd_daemon.core.memory import MemoryAccounting

    from .device import Device

log = logging.getLogger(__name__)

_POOL_SHARE = 8
_POOL_LIMIT = 2 << 30
_BOOKS_SHARE = 10
_BOOKS_LEAST = 256 << 20


def check_budgets(
    settings: Settings,
    devices: Mapping[str, Device],
    names: Mapping[str, Sequence[str]],
    memories: Mapping[str, MemoryAccounting],
    absent: Collection[str],
) -> None:
    """Whether devices that serve can have these budgets from now on. Errors: ConfigError."""
    check_names(settings, names.values())
    for uuid, memory in memories.items():
        if uuid in absent:  # what it may have is known when it serves
            continue
        budget = budget_of(settings, devices[uuid], names[uuid])
        if budget < memory.used and budget < memory.budget:  # a start with less than was taken up is not repeated here
            raise ConfigError(
                f"budget = {settings.budget!r}: {uuid} uses {memory.used} bytes by now, more than {budget}; "
                "remove checkpoints first, or restart",
                "budget",
            )


def check_names(settings: Settings, served: Collection[Sequence[str]]) -> None:
    """Whether each budget is for one device, or may be when an absent GPU is back. Errors: ConfigError."""
    for said in settings.budget_devices:
        meant = [names[0] for names in served if any(means(said, name) for name in names)]
        if not meant and not _unnumbered(said, served):
            kind = TemporaryConfigError if _may_come(said, settings.devices) else ConfigError
            raise kind(f"budget = {settings.budget!r}: {said} is not served", "budget")
        if len(meant) > 1 and said != "cuda":
            raise ConfigError(
                f"budget = {settings.budget!r}: {said} means more than one of {', '.join(meant)}; say more of it",
                "budget",
            )


def _may_come(said: str, devices: Sequence[str]) -> bool:
    """Whether a device that is not served could be, with the setting `device` as it is: a GPU that is not there now.

    A GPU that the setting names by its number is served or absent (`_unnumbered`), or the daemon has not started.
    """
    gpus = [device for device in devices if device != "host"]
    if said == "host" or not gpus:
        return False
    by_number = all(device.startswith("cuda:") for device in (said, *gpus))
    return not by_number


def _unnumbered(said: str, served: Iterable[Sequence[str]]) -> list[str]:
    """The UUIDs of the GPUs that a number may mean when they are back: absent ones, whose numbers nobody knows now."""
    if not said.startswith("cuda:"):
        return []
    return [names[0] for names in served if "cuda" in names and not any(name.startswith("cuda:") for name in names)]


def device_meant(said: str, served: Mapping[str, Sequence[str]], default: str, devices: Sequence[str]) -> str:
    """The UUID of what a setting calls a device; nothing is the default. `served` is what may call each.

    `devices` is the setting of what to serve. Errors: ConfigError, without where that stands; DeviceAbsentError (it may
    be a GPU that is absent, and whose number is not known until it is back).
    """
    found = [uuid for uuid, names in served.items() if any(means(said, name) for name in names)] if said else [default]
    if len(found) == 1 and found[0]:
        return found[0]
    there = ", ".join(served)
    if found:
        raise ConfigError(f"device {said!r} may be one of several, {there}; say which")
    if absent := _unnumbered(said, served.values()):
        raise DeviceAbsentError(f"device {said!r} may be {' or '.join(absent)}, which is absent", {"device": absent[0]})
    kind = TemporaryConfigError if _may_come(said, devices) else ConfigError
    raise kind(f"device {said!r} is not served; there are {there}")


def resize(
    settings: Settings,
    devices: Mapping[str, Device],
    names: Mapping[str, Sequence[str]],
    memories: Mapping[str, MemoryAccounting],
    absent: Collection[str],
) -> int:
    """Give devices that serve the budgets of other settings, which were checked. Returns the limit of the books."""
    for uuid, memory in memories.items():
        if uuid not in absent:
            budget = budget_of(settings, devices[uuid], names[uuid])
            memory.resize(budget, pool_of(settings, devices[uuid], budget))
    return books_of(settings, {uuid: memory.budget for uuid, memory in memories.items()})


def called(device: Device) -> str:
    """A device for people."""
    return device.name if device.kind == "host" else f"{device.name} ({device.uuid})"


def budget_of(settings: Settings, device: Device, names: Sequence[str]) -> int:
    """Bytes that a device may use. Errors: ConfigError.

    A GPU that "auto" has found, and that none is said for, gets at most all that it has: it may be new to the machine.
    """
    said, capacity = settings.budget_for(names), device.capacity()
    share = device.default_share if said is None else said
    budget = int(capacity * share) if isinstance(share, float) else share
    found = "cuda" in names and "auto" in settings.devices
    if budget > capacity and found and not settings.budget_is_for(names):
        log.info("budget of %s: %d bytes is all that it has, of the %d said", device.uuid, capacity, budget)
        budget = capacity
    if not device.page <= budget <= capacity:
        raise ConfigError(
            f"budget = {settings.budget!r}: that of {device.uuid} must be from {device.page} bytes "
            f"to {size(capacity)} here",
            "budget",
        )
    if capacity - budget < device.loader_bytes:
        log.warning(
            "budget of %s: %s of %s leave less than the context of a loader may take, %s",
            device.uuid, size(budget), size(capacity), size(device.loader_bytes),
        )  # fmt: skip
    return budget // device.page * device.page


def pool_of(settings: Settings, device: Device, budget: int) -> int:
    """Freed bytes that stay with a device: only host memory's, which it takes long to populate."""
    if not device.sparse:
        return 0
    return min(budget, parse_size(settings.pool)) if settings.pool else min(budget // _POOL_SHARE, _POOL_LIMIT)


def books_of(settings: Settings, budgets: Mapping[str, int]) -> int:
    """Bytes that the daemon's own books may take; 0 for no limit. `budgets` are those of the devices served.

    Books are host memory also where only GPUs are served.
    """
    if settings.books:
        return parse_size(settings.books)
    host = HostDevice()
    budget = budgets.get(host.uuid) or int(host.capacity() * host.default_share)
    return max(_BOOKS_LEAST, budget // _BOOKS_SHARE)
