"""The store: blobs by content, and the checkpoints that refer to them. LAWS.md lists the laws of memory.

A checkpoint comes and goes in `ContentStore` alone, and a blob changes its state in `BlobTable` alone. loading.py, and
adoption.py, which fills an empty store, call these two. The store touches no memory: memory that can go is queued
(memory.py). Events tell of changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from weightd.errors import DeviceAbsentError, NotFoundError

from .blob import Blob, BlobState, BlobTable
from .books import BookkeepingMemory
from .checkpoint import Checkpoint, CheckpointKey, LostCheckpoint
from .checkpoint_index import CheckpointIndex
from .events import CheckpointEvicted, CheckpointSealed, Event
from .eviction import chosen_beyond
from .prospect import EvictionTrial
from .sharing import SharingIndex

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator

    from .arena import Extent
    from .lease import Lease, LeasePeer, LeaseTable
    from .memory import MemoryAccounting


FREED_AT_ONCE = 2000
"""The most blobs that are given up in one step of the loop, and their segment then goes to the pool as a whole."""
FREED_IN_A_STEP = 250
"""Of more, how many are given up in each step."""


class ContentStore:
    """The books of blobs, checkpoints and leases on all devices. Times are seconds since the epoch, sizes are bytes."""

    def __init__(self, *, leases: LeaseTable, on_event: Callable[[Event], None]) -> None:
        self.leases = leases
        self.revision = leases.revision
        self.blobs = BlobTable()
        self.books = BookkeepingMemory()
        self.checkpoints: dict[CheckpointKey, Checkpoint] = {}
        self.sharing = SharingIndex(lambda key: leases.count(key) > 0)
        self.index = CheckpointIndex(self.sharing.marked)
        self.lost: dict[CheckpointKey, LostCheckpoint] = {}
        self.memories: dict[str, MemoryAccounting] = {}
        self.absent: dict[str, str] = {}
        """Why devices cannot be served now, for people. Their books stay: nothing is lent, granted or evicted there."""
        self.leaving: set[str] = set()
        """Absent devices that are being emptied and let go of: not even a manifest is lent."""
        self.open_loads: set[int] = set()
        """Numbers of the loads that have not ended (loading.py)."""
        self.changed: set[CheckpointKey] = set()
        """Checkpoints that came, went or got other sources since the root record was written, which empties this."""
        self.touched: set[CheckpointKey] = set()
        """Checkpoints that were used since then."""
        self.collisions = self.evictions = self.uses = self._last_load = 0
        self._on_event = on_event
        leases.on_held = self._held

    # -- what there is ---------------------------------------------------------------------------------------------

    def live_bytes(self, device: str) -> int:
        """Bytes of sealed blobs on a device."""
        return self.blobs.sealed_bytes(device)

    def in_flight_bytes(self, device: str) -> int:
        """Bytes granted to open loads on a device."""
        return self.memories[device].in_flight

    def on_device(self, device: str) -> list[Checkpoint]:
        """The checkpoints that are resident on a device."""
        return [checkpoint for checkpoint in self.checkpoints.values() if checkpoint.key.device == device]

    def leases_of(self, checkpoint: Checkpoint) -> list[Lease]:
        """The leases that hold a checkpoint at this moment."""
        return self.leases.of(checkpoint.key)

    def hole_bytes(self, device: str) -> int:
        """Bytes with memory behind them in segments that hold something, beside what they hold: holes, page remainders.

        The rest of what is neither live nor in flight is the pool, and what is on its way back to the system.
        """
        memory = self.memories[device]
        return memory.used - self.live_bytes(device) - memory.in_flight - memory.unused_segment_bytes

    def is_leased(self, checkpoint: Checkpoint) -> bool:
        """Whether anybody holds a checkpoint at this moment."""
        return self.leases.is_held(checkpoint.key)

    def is_absent(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint lies on a device that cannot be served now."""
        return checkpoint.key.device in self.absent

    def stays(self, checkpoint: Checkpoint) -> bool:
        """Whether no want of room makes a checkpoint go: it is pinned or leased (law 3), or absent (law 12)."""
        return checkpoint.pinned or self.is_absent(checkpoint) or self.is_leased(checkpoint)

    def check_present(self, device: str, what: str = "") -> None:
        """Whether a device can be used now, for `what`. Errors: DeviceAbsentError."""
        if device in self.absent:
            what = f"{what}: " if what else ""
            raise DeviceAbsentError(f"{what}device {device} is absent: {self.absent[device]}", {"device": device})

    def set_absent(self, device: str, reason: str) -> None:
        """A device cannot be served now, for this reason (for people), or serves again if there is none."""
        if reason:
            self.absent[device] = reason
        else:
            self.absent.pop(device, None)
        self.revision.move()

    def evictable(self, device: str = "") -> Iterator[Checkpoint]:
        """The checkpoints on a device, or on all, that may be evicted, least recently used first.

        None may come, go or be used meanwhile.
        """
        for checkpoint in self.index.by_use():
            if device in ("", checkpoint.key.device) and not self.stays(checkpoint):
                yield checkpoint

    # -- what comes ------------------------------------------------------------------------------------------------

    def begin_load(self, device: str) -> int:
        """Number a load that begins on a device. Errors: NotFoundError (no such device), DeviceAbsentError."""
        if device not in self.memories:
            raise NotFoundError(f"device {device!r}: this daemon serves {', '.join(self.memories)}")
        self.check_present(device)  # law 12
        self._last_load += 1
        self.open_loads.add(self._last_load)
        return self._last_load

    def seal(self, sealed: CheckpointSealed, fresh: Collection[Blob], lengths: Counter[int]) -> None:
        """Tell of a checkpoint that a load has brought, then enter it. `fresh` are the load's own blobs, with lengths.

        What the listener of events raises fails the seal, and nothing has changed.
        """
        self._on_event(sealed)
        self._enter(sealed.checkpoint, fresh, lengths)

    def enter(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is resident from now on, and those of its blobs that are RESERVED are sealed with it."""
        self._enter(checkpoint, [blob for blob in checkpoint.unique.values() if blob.state is BlobState.RESERVED], None)

    def _enter(self, checkpoint: Checkpoint, fresh: Collection[Blob], lengths: Counter[int] | None) -> None:
        for blob in checkpoint.unique.values():
            blob.references += 1
        self.blobs.seal(fresh, lengths)
        self.checkpoints[checkpoint.key] = checkpoint
        self.revision.move()
        self.sharing.came(checkpoint)
        self.index.enter(checkpoint)
        self.books.enter(checkpoint)
        self.lost.pop(checkpoint.key, None)

    def use(self, checkpoint: Checkpoint, now: float) -> None:
        """A checkpoint is attached, or loaded again: it gets the next number. `now` is for people only."""
        self.uses += 1
        self.revision.move()
        checkpoint.used, checkpoint.last_used = self.uses, now
        self.index.use(checkpoint)
        self.touched.add(checkpoint.key)

    # -- what goes -------------------------------------------------------------------------------------------------

    def remove(
        self, checkpoint: Checkpoint, called: str = "", reason: str = "removed", by: LeasePeer | None = None
    ) -> int:
        """Evict a checkpoint on request. Returns the bytes of blobs that no other needs; some go when a load ends.

        Errors: InUseError, which calls the checkpoint `called` (or by its digest) and names the holders.
        """
        if self.leases.is_held(checkpoint.key) and (holders := self.leases_of(checkpoint)):  # law 3
            raise checkpoint.in_use(holders, called)
        return self.evict(checkpoint, reason, by=by)

    def evict(self, checkpoint: Checkpoint, reason: str, load: int = 0, by: LeasePeer | None = None) -> int:
        """A checkpoint goes, whoever holds it, perhaps to make room for a load. Returns as `remove` does."""
        self._strike(checkpoint)
        self.sharing.went(checkpoint)
        for blob in checkpoint.unique.values():
            blob.references -= 1
        unused = [blob for blob in checkpoint.unique.values() if not blob.references]
        given_up = sum([blob.key.length for blob in unused])
        self.free(unused)
        self.evictions += reason == "capacity"
        self._on_event(CheckpointEvicted(checkpoint, reason, load, by))
        return given_up

    def fit(self, device: str) -> Iterator[None]:
        """Evict in steps what the budget no longer holds. At the end, `excess` of its memory is leased or pinned.

        An absent device has no budget.
        """
        memory = self.memories[device]
        while True:
            while memory.freeing.go_on():  # until then it counts as used
                yield
            if device in self.absent or not (excess := memory.excess()):
                return
            chosen = chosen_beyond(EvictionTrial(memory, "", None), self.evictable(device), excess)
            if not chosen:
                return
            yield from self._evict_in_steps(chosen)  # but those that were leased or pinned meanwhile; so choose again

    def fit_books(self) -> Iterator[None]:
        """Evict in steps what the limit of the books no longer holds, as far as that is neither leased nor pinned."""
        while chosen := self.books.chosen_beyond(self.evictable()):
            yield from self._evict_in_steps(chosen)

    def _evict_in_steps(self, chosen: Iterable[Checkpoint]) -> Iterator[None]:
        """Evict those of the chosen that are still resident, and do not have to stay, when it is their turn."""
        for checkpoint in chosen:
            there = self.checkpoints.get(checkpoint.key) is checkpoint
            if there and not self.stays(checkpoint):
                self.evict(checkpoint, "capacity")
                yield

    def _held(self, key: Hashable) -> None:
        if (checkpoint := self.checkpoints.get(cast("CheckpointKey", key))) is not None:
            self.sharing.marked(checkpoint)

    def _strike(self, checkpoint: Checkpoint) -> None:
        del self.checkpoints[checkpoint.key]
        self.revision.move()
        self.index.strike(checkpoint)
        self.books.strike(checkpoint)

    def free(self, blobs: list[Blob]) -> None:
        """Give up those of some sealed blobs, all of one device, that no checkpoint refers to and no load relies on.

        Of many, that is begun: it goes on with MemoryAccounting.freeing, and until its turn each stays what it is, and
        may be used again. The list is the store's from now on.
        """
        if len(blobs) <= FREED_AT_ONCE:
            self._free(blobs)
        else:
            self.memories[blobs[0].key.device].freeing.begin(self._free_in_steps(blobs))

    def _free_in_steps(self, blobs: list[Blob]) -> Iterator[None]:
        blobs.reverse()  # in the order of their places, in which sets of ranges grow at their ends
        while blobs:
            some = blobs[-FREED_IN_A_STEP:]
            del blobs[-FREED_IN_A_STEP:]
            self._free(some)
            yield

    def _free(self, blobs: Iterable[Blob]) -> None:
        by_arena: dict[tuple[str, str], list[Extent]] = {}
        for blob in blobs:
            if blob.sealed and not blob.references and not blob.holds:  # law 2; not sealed if it went by another way
                self.blobs.drop(blob, BlobState.EVICTED)
                by_arena.setdefault((blob.key.device, blob.key.domain), []).append(blob.slot)
        for (device, domain), extents in by_arena.items():
            self.memories[device].give_back(domain, extents, pool=True)

    def lose(self, device: str, reason: str) -> list[Checkpoint]:
        """A device's memory is gone, with every checkpoint and open load on it. Returns the lost checkpoints.

        They leave records in `lost`, and their leases end. New loads begin in new memory.
        """
        for blob in [blob for blob in self.blobs if blob.key.device == device]:
            self.blobs.drop(blob, BlobState.EVICTED if blob.sealed else BlobState.ABORTED)
        self.memories[device].lose(reason)
        self.sharing.lose(device)
        lost = self.on_device(device)
        for checkpoint in lost:
            self._strike(checkpoint)
            checkpoint.forget_blobs()
            self.lost[checkpoint.key] = LostCheckpoint(checkpoint, reason)
            for lease in self.leases_of(checkpoint):
                self.leases.end(lease.number)
            self._on_event(CheckpointEvicted(checkpoint, "lost"))
        return lost
