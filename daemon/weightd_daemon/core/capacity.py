"""The capacity of a device: how much it can still take, what occupies the rest, and the error that reports both."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightd._sizes import size
from weightd.errors import CapacityError, WeightdError

from .prospect import prospect

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .blob import Blob
    from .checkpoint import Checkpoint
    from .memory import MemoryAccounting


class CapacityEstimate(NamedTuple):
    """Budget, free bytes (holes included) and evictable bytes, as eviction for one load counts them.

    And what only pins keep, what leases keep, the largest piece that could be had, evictable bytes included, and what
    the device itself has free, if that is known.
    """

    device: str
    budget_bytes: int
    free_bytes: int
    evictable_bytes: int
    pinned_bytes: int
    leased_bytes: int
    largest_bytes: int
    device_free_bytes: int | None

    def error(self, requested: int, full: MemoryError | None = None) -> WeightdError:
        """The error that says why `requested` bytes do not fit; `full` is what the device itself said, if it did."""
        if isinstance(full, WeightdError):  # it was not for want of bytes
            return full
        figures = {key: value for key, value in self._asdict().items() if key != "device" and value is not None}
        budget, free, evictable, pinned, leased, largest = (size(figures[key]) for key in self._fields[1:7])
        advice = "remove or unpin a checkpoint, stop a process that holds one (`weightd ps`), or raise --budget"
        reason = ""
        if requested > self.budget_bytes:
            advice = "that is more than the whole budget; raise --budget"
        elif full is not None:
            reason = f"; the device itself has no room{f': {full}' if str(full) else ''}"
            advice = "stop what else uses the device, remove or unpin a checkpoint, or lower --budget"
        elif self.largest_bytes < requested <= self.free_bytes + self.evictable_bytes:
            reason = f"; what is free or evictable lies in pieces, the largest of {largest}"
        return CapacityError(
            f"{size(requested)} do not fit on {self.device}: {free} free, {evictable} evictable, "
            f"{pinned} pinned, {leased} leased, of a budget of {budget}{reason}; {advice}",
            {"requested_bytes": str(requested), **{key: str(value) for key, value in figures.items()}},
        )


def room(
    memory: MemoryAccounting,
    place: tuple[str, str],
    load: int,
    checkpoints: Iterable[tuple[Checkpoint, bool]],
    full: MemoryError | None = None,
) -> CapacityEstimate:
    """The room that a load sees at its place, a device and a sharing domain.

    `checkpoints` are all of the device, each with whether it is leased; `full` if the device has refused memory.
    """
    device, domain = place
    available = memory.available()
    leased: dict[int, Blob] = {}
    pinned: dict[int, Blob] = {}
    rest: dict[int, Blob] = {}
    for checkpoint, is_leased in checkpoints:
        kept = leased if is_leased else pinned if checkpoint.pinned else rest
        kept.update(checkpoint.unique)
    evictable = [b for number, b in rest.items() if number not in leased and number not in pinned and not b.holds]
    now = prospect(memory, domain, load)
    slots = [blob.slot for blob in evictable]
    then = prospect(memory, domain, load, slots, None if full is None else available)
    return CapacityEstimate(
        device,
        budget_bytes=memory.budget,
        free_bytes=max(0, now.total),
        evictable_bytes=then.total - now.total,
        pinned_bytes=sum(blob.length for number, blob in pinned.items() if number not in leased),
        leased_bytes=sum(blob.length for blob in leased.values()),
        largest_bytes=max(0, then.largest),
        device_free_bytes=available,
    )
