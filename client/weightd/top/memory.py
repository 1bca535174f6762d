"""What the memory of a device is used for. Pure."""

from __future__ import annotations

from typing import NamedTuple

from weightd.types import DeviceStats


class DeviceParts(NamedTuple):
    """Bytes of one device by use; all but `outside` add up to the budget.

    Checkpoints that are pinned and leased count as leased, as in the daemon's errors; those that are neither are `idle`
    and can be evicted.
    `others` is what the budget allows and the device has not, because other processes use it. `outside` is what others
    use of the whole GPU, None where that is not known.
    """

    pinned: int
    leased: int
    idle: int
    in_flight: int
    holes: int
    pool: int
    free: int
    others: int
    outside: int | None

    @property
    def room(self) -> int:
        """The most that a load can get: what is free, kept for reuse, or can be evicted."""
        return self.idle + self.holes + self.pool + self.free

    def named(self) -> list[tuple[str, int]]:
        """The parts of the budget in the order of the bar."""
        return [
            ("pinned", self.pinned),
            ("leased", self.leased),
            ("idle", self.idle),
            ("in flight", self.in_flight),
            ("holes", self.holes),
            ("pool", self.pool),
            ("free", self.free),
            ("others", self.others),
        ]


def parts(stats: DeviceStats, total: int | None = None) -> DeviceParts:
    """Split the budget of a device up; `total` are the bytes of a whole GPU, if they are known."""
    leased = min(stats.leased_bytes, stats.live_bytes)
    pinned = min(stats.pinned_bytes, max(stats.live_bytes - leased - stats.evictable_bytes, 0))
    holes = min(stats.hole_bytes, stats.reusable_bytes)
    available = stats.free_bytes
    if stats.device_free_bytes is not None:
        available = max(min(available, stats.device_free_bytes), 0)
    outside = None
    if total is not None and stats.device_free_bytes is not None:
        outside = max(total - stats.device_free_bytes - stats.used_bytes, 0)
    return DeviceParts(
        pinned=pinned,
        leased=leased,
        idle=stats.live_bytes - pinned - leased,
        in_flight=stats.in_flight_bytes,
        holes=holes,
        pool=stats.reusable_bytes - holes,
        free=available,
        others=stats.free_bytes - available,
        outside=outside,
    )
