"""An open load: memory granted to it, blobs that it places or relies on, and its end as a checkpoint.

A load says which bytes it has, and learns where equal bytes lie already. making_room.py evicts for it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from weightd.errors import DeviceError

from .alike import DuplicateBlobs
from .arena import round_up, slot_bytes
from .blob import OWN_COPY_BELOW, Blob, BlobKey, BlobState
from .checkpoint import Checkpoint, CheckpointKey
from .events import CheckpointSealed
from .known import KnownBlobs
from .making_room import Evictor
from .prepared import PreparedSeal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from .arena import Extent
    from .checkpoint import Content
    from .digest import BlobIdentity
    from .lease import LeasePeer
    from .store import ContentStore


AT_ONCE = 1000
"""Keys that are looked at in one step for what has to be compared again."""
ENDED_AT_ONCE = 250
"""Blobs of which an ending load lets go in one step."""


class StoreTransaction:
    """Transaction of one open load on the store, until `end`. `by` asked for it, under a name that may be empty.

    When its device loses its memory, each call but `end` raises DeviceError from then on. While the device is absent,
    what would need an eviction raises DeviceAbsentError. Sizes are bytes.
    """

    def __init__(
        self, store: ContentStore, device: str, domain: str, owner: int | None, by: LeasePeer | None = None,
        name: str = "",
    ) -> None:  # fmt: skip
        """Begin a load on a device, in a sharing domain. Errors: NotFoundError (no such device)."""
        self.number = store.begin_load(device)
        self._store = store
        self._blobs = store.blobs
        self._memory = store.memories[device]
        self._losses = self._memory.losses
        self._device = device
        self._domain = domain
        self._owner = owner
        self._by = by
        self._name = name
        self._room = Evictor(store, self.place, self.number, by)
        self._placed: dict[int, Blob] = {}
        self._held: dict[int, Blob] = {}
        self._used: set[int] = set()
        """Numbers of the blobs that its tensors have."""
        self._known = KnownBlobs(self._blobs, self.number)
        self._needed = self._largest = 0
        """Bytes of what has no match, and of the largest such tensor."""
        self._prepared: PreparedSeal | None = None

    @property
    def place(self) -> tuple[str, str]:
        """Device and sharing domain."""
        return self._device, self._domain

    # -- room ------------------------------------------------------------------------------------------------------

    def admit(self, lengths: Iterable[int] | Counter[int], runs: int = 1) -> bool:
        """Whether tensors of these lengths can be copied in one pass without evicting; then their bytes are promised.

        Otherwise everything is to be hashed first. Errors: CapacityError for what no sharing can save.
        """
        self._check()
        counted = Counter(lengths)
        total = self._memory.in_segments(sum(slot_bytes(length) * count for length, count in counted.items()), runs)
        if total <= self._memory.assured(self.number):
            self._memory.promise(self.number, self._domain, total)
            return True
        surely_new = [slot_bytes(length) for length in counted.keys() - self._blobs.lengths(*self.place)]
        self._room.check(sum(surely_new), max(surely_new, default=0))
        return False

    def match(self, contents: Iterable[tuple[tuple[bytes, int], int]]) -> set[tuple[bytes, int]]:
        """Protect what matches these (digest, length) pairs, each with how often it comes; `make_room` is for the rest.

        Returns the pairs that have a candidate. Each pair of the load is matched once, but not all in one step.
        """
        self._check()
        matched: set[tuple[bytes, int]] = set()
        for (digest, length), occurrences in contents:
            candidates = self._candidates(digest, length)
            for blob in candidates:
                self._hold(blob)
            if candidates:
                matched.add((digest, length))
            wanted = occurrences if length < OWN_COPY_BELOW else 1
            if wanted > len(candidates):
                self._needed += (wanted - len(candidates)) * slot_bytes(length)
                self._largest = max(self._largest, slot_bytes(length))
        return matched

    def make_room(self, runs: int = 1) -> bool:
        """Evict for what has no match, which is then promised.

        False while memory is on its way back: call again then. Nothing is evicted when it cannot fit. Errors:
        CapacityError.
        """
        self._check()
        memory = self._memory
        memory.withdraw(self.number)  # what was promised before anything was hashed
        if self._needed:
            needed = memory.in_segments(self._needed, runs)
            self._room.check(needed, self._largest)
            while memory.obtainable(self._domain, self.number) < needed:
                if memory.reclaiming:
                    return False
                if not self._room.evict_for(needed, self._largest):
                    raise self._room.refusal(needed)
            memory.promise(self.number, self._domain, needed)
        return True

    def grant(self, want: int, need: int, ends: Sequence[int] = ()) -> Extent | None:
        """Memory for the load: up to `want`, at least `need` bytes; evicts if that is the only way and would do.

        None while memory is on its way back: call again then. For `ends` see MemoryAccounting.grant.
        Errors: CapacityError.
        """
        self._check()
        memory, need = self._memory, round_up(need, self._memory.page)
        while True:
            full: MemoryError | None = None
            try:
                extent = memory.grant(self.number, self._domain, want, need, ends)
            except MemoryError as error:
                extent, full = None, error
            if extent is not None or memory.reclaiming:
                return extent
            if not self._room.evict_for(need, need, full):
                raise self._room.refusal(need, full) from full

    def reserve_books(self, needed: int, total_bytes: int, tensors: int) -> None:
        """Reserve `needed` bytes of the daemon's books for a content of these figures.

        What is resident needs none. As long as the content is not known, equal figures may mean that: then the load is
        checked only when it is sealed. Errors: CapacityError, the books would not fit even after every eviction.
        """
        self._check()
        if self._store.index.has_figures(self.place, total_bytes, tensors):
            self._store.books.expect(self.number, needed)
        else:
            self._store.books.reserve(self.number, needed, self._store.evictable())

    # -- tensors ---------------------------------------------------------------------------------------------------

    def resident_lengths(self) -> set[int]:
        """Lengths of the sealed blobs that the load may share."""
        self._check()
        return self._blobs.lengths(*self.place, sealed=True)

    def share_known(self, number: int, identity: BlobIdentity) -> Blob | None:
        """Use the very blob of that number and identity, if it is resident where the load goes; otherwise None."""
        self._check()
        blob = self._blobs.get(number)
        if blob is None or not blob.sealed or blob.identity != identity or blob.key[:2] != self.place:
            return None
        if blob.length < OWN_COPY_BELOW and number in self._used:
            return None
        self._hold(blob)
        self._used.add(number)
        return blob

    def share_resident(self, number: int) -> Blob | None:
        """Use the bytes of the blob of that number, if it is resident where the load goes; otherwise None.

        For a small blob that the load uses already, another of equal bytes is used. Where there is none, it is used
        again, for there is nobody to copy it: clients map it once more.
        """
        self._check()
        blob = self._blobs.get(number)
        if blob is None or not blob.sealed or blob.key[:2] != self.place:  # law 9
            return None
        self._hold(blob)
        return self.share(number, None, 0) or blob

    def candidate(self, digest: bytes, length: int) -> Blob | None:
        """A blob that bytes with this digest may equal; None when there is none."""
        self._check()
        face = next(self._known.alike(BlobKey(*self.place, digest, length)).faces(), None)
        if face is not None:
            self._hold(face)
        return face

    def settle(
        self, digest: bytes, length: int, segment: int, offset: int, differs: Collection[int] = ()
    ) -> tuple[bool, Blob]:
        """Bytes with this digest lie at (segment, offset), and differ from the blobs numbered in `differs`.

        Returns (False, candidate) when they have to be compared with another blob first, else (True, new blob).
        """
        self._check()
        key = BlobKey(*self.place, digest, length)
        if self._known.is_new(key):
            blob = self._enter(key, segment, offset, 0)
            self._known.add_alone(blob)
            return True, blob
        alike = self._known.alike(key)
        face = next((blob for blob in alike.faces() if blob.number not in differs), None)  # law 6
        if face is not None:
            self._hold(face)
            return False, face
        self._store.collisions += bool(differs)
        blob = self._place(key, segment, offset, self._new_variant(key), DuplicateBlobs(set(alike.numbers)))
        alike.add(blob)
        return True, blob

    def share(self, number: int, segment: int | None, offset: int) -> Blob | None:
        """Bytes at (segment, offset) equal those of a candidate. Returns the blob to use.

        That is the candidate itself, or a copy of its own at (segment, offset) for a small tensor whose candidate the
        load uses already; None when it needs such a copy and has no bytes in a segment (segment None).
        """
        self._check()
        blob = self._held.get(number) or self._placed[number]
        if blob.length < OWN_COPY_BELOW and number in self._used:
            alike = self._known.alike(blob.key)
            spare = alike.spare(blob.variant, self._used) if blob.sealed else None
            if spare is not None:
                blob = spare
                self._hold(blob)
            elif segment is None:
                return None
            else:
                twins = alike.twins(blob.variant) if blob.sealed else self._known.twins(blob)
                return self._place(blob.key, segment, offset, blob.variant, twins)
        self._used.add(blob.number)
        return blob

    # -- the end ---------------------------------------------------------------------------------------------------

    @property
    def rechecked(self) -> bool:
        """Whether `rechecks` has nothing to tell, and the load can be sealed in this very step."""
        return self._known.rechecked

    def rechecks(self) -> list[tuple[Blob, Blob]]:
        """Pairs (placed blob, blob sealed meanwhile) that have to be compared before the load can be sealed.

        Not all at once: it is to be called, and the outcomes are to be entered, until `rechecked`.
        """
        self._check()
        pairs = self._known.to_recheck(AT_ONCE)
        for _, sealed in pairs:
            self._hold(sealed)
        return pairs

    def recheck(self, number: int, other: int, *, equal: bool) -> dict[int, Blob]:
        """The outcome of a recheck. Returns which placed blobs, by number, give way to which sealed ones.

        Equal bytes are dropped for the sealed blobs', or stay as small tensors' own copies under the same identity;
        others become a variant apart.
        """
        self._check()
        sealed, twins = self._held[other], self._known.twins(self._placed[number])
        fresh = self._known.fresh(twins)
        if other not in twins.known:
            self._store.collisions += not equal
        # Sealed blobs agree among themselves: one comparison settles all of that variant, and equality settles all.
        twins.known.update(blob.number for blob in fresh if equal or blob.variant == sealed.variant)
        variant = twins.blobs[0].variant
        if equal or variant == sealed.variant:
            variant = sealed.variant if equal else self._new_variant(sealed.key)
            for twin in twins.blobs:
                twin.variant = variant
        if not equal:
            return {}
        free = [blob for blob in fresh if blob.variant == sealed.variant and blob.number not in self._used]
        replaced: dict[int, Blob] = {}
        for twin in twins.blobs:
            if twin.length >= OWN_COPY_BELOW:
                replaced[twin.number] = sealed
            elif free:
                replaced[twin.number] = free.pop()
        for old, new in replaced.items():
            self._hold(new)
            self._blobs.drop(self._placed.pop(old), BlobState.ABORTED)
            self._used.discard(old)
            self._used.add(new.number)
        twins.blobs = [twin for twin in twins.blobs if twin.number not in replaced]
        return replaced

    def prepare(self, content: Content) -> None:
        """Do what `seal` would do for this content and can be done before: on any thread, while the load stands still.

        For the seal is one step of the loop, and a checkpoint may have 100,000 tensors.
        """
        self._prepared = PreparedSeal.of(content, self.number, self._memory.granted(self.number))

    def seal(self, content: Content, now: float, manifest: object = None, manifest_bytes: int = 0) -> Checkpoint:
        """The load's blobs are sealed and the checkpoint is there. `rechecked` must hold; `end` is still to come.

        When that content is resident already, the checkpoint that is there is returned. Otherwise others may go for its
        books. Errors: CapacityError (they do not fit). What the listener of events raises fails the seal, too, and then
        the checkpoint is not there.
        """
        self._check()
        key = CheckpointKey(*self.place, content.content_digest)
        checkpoint = self._store.checkpoints.get(key)
        if checkpoint is None:
            checkpoint = Checkpoint.of(key, content, self._owner, now, manifest_bytes)
            self._store.books.check_seal(self.number, checkpoint.books_bytes, self._store.evictable())
            self._room.evict_for_books(checkpoint.books_bytes)
            if self._prepared is None or self._prepared.content is not content:
                self.prepare(content)
            assert self._prepared is not None
            _, fresh, lengths, rest = self._prepared
            event = CheckpointSealed(checkpoint, content, manifest, self.number, self._by, self._name)
            self._store.seal(event, fresh, lengths)
            self._memory.leave(self.number, rest)
        self._prepared = None
        self._store.books.forget(self.number)
        self._store.use(checkpoint, now)
        self._memory.expect(self.number)
        return checkpoint

    def quarantine(self) -> None:
        """Its loader does not let go of what it was granted: that stays where it is, and nobody is to wait for it."""
        self._memory.withdraw(self.number)

    def end(self) -> None:
        """The loader has nothing open any more (law 7): what was granted and not sealed goes back, and holds end."""
        for _ in self.ending():
            pass

    def ending(self) -> Iterator[None]:
        """Do what `end` does in steps, between which the loop may do other things. The last one gives memory back."""
        self._store.books.forget(self.number)
        self._prepared = None
        for blobs in (self._placed, self._held):
            while blobs:
                some = [blobs.popitem()[1] for _ in range(min(ENDED_AT_ONCE, len(blobs)))]
                for blob in some:
                    blob.holds -= 1
                    if blob.state is BlobState.RESERVED:  # else sealed, or gone with the memory of the device
                        self._blobs.drop(blob, BlobState.ABORTED)
                self._store.free(some)
                yield
        for _ in self._known.forget(ENDED_AT_ONCE):
            yield
        self._store.open_loads.remove(self.number)
        self._memory.return_grants(self.number)
        self._memory.withdraw(self.number)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Errors: DeviceError, the device has lost its memory since the load began."""
        if self._memory.losses != self._losses:
            raise DeviceError(f"device {self._device}: {self._memory.lost_by}; load it again")

    def _candidates(self, digest: bytes, length: int) -> list[Blob]:
        """Blobs whose bytes are complete and may equal: sealed ones, and those that the load itself has placed."""
        blobs = self._blobs.of(BlobKey(*self.place, digest, length))
        return [blob for blob in blobs if blob.sealed or blob.number in self._placed]

    def _hold(self, blob: Blob) -> None:
        if blob.number not in self._held and blob.number not in self._placed:
            self._held[blob.number] = blob
            blob.holds += 1

    def _new_variant(self, key: BlobKey) -> int:
        """A variant that no complete bytes have. Those of other open loads do not count until they are sealed.

        Otherwise the content digest of a file would depend on what else was being loaded.
        """
        return max((blob.variant for blob in self._candidates(key.digest, key.length)), default=-1) + 1

    def _place(self, key: BlobKey, segment: int, offset: int, variant: int, twins: DuplicateBlobs) -> Blob:
        self._known.contest(key, twins)
        blob = self._enter(key, segment, offset, variant)
        self._known.add(blob, twins)
        return blob

    def _enter(self, key: BlobKey, segment: int, offset: int, variant: int) -> Blob:
        blob = self._blobs.place(key, variant, segment, offset, self.number)
        blob.holds = 1  # by this load: it counts from the seal on
        self._placed[blob.number] = blob
        self._used.add(blob.number)
        return blob
