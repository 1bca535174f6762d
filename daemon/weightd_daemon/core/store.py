"""The store: blobs by content, the loads that bring them, the checkpoints that keep them.

Every state of the books changes here, but for adoption.py, which fills empty ones. The store touches no memory: it
grants extents, says where equal bytes may lie, and queues memory that can go (see memory.py). Events tell of changes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from weightd.errors import DeviceError, NotFoundError

from .arena import Extent, round_up, slot_bytes, without
from .blob import OWN_COPY_BELOW, Blob, BlobKey, Blobs, BlobState
from .capacity import check_room, room
from .checkpoint import Checkpoint, CheckpointKey, Content, Lost
from .events import Event, Evicted, Sealed
from .load_books import Alike, LoadBooks, Twins
from .making_room import evict_for

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from .digest import BlobIdentity
    from .lease import Holder, Lease, Leases
    from .memory import DeviceMemory


class Store:
    """Books of all devices. Times are seconds since the epoch, sizes are bytes."""

    def __init__(self, *, leases: Leases, on_event: Callable[[Event], None]) -> None:
        self.leases = leases
        self.checkpoints: dict[CheckpointKey, Checkpoint] = {}
        self.lost: dict[CheckpointKey, Lost] = {}
        self.memories: dict[str, DeviceMemory] = {}
        self.collisions = self.evictions = self.uses = 0
        self._on_event = on_event
        self._blobs = Blobs()
        self._loads: dict[int, LoadBooks] = {}
        self._last_load = 0

    # -- loads -----------------------------------------------------------------------------------------------------

    def open_load(self, device: str, domain: str, owner: int | None, by: Holder | None = None, name: str = "") -> int:
        """Begin a load and return its number. Errors: NotFoundError (no such device)."""
        if device not in self.memories:
            raise NotFoundError(f"device {device!r}: this daemon serves {', '.join(self.memories)}")
        self._last_load += 1
        self._loads[self._last_load] = LoadBooks(self._last_load, device, domain, owner, by, name)
        return self._last_load

    def share_known(self, load: int, number: int, identity: BlobIdentity) -> Blob | None:
        """Use the very blob of that number and identity, if it is resident where the load goes; otherwise None."""
        books, blob = self._open(load), self._blobs.get(number)
        if blob is None or not blob.sealed or blob.identity != identity or blob.key[:2] != books.place:
            return None
        if blob.length < OWN_COPY_BELOW and number in books.used:
            return None
        self._hold(books, blob)
        books.used.add(number)
        return blob

    def admit(self, load: int, lengths: Sequence[int], runs: int = 1) -> bool:
        """Whether tensors of these lengths can be copied in one pass without evicting; then their bytes are promised.

        Otherwise everything is to be hashed first. Errors: CapacityError for what no sharing can save.
        """
        books = self._open(load)
        memory = self.memories[books.device]
        total = memory.in_segments(sum(map(slot_bytes, lengths)), runs)
        if total <= memory.assured(load):
            memory.promise(load, books.domain, total)
            return True
        surely_new = [slot_bytes(length) for length in {*lengths} - self._blobs.lengths(*books.place)]
        check_room(self, books, sum(surely_new), max(surely_new, default=0))
        return False

    def resident_lengths(self, load: int) -> set[int]:
        """Lengths of the sealed blobs that the load may share."""
        return self._blobs.lengths(*self._open(load).place, sealed=True)

    def make_room(
        self, load: int, contents: Iterable[tuple[bytes, int]], runs: int = 1
    ) -> set[tuple[bytes, int]] | None:
        """Protect what matches these (digest, length) pairs and evict for the rest, which is then promised.

        Returns the pairs that have a candidate, or None while memory is on its way back (call again). Nothing is
        evicted when the rest cannot fit. Errors: CapacityError.
        """
        books = self._open(load)
        memory = self.memories[books.device]
        matched: set[tuple[bytes, int]] = set()
        needed = largest = 0
        for (digest, length), occurrences in Counter(contents).items():
            candidates = self._candidates(books, digest, length)
            for blob in candidates:
                self._hold(books, blob)
            if candidates:
                matched.add((digest, length))
            wanted = occurrences if length < OWN_COPY_BELOW else 1
            if wanted > len(candidates):
                needed += (wanted - len(candidates)) * slot_bytes(length)
                largest = max(largest, slot_bytes(length))
        memory.withdraw(load)  # what was promised before anything was hashed
        if needed:
            needed = memory.in_segments(needed, runs)
            check_room(self, books, needed, largest)
            while memory.obtainable(books.domain, load) < needed:
                if memory.reclaiming:
                    return None
                if not evict_for(self, books, needed, round_up(largest, memory.page)):
                    raise room(self, books).error(needed)
            memory.promise(load, books.domain, needed)
        return matched

    def grant(self, load: int, want: int, need: int, ends: Sequence[int] = ()) -> Extent | None:
        """Memory for a load: up to `want`, at least `need` bytes; evicts when there is no other way and that would do.

        None while memory is on its way back: call again then. For `ends` see DeviceMemory.grant. Errors: CapacityError.
        """
        books = self._open(load)
        memory = self.memories[books.device]
        checked = False
        while True:
            full: MemoryError | None = None
            try:
                extent = memory.grant(load, books.domain, want, need, ends)
            except MemoryError as error:
                extent, full = None, error
            if extent is not None:
                books.granted.append(extent)
                return extent
            if memory.reclaiming:
                return None
            if full is not None or not checked:
                check_room(self, books, need, need, full)
                checked = True
            if not evict_for(self, books, need, round_up(need, memory.page), full):
                raise room(self, books, full).error(need, full) from full

    def settle(
        self, load: int, digest: bytes, length: int, segment: int, offset: int, differs: Collection[int] = ()
    ) -> tuple[bool, Blob]:
        """Bytes with this digest lie at (segment, offset), and differ from the blobs numbered in `differs`.

        Returns (False, candidate) when they have to be compared with another blob first, else (True, new blob).
        """
        books = self._open(load)
        key = BlobKey(*books.place, digest, length)
        alike = self._alike(books, key)
        face = next((blob for blob in alike.faces() if blob.number not in differs), None)
        if face is not None:
            self._hold(books, face)
            return False, face
        self.collisions += bool(differs)
        twins = Twins(set(alike.numbers))
        blob = self._place(books, key, segment, offset, self._new_variant(books, key), twins)
        alike.add(blob)
        return True, blob

    def candidate(self, load: int, digest: bytes, length: int) -> Blob | None:
        """A blob that bytes with this digest may equal; None when there is none."""
        books = self._open(load)
        face = next(self._alike(books, BlobKey(*books.place, digest, length)).faces(), None)
        if face is not None:
            self._hold(books, face)
        return face

    def share(self, load: int, number: int, segment: int | None, offset: int) -> Blob | None:
        """Bytes at (segment, offset) equal those of a candidate. Returns the blob to use.

        That is the candidate itself, or a copy of its own at (segment, offset) for a small tensor whose candidate the
        load uses already; None when it needs such a copy and has no bytes in a segment (segment None).
        """
        books = self._open(load)
        blob = books.held.get(number) or books.placed[number]
        if blob.length < OWN_COPY_BELOW and number in books.used:
            alike = self._alike(books, blob.key)
            spare = alike.spare(blob.variant, books.used) if blob.sealed else None
            if spare is not None:
                blob = spare
                self._hold(books, blob)
            elif segment is None:
                return None
            else:
                twins = alike.twins(blob.variant) if blob.sealed else books.twins[number]
                return self._place(books, blob.key, segment, offset, blob.variant, twins)
        books.used.add(blob.number)
        return blob

    def rechecks(self, load: int) -> list[tuple[Blob, Blob]]:
        """Pairs (placed blob, blob sealed meanwhile) that have to be compared before the load can be sealed."""
        books = self._open(load)
        pairs = []
        for twins in {id(twins): twins for twins in books.twins.values()}.values():
            if twins.blobs and (fresh := self._fresh(twins)):
                self._hold(books, fresh[0])
                pairs.append((twins.blobs[0], fresh[0]))
        return pairs

    def recheck(self, load: int, number: int, other: int, *, equal: bool) -> dict[int, Blob]:
        """The outcome of a recheck. Returns which placed blobs, by number, give way to which sealed ones.

        Equal bytes are dropped for the sealed blobs', or stay as small tensors' own copies under the same identity;
        others become a variant apart.
        """
        books = self._open(load)
        sealed, twins = books.held[other], books.twins[number]
        fresh = self._fresh(twins)
        if other not in twins.known:
            self.collisions += not equal
        # Sealed blobs agree among themselves: one comparison settles all of that variant, and equality settles all.
        twins.known.update(blob.number for blob in fresh if equal or blob.variant == sealed.variant)
        variant = twins.blobs[0].variant
        if equal or variant == sealed.variant:
            variant = sealed.variant if equal else self._new_variant(books, sealed.key)
            for twin in twins.blobs:
                twin.variant = variant
        if not equal:
            return {}
        free = [blob for blob in fresh if blob.variant == sealed.variant and blob.number not in books.used]
        replaced: dict[int, Blob] = {}
        for twin in twins.blobs:
            if twin.length >= OWN_COPY_BELOW:
                replaced[twin.number] = sealed
            elif free:
                replaced[twin.number] = free.pop()
        for old, new in replaced.items():
            self._hold(books, new)
            self._blobs.drop(books.placed.pop(old), BlobState.ABORTED)
            books.used.discard(old)
            books.used.add(new.number)
        twins.blobs = [twin for twin in twins.blobs if twin.number not in replaced]
        return replaced

    def seal(self, load: int, content: Content, now: float, manifest: object = None) -> Checkpoint:
        """A load's blobs are sealed and the checkpoint is there. `rechecks` must be empty; `end_load` is still to come.

        When that content is resident already, the checkpoint that is there is returned. What the listener of events
        raises fails the seal, and nothing has changed.
        """
        books = self._open(load)
        memory = self.memories[books.device]
        key = CheckpointKey(*books.place, content.content_digest)
        if existing := self.checkpoints.get(key):
            self.use(existing, now)
            memory.expect(load)
            return existing
        checkpoint = Checkpoint.of(key, content, books.owner, now)
        self._on_event(Sealed(checkpoint, content, manifest, load, books.by, books.name))
        own: list[Extent] = []
        for blob in checkpoint.unique.values():
            blob.references += 1
            if blob.state is BlobState.RESERVED:
                self._blobs.seal(blob)
                del books.placed[blob.number]
                self._hold(books, blob)
                own.append(blob.slot)
        books.granted = without(books.granted, own)
        self.checkpoints[key] = checkpoint
        self.use(checkpoint, now)
        self.lost.pop(key, None)
        memory.expect(load)
        return checkpoint

    def end_load(self, load: int) -> None:
        """The loader has nothing open any more: what was granted and not sealed goes back, and holds end."""
        books = self._loads.pop(load)
        for blob in books.placed.values():
            self._blobs.drop(blob, BlobState.ABORTED)
        for blob in books.held.values():
            blob.holds -= 1
        memory = self.memories[books.device]
        memory.give_back(books.domain, books.granted, pool=False)
        self._free(blob for blob in books.held.values() if not blob.references and not blob.holds)
        memory.withdraw(load)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def holders(self, checkpoint: Checkpoint) -> list[Lease]:
        """The leases that hold a checkpoint at this moment."""
        return self.leases.of(checkpoint.key)

    def use(self, checkpoint: Checkpoint, now: float) -> None:
        """A checkpoint is attached, or loaded again: it gets the next number. `now` is for people only."""
        self.uses += 1
        checkpoint.used, checkpoint.last_used = self.uses, now

    def remove(
        self, checkpoint: Checkpoint, called: str = "", reason: str = "removed", by: Holder | None = None
    ) -> int:
        """Evict a checkpoint on request. Returns the bytes of blobs that no other needs; some go when a load ends.

        Errors: InUseError, which calls the checkpoint `called` (or by its digest) and names the holders.
        """
        if self.leases.is_held(checkpoint.key) and (holders := self.holders(checkpoint)):
            raise checkpoint.in_use(holders, called)
        return self.evict(checkpoint, reason, by=by)

    def evict(self, checkpoint: Checkpoint, reason: str, load: int = 0, by: Holder | None = None) -> int:
        """A checkpoint goes, whoever holds it, perhaps to make room for a load. Returns as `remove` does."""
        del self.checkpoints[checkpoint.key]
        for blob in checkpoint.unique.values():
            blob.references -= 1
        unused = [blob for blob in checkpoint.unique.values() if not blob.references]
        self._free(blob for blob in unused if not blob.holds)
        self.evictions += reason == "capacity"
        self._on_event(Evicted(checkpoint, reason, load, by))
        return sum(blob.length for blob in unused)

    def lose(self, device: str, reason: str) -> list[Checkpoint]:
        """A device's memory is gone, with every checkpoint and open load on it. Returns the lost checkpoints.

        They leave records in `lost`, and their leases end. From now on each call on such a load but `end_load` raises
        DeviceError; new loads begin in new memory.
        """
        for number, books in self._loads.items():
            if books.device == device:
                self._loads[number] = LoadBooks(number, device, books.domain, books.owner, lost=reason)
        for blob in [blob for blob in self._blobs if blob.key.device == device]:
            self._blobs.drop(blob, BlobState.EVICTED if blob.sealed else BlobState.ABORTED)
        self.memories[device].lose()
        lost = [c for c in self.checkpoints.values() if c.key.device == device]
        for checkpoint in lost:
            del self.checkpoints[checkpoint.key]
            checkpoint.forget_blobs()
            self.lost[checkpoint.key] = Lost(checkpoint, reason)
            for lease in self.holders(checkpoint):
                self.leases.end(lease.number)
            self._on_event(Evicted(checkpoint, "lost"))
        return lost

    def blobs(self) -> list[Blob]:
        """Every sealed blob."""
        return [blob for blob in self._blobs if blob.sealed]

    def live_bytes(self, device: str) -> int:
        """Bytes of sealed blobs on a device."""
        return self._blobs.sealed_bytes(device)

    def in_flight_bytes(self, device: str) -> int:
        """Bytes granted to open loads on a device."""
        return sum(books.in_flight for books in self._loads.values() if books.device == device)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _open(self, load: int) -> LoadBooks:
        books = self._loads[load]
        if books.lost:
            raise DeviceError(f"device {books.device}: {books.lost}; load it again")
        return books

    def _candidates(self, books: LoadBooks, digest: bytes, length: int) -> list[Blob]:
        """Blobs whose bytes are complete and may equal: sealed ones, and those that the load itself has placed."""
        blobs = self._blobs.of(BlobKey(*books.place, digest, length))
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

    def _alike(self, books: LoadBooks, key: BlobKey) -> Alike:
        """What the load knows of a key: begun when it first meets it, with the blobs that are sealed by then."""
        if key not in books.alike:
            books.alike[key] = Alike(blob for blob in self._blobs.of(key) if blob.sealed)
        return books.alike[key]

    def _fresh(self, twins: Twins) -> list[Blob]:
        """Sealed blobs that these placed ones have not been compared with."""
        there = self._blobs.of(twins.blobs[0].key)
        return [blob for blob in there if blob.sealed and blob.number not in twins.known]

    def _place(self, books: LoadBooks, key: BlobKey, segment: int, offset: int, variant: int, twins: Twins) -> Blob:
        blob = self._blobs.place(key, variant, segment, offset, books.number)
        books.placed[blob.number] = blob
        books.twins[blob.number] = twins
        twins.blobs.append(blob)
        books.used.add(blob.number)
        return blob

    def _free(self, blobs: Iterable[Blob]) -> None:
        """Give up sealed blobs that nothing refers to."""
        by_arena: dict[tuple[str, str], list[Extent]] = {}
        for blob in blobs:
            self._blobs.drop(blob, BlobState.EVICTED)
            by_arena.setdefault((blob.key.device, blob.key.domain), []).append(blob.slot)
        for (device, domain), extents in by_arena.items():
            self.memories[device].give_back(domain, extents, pool=True)
