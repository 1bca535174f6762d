"""The store: blobs by content, the loads that bring them, the checkpoints that keep them.

Every state of the books changes here and nowhere else. The store touches no memory: it grants extents, says where equal
bytes may lie, and queues memory that can go (see memory.py). What changed comes out as events.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightd.errors import InUseError, NotFoundError

from .arena import Extent, round_up, slot_bytes, without
from .blob import OWN_COPY_BELOW, Blob, BlobKey, BlobState
from .capacity import check_room, room
from .checkpoint import Checkpoint, CheckpointKey, Content, LoadBooks
from .eviction import least_recently_used

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from .lease import Lease, Leases
    from .memory import DeviceMemory


@dataclass(frozen=True, slots=True)
class Sealed:
    """A checkpoint became resident."""

    checkpoint: Checkpoint
    content: Content


@dataclass(frozen=True, slots=True)
class Evicted:
    """A checkpoint is no longer resident; `reason` is "capacity" or "removed"."""

    checkpoint: Checkpoint
    reason: str


Event = Sealed | Evicted


class Store:
    """Books of all devices. Times are seconds since the epoch, sizes are bytes."""

    def __init__(self, *, leases: Leases, on_event: Callable[[Event], None]) -> None:
        self.leases = leases
        self.checkpoints: dict[CheckpointKey, Checkpoint] = {}
        self.memories: dict[str, DeviceMemory] = {}
        self.collisions = 0
        self.evictions = 0
        self._on_event = on_event
        self._blobs: dict[int, Blob] = {}
        self._by_content: dict[BlobKey, list[Blob]] = {}
        self._loads: dict[int, LoadBooks] = {}
        self._last_blob = 0
        self._last_load = 0

    # -- loads -----------------------------------------------------------------------------------------------------

    def open_load(self, device: str, domain: str, owner: int | None) -> int:
        """Begin a load and return its number. Errors: NotFoundError (no such device)."""
        if device not in self.memories:
            raise NotFoundError(f"device {device!r}: this daemon serves {', '.join(self.memories)}")
        self._last_load += 1
        self._loads[self._last_load] = LoadBooks(self._last_load, device, domain, owner)
        return self._last_load

    def share_known(self, load: int, number: int) -> Blob | None:
        """Use the very blob of that number, if it is still resident where the load goes; otherwise None."""
        books, blob = self._loads[load], self._blobs.get(number)
        if blob is None or not blob.sealed:
            return None
        if (blob.key.device, blob.key.domain) != (books.device, books.domain):
            return None
        if blob.length < OWN_COPY_BELOW and number in books.used:
            return None
        self._hold(books, blob)
        books.used.add(number)
        return blob

    def admit(self, load: int, lengths: Sequence[int], files: int = 1) -> bool:
        """Whether tensors of these lengths can be copied in one pass without evicting; then their bytes are promised.

        Otherwise everything is to be hashed first. Errors: CapacityError for what no sharing can save.
        """
        books, memory = self._loads[load], self._memory(load)
        total = round_up(sum(map(slot_bytes, lengths)), memory.page) + files * memory.page  # each begins a page
        if total <= memory.obtainable(books.domain, load):
            memory.promise(load, total)
            return True
        resident = {key.length for key in self._by_content if key[:2] == (books.device, books.domain)}
        surely_new = sum(slot_bytes(length) for length in {*lengths} - resident)
        check_room(self, books, surely_new)
        return False

    def make_room(
        self, load: int, contents: Iterable[tuple[bytes, int]], files: int = 1
    ) -> set[tuple[bytes, int]] | None:
        """Protect what matches these (digest, length) pairs and evict for the rest, which is then promised.

        Returns the pairs that have a candidate, or None while memory is on its way back (call again). Nothing is
        evicted when the rest cannot fit. Errors: CapacityError.
        """
        books, memory = self._loads[load], self._memory(load)
        matched: set[tuple[bytes, int]] = set()
        needed = 0
        for (digest, length), occurrences in Counter(contents).items():
            candidates = self._candidates(books, digest, length)
            for blob in candidates:
                self._hold(books, blob)
            if candidates:
                matched.add((digest, length))
            wanted = occurrences if length < OWN_COPY_BELOW else 1
            needed += max(0, wanted - len(candidates)) * slot_bytes(length)
        if needed:
            needed = round_up(needed, memory.page) + (files - 1) * memory.page
            check_room(self, books, needed)
            while memory.obtainable(books.domain, load) < needed:
                if memory.reclaiming:
                    return None
                if not self._evict_one(books.device):
                    raise room(self, books.device, books.domain).error(needed)
            memory.promise(load, needed)
        return matched

    def grant(self, load: int, want: int, need: int) -> Extent | None:
        """Memory for a load: up to `want`, at least `need` bytes; evicts when there is no other way.

        Returns None while memory is on its way back: call again once it has arrived. Errors: CapacityError.
        """
        books, memory = self._loads[load], self._memory(load)
        while True:
            try:
                extent = memory.grant(load, books.domain, want, need)
            except MemoryError as error:
                if not self._evict_one(books.device):
                    raise room(self, books.device, books.domain).error(need) from error
                continue
            if extent is not None:
                books.granted.append(extent)
                return extent
            if memory.reclaiming:
                return None
            if not self._evict_one(books.device):
                raise room(self, books.device, books.domain).error(need)

    def settle(
        self, load: int, digest: bytes, length: int, segment: int, offset: int, differs: Collection[int] = ()
    ) -> tuple[bool, Blob]:
        """Bytes with this digest lie at (segment, offset), and differ from the blobs numbered in `differs`.

        Returns (False, candidate) when they have to be compared with another blob first, else (True, new blob).
        """
        books = self._loads[load]
        candidates = [blob for blob in self._candidates(books, digest, length) if blob.number not in differs]
        if candidates:
            candidate = min(candidates, key=lambda blob: blob.number in books.used)
            self._hold(books, candidate)
            return False, candidate
        self.collisions += bool(differs)
        key = BlobKey(books.device, books.domain, digest, length)
        return True, self._place(books, key, segment, offset, self._new_variant(books, key), set(differs))

    def candidate(self, load: int, digest: bytes, length: int) -> Blob | None:
        """A blob that bytes with this digest may equal, unused ones first; None when there is none."""
        books = self._loads[load]
        blob = min(self._candidates(books, digest, length), key=lambda b: b.number in books.used, default=None)
        if blob is not None:
            self._hold(books, blob)
        return blob

    def share(self, load: int, number: int, segment: int | None, offset: int) -> Blob | None:
        """Bytes at (segment, offset) equal those of a candidate. Returns the blob to use.

        That is the candidate itself, or a copy of its own at (segment, offset) for a small tensor whose candidate the
        load uses already; None when it needs such a copy and has no bytes in a segment (segment None).
        """
        books = self._loads[load]
        blob = books.held.get(number) or books.placed[number]
        if blob.length < OWN_COPY_BELOW and number in books.used:
            sealed = {b.number: b for b in self._candidates(books, blob.key.digest, blob.length) if b.sealed}
            known = books.known.get(number)
            if known is None:
                known = set(sealed)  # sealed itself: variants alone tell which of them are equal
            spare = next(
                (sealed[n] for n in known & sealed.keys() - books.used if sealed[n].variant == blob.variant), None
            )
            if spare is not None:
                blob = spare
                self._hold(books, blob)
            elif segment is None:
                return None
            else:
                return self._place(books, blob.key, segment, offset, blob.variant, known)
        books.used.add(blob.number)
        return blob

    def rechecks(self, load: int) -> list[tuple[Blob, Blob]]:
        """Pairs (placed blob, blob sealed meanwhile) that have to be compared before the load can be sealed."""
        books = self._loads[load]
        pairs = []
        for blob in books.placed.values():
            for other in self._by_content.get(blob.key, ()):
                if other.sealed and other.number not in books.known[blob.number]:
                    self._hold(books, other)
                    pairs.append((blob, other))
                    break
        return pairs

    def recheck(self, load: int, number: int, other: int, *, equal: bool) -> Blob:
        """The outcome of a recheck. Returns the blob to use where `number` was.

        Equal bytes are dropped for the sealed blob's, or stay as a small tensor's own copy under the same identity;
        others become a variant apart.
        """
        books = self._loads[load]
        blob, sealed = books.placed[number], books.held[other]
        known = books.known[number]
        alike = [b for n, b in books.placed.items() if books.known[n] is known]
        if other not in known:
            known.add(other)
            self.collisions += not equal
        if equal or blob.variant == sealed.variant:
            variant = sealed.variant if equal else self._new_variant(books, blob.key)
            for twin in alike:
                twin.variant = variant
        if not equal or (blob.length < OWN_COPY_BELOW and other in books.used):
            return blob
        self._drop(blob, BlobState.ABORTED)
        del books.placed[number]
        books.used.discard(number)
        books.used.add(other)
        return sealed

    def seal(self, load: int, content: Content, now: float) -> Checkpoint:
        """End a load: its blobs are sealed and the checkpoint is there. `rechecks` must be empty.

        When that content is resident already, the load's own copies are dropped and the checkpoint that is there is
        returned.
        """
        books = self._loads[load]
        key = CheckpointKey(books.device, books.domain, content.content_digest)
        existing = self.checkpoints.get(key)
        if existing is not None:
            existing.last_used = now
            self.abort(load)
            return existing
        checkpoint = Checkpoint.of(key, content, books.owner, now)
        for blob in checkpoint.unique.values():
            if blob.state is BlobState.RESERVED:
                blob.move(BlobState.SEALED)
                del books.placed[blob.number]
            blob.references += 1
        self.checkpoints[key] = checkpoint
        self._close(books, keep=[b for b in checkpoint.unique.values() if b.load == load])
        self._on_event(Sealed(checkpoint, content))
        return checkpoint

    def abort(self, load: int) -> None:
        """End a load without a checkpoint; everything it was granted goes back."""
        self._close(self._loads[load], keep=())

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def holders(self, checkpoint: Checkpoint) -> list[Lease]:
        """The leases that hold a checkpoint at this moment."""
        return self.leases.of(checkpoint.key)

    def remove(self, checkpoint: Checkpoint, called: str = "") -> int:
        """Evict a checkpoint on request. Returns the bytes of blobs given up.

        Errors: InUseError, which calls the checkpoint `called` (or by its digest) and names the holders.
        """
        holders = dict.fromkeys((lease.holder.pid, lease.holder.command) for lease in self.holders(checkpoint))
        if holders:
            who = ", ".join(f"pid {pid} ({command})" for pid, command in list(holders)[:5])
            more = f" and {len(holders) - 5} more" if len(holders) > 5 else ""
            raise InUseError(
                f"checkpoint {called or checkpoint.key.content_digest[:19]} is in use by {who}{more}; stop them first"
            )
        return self._evict(checkpoint, "removed")

    def blob(self, number: int) -> Blob:
        """The blob of that number, which must be resident."""
        return self._blobs[number]

    def blobs(self) -> list[Blob]:
        """Every sealed blob."""
        return [blob for blob in self._blobs.values() if blob.sealed]

    def live_bytes(self, device: str) -> int:
        """Bytes of sealed blobs on a device."""
        return sum(blob.length for blob in self.blobs() if blob.key.device == device)

    def in_flight_bytes(self, device: str) -> int:
        """Bytes granted to open loads on a device."""
        return sum(books.in_flight for books in self._loads.values() if books.device == device)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _memory(self, load: int) -> DeviceMemory:
        return self.memories[self._loads[load].device]

    def _candidates(self, books: LoadBooks, digest: bytes, length: int) -> list[Blob]:
        """Blobs whose bytes are complete and may equal: sealed ones, and those that the load itself has placed."""
        blobs = self._by_content.get(BlobKey(books.device, books.domain, digest, length), ())
        return [blob for blob in blobs if blob.sealed or blob.number in books.placed]

    def _hold(self, books: LoadBooks, blob: Blob) -> None:
        if blob.number not in books.held and blob.number not in books.placed:
            books.held[blob.number] = blob
            blob.holds += 1

    def _new_variant(self, books: LoadBooks, key: BlobKey) -> int:
        """A variant that no complete bytes have. Those of other open loads do not count until they are sealed.

        Otherwise the content digest of a file would depend on what else was being loaded.
        """
        return max((blob.variant for blob in self._candidates(books, key.digest, key.length)), default=-1) + 1

    def _place(
        self, books: LoadBooks, key: BlobKey, segment: int, offset: int, variant: int, known: set[int]
    ) -> Blob:  # fmt: skip
        self._last_blob += 1
        blob = Blob(self._last_blob, key, variant, segment, offset, books.number)
        self._by_content.setdefault(key, []).append(blob)
        self._blobs[blob.number] = blob
        books.placed[blob.number] = blob
        books.known[blob.number] = known
        books.used.add(blob.number)
        return blob

    def _drop(self, blob: Blob, state: BlobState) -> None:
        blob.move(state)
        del self._blobs[blob.number]
        others = self._by_content[blob.key]
        others.remove(blob)
        if not others:
            del self._by_content[blob.key]

    def _close(self, books: LoadBooks, keep: Collection[Blob]) -> None:
        for blob in books.placed.values():
            self._drop(blob, BlobState.ABORTED)
        for blob in books.held.values():
            blob.holds -= 1
        del self._loads[books.number]
        memory = self.memories[books.device]
        memory.withdraw(books.number)
        unused = without(books.granted, (blob.slot for blob in keep))
        memory.give_back(books.domain, unused, pool=False)
        self._free(blob for blob in books.held.values() if not blob.references and not blob.holds)

    def _free(self, blobs: Iterable[Blob]) -> int:
        """Give up sealed blobs that nothing refers to. Returns their bytes."""
        by_arena: dict[tuple[str, str], list[Extent]] = {}
        size = 0
        for blob in blobs:
            self._drop(blob, BlobState.EVICTED)
            by_arena.setdefault((blob.key.device, blob.key.domain), []).append(blob.slot)
            size += blob.length
        for (device, domain), extents in by_arena.items():
            self.memories[device].give_back(domain, extents, pool=True)
        return size

    def _evict(self, checkpoint: Checkpoint, reason: str) -> int:
        del self.checkpoints[checkpoint.key]
        for blob in checkpoint.unique.values():
            blob.references -= 1
        size = self._free([b for b in checkpoint.unique.values() if not b.references and not b.holds])
        self.evictions += reason == "capacity"
        self._on_event(Evicted(checkpoint, reason))
        return size

    def _evict_one(self, device: str) -> bool:
        """Evict the checkpoint that the policy names first; False when none may go."""
        there = [c for c in self.checkpoints.values() if c.key.device == device]
        for checkpoint in least_recently_used(there, lambda c: bool(self.holders(c))):
            self._evict(checkpoint, "capacity")
            return True
        return False
