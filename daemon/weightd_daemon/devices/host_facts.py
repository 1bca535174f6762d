"""What there is of host memory here, and whether segments can be made of it, for `weightd doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightd.errors import WeightdError

from .budgets import budget_of
from .cgroup import memory_limit
from .host import HostDevice

if TYPE_CHECKING:
    from weightd_daemon.config.settings import Settings


def host_facts(pid: int) -> dict[str, Any]:
    """Bytes that there are (`capacity`) and that are `available`, the limit of a cgroup, and why no memfd can be made.

    `cgroup` is the lowest limit of process `pid`, or of this one if that is 0, and None if there is none; it is only
    known if `cgroup_known`. `memfd_error` is empty if a segment can be made.
    """
    device = HostDevice()
    process = Path("/proc", str(pid or "self"))
    return {
        "capacity": device.capacity(),
        "available": device.available(),
        "cgroup": memory_limit(process),
        "cgroup_known": _reads(process / "cgroup") and _reads(process / "mountinfo"),
        "memfd_error": _memfd_error(device),
    }


def host_budget(settings: Settings) -> int | None:
    """The budget of host memory; None if these settings do not serve it. Errors: ConfigError."""
    if not set(settings.devices) & {"auto", "host"}:
        return None
    device = HostDevice()
    return budget_of(settings, device, (device.uuid,))


def _reads(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def _memfd_error(device: HostDevice) -> str:
    """Make a segment. It takes no memory as nobody writes to it, and is gone when this process ends."""
    try:
        device.create(device.page)
    except (OSError, MemoryError, WeightdError) as error:
        return str(error)
    return ""
