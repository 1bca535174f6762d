"""The store as a state machine: loads that interleave in every order, over memory that really holds bytes.

The loader's side is played step by step with the same calls as loader/copying.py, but a digest is just the first byte,
so that different bytes collide all the time; memory is a few pages, so that everything is always being evicted.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from support.sealed import sealed_blobs
from weightd.errors import CapacityError, DeviceError, InUseError
from weightd_daemon.core import loading as loading_module
from weightd_daemon.core import memory as memory_module
from weightd_daemon.core import store as store_module
from weightd_daemon.core.adoption import BlobPlace, CheckpointDescription, StoreAdoption, number_uses
from weightd_daemon.core.arena import Extent, round_up, slot_bytes, without
from weightd_daemon.core.blob import Blob
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey, Content
from weightd_daemon.core.creations import Creation
from weightd_daemon.core.events import CheckpointEvicted, CheckpointSealed, Event
from weightd_daemon.core.lease import NOBODY, Lease, LeasePeer, LeaseTable
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor, content_digest
from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.reclaims import ExtentReclaim, Reclaim
from weightd_daemon.core.store import ContentStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PAGE = 1024
SMALL = 600  # stands for OWN_COPY_BELOW
POOL = 4 * PAGE
DEVICE = "host"
DOMAINS = ("all", "uid:7")
LOADS = 3
LENGTHS = (1, 300, 1500)
FILES = (ContentFile("", "f", None),)


def weak_digest(data: bytes) -> bytes:
    """As long as a real one, and as good as none."""
    return data[:1] * 16


def tensor_bytes(length: int, first: int, rest: int) -> bytes:
    return bytes([first]) + bytes([rest]) * (length - 1)


T = TypeVar("T")
PICK = st.integers(0, 59)
CONTENTS = st.lists(st.tuples(st.sampled_from(LENGTHS), st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=4)
STEPS = st.sampled_from([1, 2, 4, 8, 40])
SEED = st.integers(0, 1 << 16)


def one_of(things: Sequence[T], pick: int) -> T | None:
    """The one that the number picks; None of none."""
    return things[pick % len(things)] if things else None


@dataclass
class Work:
    """One tensor on its way: what the loader knows of it."""

    data: bytes
    matched: bool = False
    slot: tuple[int, int] | None = None
    differs: set[int] = field(default_factory=set)
    candidate: Blob | None = None
    blob: Blob | None = None

    @property
    def digest(self) -> bytes:
        return weak_digest(self.data)


@dataclass
class Load:
    """An open load; `ready` once everything was rechecked, as after the digest has been computed in a thread.

    `opened` are the segments that its loader has open until the load has ended.
    """

    loading: StoreTransaction
    domain: str
    tensors: list[Work]
    hash_first: bool = False
    matched: set[tuple[bytes, int]] | None = None
    ending: Iterator[None] | None = None
    granted: list[Extent] = field(default_factory=list)
    asked: tuple[int, int] | None = None
    """What it asked for and has to ask for again: a segment is being made, or others give memory back."""
    open_slots: list[tuple[int, int, int]] = field(default_factory=list)
    opened: set[int] = field(default_factory=set)
    pairs: list[tuple[Blob, Blob]] = field(default_factory=list)
    ready: bool = False
    lost: bool = False

    @property
    def unsettled(self) -> list[Work]:
        return [tensor for tensor in self.tensors if tensor.blob is None]


class Mapped(NamedTuple):
    """A blob as a client sees it: its segment, which a mapping keeps whoever releases it, and what it read there."""

    segment: bytearray
    data: bytes


class StoreMachine(RuleBasedStateMachine):
    """Every call of a store, in any order that loaders, clients and owners may bring about."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(memory_module, "SEGMENT_BYTES", 8 * PAGE)
        self.patch.setattr(memory_module, "_SMALLEST_PIECE", 2 * PAGE)
        self.patch.setattr(loading_module, "OWN_COPY_BELOW", SMALL)
        self.patch.setattr(loading_module, "AT_ONCE", 1)
        self.patch.setattr(store_module, "FREED_AT_ONCE", 1)
        self.patch.setattr(store_module, "FREED_IN_A_STEP", 1)
        self.segments: dict[int, bytearray] = {}
        self.loads: list[Load] = []
        self.sealed_loads: list[Load] = []
        self.pending: list[Reclaim] = []
        self.locked: set[int] = set()
        self.attached: dict[int, dict[tuple[int, int], Mapped]] = {}
        self.sources: dict[CheckpointKey, tuple[bytes, ...]] = {}
        self.contents: dict[CheckpointKey, Content] = {}
        self.sealed: dict[int, bytes] = {}
        self.seen: dict[tuple[str, bytes, int], set[bytes]] = {}
        self.stale: list[Reclaim | Creation] = []
        self.gone: set[CheckpointKey] = set()
        self.most: int | None = None
        self.seen_free: int | None = None
        self.late = False
        self.creating: list[Creation] = []
        self.untaken: dict[int, Extent] = {}
        self.now = 0.0
        self.created = 0

    @initialize(
        pages=st.sampled_from([6, 12, 30]), sparse=st.booleans(), pool=st.sampled_from([0, POOL]),
        files=st.lists(CONTENTS, min_size=1, max_size=2),
    )  # fmt: skip
    def begin(self, pages: int, sparse: bool, pool: int, files: list[list[tuple[int, int, int]]]) -> None:
        self.sparse = sparse
        self.pool = pool
        self.pages = pages
        self.begin_books(0)
        for contents in (*files, files[0]):
            self.begin_load(DOMAINS[0], contents)

    def begin_books(self, last_lease: int) -> None:
        self.memory = MemoryAccounting(
            budget=self.pages * PAGE, page=PAGE, sparse=self.sparse, pool_limit=self.pool,
            create=self.create, available=lambda: self.seen_free,
        )  # fmt: skip
        self.store = ContentStore(leases=LeaseTable(lambda lease: lease.number in self.locked), on_event=self.happened)
        self.store.leases.number_above(last_lease)
        self.store.memories[DEVICE] = self.memory

    # -- the device ------------------------------------------------------------------------------------------------

    def create(self, creation: Creation) -> None:
        assert self.memory.used <= self.memory.budget
        self.creating.append(creation)
        if not self.late:
            self.answer(creation)

    def answer(self, creation: Creation) -> None:
        """The device makes a segment, or says that it is full, and sees what it has free."""
        self.creating.remove(creation)
        self.seen_free = self.most
        if self.most is not None and creation.size > self.most:
            self.memory.failed(creation, MemoryError("it is full"))
            return
        self.created += 1
        self.segments[self.created] = bytearray(creation.size)
        if creation.wanted:
            self.untaken[creation.load] = Extent(self.created, 0, creation.size)
        assert self.memory.made(creation, self.created)

    @rule(late=st.booleans())
    def the_driver_hangs_or_not(self, late: bool) -> None:
        """Segments are made later, or in the step that asks for them."""
        self.late = late

    @rule(pick=PICK)
    def the_driver_answers(self, pick: int) -> None:
        creation = one_of(self.creating, pick)
        if creation is not None:
            self.answer(creation)

    def read(self, segment: int, offset: int, length: int) -> bytes:
        return bytes(self.segments[segment][offset : offset + length])

    def read_blob(self, blob: Blob) -> bytes:
        return self.read(blob.segment, blob.offset, blob.length)

    @rule(pick=PICK)
    def reclaim(self, pick: int) -> None:
        reclaim = one_of(self.pending, pick)
        if reclaim is not None:
            self.pending.remove(reclaim)
            self.carry_out(reclaim)

    def carry_out(self, reclaim: Reclaim) -> None:
        if isinstance(reclaim, ExtentReclaim):
            extent = reclaim.extent
            assert extent.offset % PAGE == 0
            assert extent.length % PAGE == 0
            self.segments[extent.segment][extent.offset : extent.end] = b"\xee" * extent.length
        else:
            # Nor may it go under a lease that this daemon knows: not every device keeps what is mapped.
            known = (lease.number for lease in self.store.leases if lease.number in self.locked)
            assert all(segment != reclaim.segment for number in known for segment, _ in self.attached[number])
            del self.segments[reclaim.segment]
        self.memory.reclaimed(reclaim)

    @rule(most=st.none() | st.integers(0, 3))
    def the_device_fills_up_or_not(self, most: int | None) -> None:
        """Others use the device: it has no room for larger segments than this many pages."""
        self.most = None if most is None else most * PAGE

    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        """The memory is gone, with what was being returned; that may be reported all the same."""
        if pick % 6:
            return
        there = set(self.store.checkpoints.values())
        assert set(self.store.lose(DEVICE, "it fell off the bus")) == there
        assert self.memory.next_reclaims() == []
        self.gone |= {checkpoint.key for checkpoint in there}
        self.stale += [*self.pending, *self.creating]
        for load in (*self.loads, *self.sealed_loads):
            load.lost = True
        for what in (self.pending, self.creating, self.untaken, self.segments, self.locked, self.attached):
            what.clear()

    @rule(pick=PICK)
    def report_late(self, pick: int) -> None:
        stale = one_of(self.stale, pick)
        if stale is None:
            return
        self.stale.remove(stale)
        if not isinstance(stale, Creation):
            self.memory.reclaimed(stale)
        elif pick % 2:
            self.created += 1
            assert not self.memory.made(stale, self.created), "nobody has it but who made it"
        else:
            self.memory.failed(stale, MemoryError("it is full"))

    # -- what the loader does --------------------------------------------------------------------------------------

    @rule(domain=st.sampled_from((DOMAINS[0], *DOMAINS)), contents=CONTENTS)
    def open_load(self, domain: str, contents: list[tuple[int, int, int]]) -> None:
        self.begin_load(domain, contents)

    def begin_load(self, domain: str, contents: list[tuple[int, int, int]]) -> None:
        if len(self.loads) == LOADS:
            return
        loading = StoreTransaction(self.store, DEVICE, domain, 0)
        load = Load(loading, domain, [Work(tensor_bytes(*content)) for content in contents])
        for tensor in load.tensors:
            self.seen.setdefault((domain, tensor.digest, len(tensor.data)), set()).add(tensor.data)
        self.loads.append(load)
        try:
            load.hash_first = not loading.admit([len(tensor.data) for tensor in load.tensors])
        except CapacityError as error:
            self.refused(load, error)

    @rule(pick=PICK)
    def load_at_the_same_time(self, pick: int) -> None:
        """Another owner loads a file that is being loaded."""
        first = one_of(self.loads, pick)
        if first is None:
            return
        contents = [(len(t.data), t.data[0], t.data[-1] if len(t.data) > 1 else 0) for t in first.tensors]
        self.begin_load(first.domain, contents)

    @rule(pick=PICK, indexed=st.booleans())
    def load_again(self, pick: int, indexed: bool) -> None:
        """The same file once more, with the digest index or without."""
        key = one_of(sorted(self.contents), pick)
        if key is None or len(self.loads) == LOADS:
            return
        loading = StoreTransaction(self.store, DEVICE, key.domain, 1)
        load = Load(loading, key.domain, [Work(tensor) for tensor in self.sources[key]])
        self.loads.append(load)
        if indexed:
            for tensor, blob in zip(load.tensors, self.contents[key].blobs, strict=True):
                assert blob is not None
                tensor.blob = loading.share_known(blob.number, blob.identity)
        try:
            load.hash_first = not loading.admit([len(tensor.data) for tensor in load.unsettled])
        except CapacityError as error:
            self.refused(load, error)

    def refused(self, load: Load, error: CapacityError) -> None:
        """Only where evicting all that may go would not have helped; and with the right figures."""
        assert not self.memory.reclaiming, "it should have waited"
        total, spare, hole = self.attainable(load)
        largest = max(spare, hole)
        alone = all(other.lost for other in self.loads if other is not load)  # else there may be promises
        if "it is full" in str(error):
            assert self.seen_free is not None
            assert int(error.metadata["device_free_bytes"]) == self.seen_free
            left = any(not self.held(c) and not c.pinned for c in self.store.checkpoints.values())
            returned = spare - (self.memory.budget - self.memory.used)
            bounded = max(hole, min(spare, self.seen_free + returned))
            assert not left or not alone or error.requested_bytes > bounded, "evicting might have helped"
        elif alone:
            assert error.free_bytes + error.evictable_bytes == total
            assert int(error.metadata["largest_bytes"]) == largest
            pieces = {round_up(slot_bytes(len(tensor.data)), PAGE) for tensor in load.tensors}
            piece = error.requested_bytes in pieces and error.requested_bytes > largest
            assert piece or error.requested_bytes > total
            assert ("in pieces" in str(error)) == (largest < error.requested_bytes <= total)
        self.abort(load)

    def attainable(self, load: Load) -> tuple[int, int, int]:
        """What a load could get after evicting all that may go: all, in one new segment, and in one hole."""
        kept = [c for c in self.store.checkpoints.values() if self.held(c) or c.pinned]
        taken = [b.slot for b in sealed_blobs(self.store) if b.holds or any(b.number in c.unique for c in kept)]
        taken += [extent for other in self.loads if not other.lost for extent in other.granted]
        taken += self.untaken.values()
        common, own, longest = self.memory.budget, 0, 0
        for segment, data in self.segments.items():
            pages = {p for e in taken if e.segment == segment for p in range(e.offset // PAGE, -(-e.end // PAGE))}
            if pages and self.memory.is_frozen(segment):
                common -= self.populated(segment)
                continue
            if self.sparse or not pages:
                common -= len(pages) * PAGE
                continue
            common -= len(data)
            run = 0
            for page in range(len(data) // PAGE):
                run = 0 if page in pages else run + PAGE
                if self.memory.domain_of(segment) == load.domain:
                    own += PAGE * (page not in pages)
                    longest = max(longest, run)
        return common + own, common, longest

    def abort(self, load: Load) -> None:
        load.loading.end()
        self.loads.remove(load)
        self.ended(load)

    def ended(self, load: Load) -> None:
        self.untaken.pop(load.loading.number, None)
        assert not any(creation.wanted for creation in self.creating if creation.load == load.loading.number)

    @rule(pick=PICK, steps=STEPS)
    def end_one(self, pick: int, steps: int) -> None:
        """A loader has put down what it had open for a load that was sealed: that ends in steps."""
        load = one_of(self.sealed_loads, pick)
        if load is None:
            return
        load.opened.clear()
        load.ending = load.ending or load.loading.ending()
        if any(next(load.ending, self) is self for _ in range(steps)):
            self.sealed_loads.remove(load)
            self.ended(load)

    @rule()
    def free_some(self) -> None:
        """What a checkpoint leaves is freed in steps, between which others may use it again."""
        self.memory.freeing.go_on()

    @rule(pick=PICK)
    def abort_one(self, pick: int) -> None:
        load = one_of(self.loads, pick)
        if load is not None and pick < 40:
            self.abort(load)

    @rule(pick=PICK, seed=SEED, steps=STEPS)
    def work(self, pick: int, seed: int, steps: int) -> None:
        self.get_on(pick, seed, steps)

    # Hypothesis leaves rules out at random; two of them make it likely that loads get on.
    @rule(pick=PICK, seed=SEED, steps=STEPS)
    def work_more(self, pick: int, seed: int, steps: int) -> None:
        self.get_on(pick, seed, steps)

    @rule(pick=PICK, seed=SEED, contents=CONTENTS)
    def load_at_once(self, pick: int, seed: int, contents: list[tuple[int, int, int]]) -> None:
        self.begin_load(DOMAINS[0], contents)
        self.get_on(len(self.loads) - 1, seed, 60)
        if pick < 30:
            while self.sealed_loads:
                self.end_one(pick, 40)
            self.pending += self.memory.next_reclaims()
            while self.pending or self.creating:
                self.reclaim(pick)
                self.the_driver_answers(pick)
                self.free_some()
                self.pending += self.memory.next_reclaims()
            self.get_on(len(self.loads) - 1, seed, 60)

    def get_on(self, pick: int, seed: int, steps: int) -> None:
        """A loader gets on; which of its tensors its threads take up next is a matter of chance."""
        load = one_of(self.loads, pick)
        if load is None:
            return
        chance = random.Random(seed)
        for _ in range(steps):
            if load not in self.loads:
                return
            if load.lost:
                self.every_call_fails(load)
                return
            try:
                self.step(load, chance)
            except CapacityError as error:
                self.refused(load, error)

    def every_call_fails(self, load: Load) -> None:
        calls: list[Callable[[StoreTransaction], object]] = [
            lambda loading: loading.admit([1]),
            lambda loading: loading.match([]),
            lambda loading: loading.make_room(),
            lambda loading: loading.grant(1, 1),
            lambda loading: loading.candidate(bytes(16), 1),
            lambda loading: loading.settle(bytes(16), 1, 1, 0),
            lambda loading: loading.rechecks(),
        ]
        for call in calls:
            with pytest.raises(DeviceError, match="fell off the bus; load it again"):
                call(load.loading)
        self.abort(load)

    def step(self, load: Load, chance: random.Random) -> None:
        if load.hash_first:
            if load.matched is None:
                contents = Counter((tensor.digest, len(tensor.data)) for tensor in load.unsettled)
                load.matched = load.loading.match(contents.items())
            if not load.loading.make_room():
                self.must_wait()
                return
            load.hash_first = False
            for tensor in load.unsettled:
                tensor.matched = (tensor.digest, len(tensor.data)) in load.matched
        elif load.unsettled:
            self.advance(load, chance.choice(load.unsettled))
        else:
            self.finish(load)

    def advance(self, load: Load, tensor: Work) -> None:
        if tensor.matched:
            tensor.matched = False
            blob = load.loading.candidate(tensor.digest, len(tensor.data))
            load.opened |= {blob.segment} if blob is not None else set()
            if blob is not None and self.read_blob(blob) == tensor.data:
                tensor.blob = load.loading.share(blob.number, None, 0)
        elif tensor.slot is None:
            tensor.slot = self.slot(load, len(tensor.data))
            if tensor.slot is not None:
                segment, offset = tensor.slot
                self.segments[segment][offset : offset + len(tensor.data)] = tensor.data
        elif tensor.candidate is None:
            segment, offset = tensor.slot
            placed, blob = load.loading.settle(
                tensor.digest, len(tensor.data), segment, offset, frozenset(tensor.differs)
            )
            if placed:
                tensor.blob = blob
            else:
                tensor.candidate = blob
                load.opened.add(blob.segment)
        else:
            segment, offset = tensor.slot
            if self.read_blob(tensor.candidate) == tensor.data:
                tensor.blob = load.loading.share(tensor.candidate.number, segment, offset)
                if (tensor.blob.segment, tensor.blob.offset) != tensor.slot:
                    self.segments[segment][offset : offset + len(tensor.data)] = b"\xdd" * len(tensor.data)
                    load.open_slots.append((segment, offset, slot_bytes(len(tensor.data))))
            else:
                tensor.differs.add(tensor.candidate.number)
            tensor.candidate = None

    def slot(self, load: Load, length: int) -> tuple[int, int] | None:
        size = slot_bytes(length)
        for at, (segment, offset, room) in enumerate(load.open_slots):
            if room >= size:
                load.open_slots[at] = (segment, offset + size, room - size)
                return segment, offset
        rest = sum(slot_bytes(len(tensor.data)) for tensor in load.unsettled if tensor.slot is None)
        want, need = load.asked = load.asked or (max(size, rest), size)
        extent = load.loading.grant(want, need)
        if extent is None:
            self.must_wait()
            return None
        load.asked = None
        if extent == self.untaken.get(load.loading.number):
            del self.untaken[load.loading.number]
        load.granted.append(extent)
        load.opened.add(extent.segment)
        self.segments[extent.segment][extent.offset : extent.end] = b"\xcc" * extent.length
        load.open_slots.append(extent)
        return self.slot(load, length)

    def must_wait(self) -> None:
        """ "Call again" is said only where memory is on its way."""
        self.pending += self.memory.next_reclaims()
        assert self.pending or self.creating or self.sealed_loads or self.memory.freeing

    def finish(self, load: Load) -> None:
        if load.pairs:
            for blob, other in load.pairs:
                equal = self.read_blob(blob) == self.read_blob(other)
                replaced = load.loading.recheck(blob.number, other.number, equal=equal)
                for tensor in load.tensors:
                    if tensor.blob is not None:
                        tensor.blob = replaced.get(tensor.blob.number, tensor.blob)
            load.pairs = []
            return
        load.pairs = load.loading.rechecks()
        load.opened |= {blob.segment for pair in load.pairs for blob in pair}
        if load.pairs:
            load.ready = False
        elif load.ready and load.loading.rechecked:
            self.seal(load)
        else:
            load.ready = True

    def seal(self, load: Load) -> None:
        blobs = [tensor.blob for tensor in load.tensors]
        names = [ContentTensor("", f"t{at}", "U8", (len(t.data),), 0, len(t.data)) for at, t in enumerate(load.tensors)]
        digest = content_digest(names, [blob.identity for blob in blobs if blob is not None], FILES)
        self.now += 1
        self.current = tuple(tensor.data for tensor in load.tensors)
        self.loads.remove(load)
        checkpoint = load.loading.seal(Content(digest, FILES, tuple(names), tuple(blobs)), self.now)
        own = [blob.slot for blob in checkpoint.unique.values() if blob.load == load.loading.number]
        load.granted = without(load.granted, own)
        self.sealed_loads.append(load)
        assert self.sources[checkpoint.key] == self.current, "a content digest stands for other bytes"

    def happened(self, event: Event) -> None:
        checkpoint = event.checkpoint
        if isinstance(event, CheckpointSealed):
            self.sources[checkpoint.key] = self.current
            self.contents[checkpoint.key] = event.content
            self.gone.discard(checkpoint.key)
            return
        assert isinstance(event, CheckpointEvicted)
        assert not self.held(checkpoint)
        assert event.reason != "capacity" or not checkpoint.pinned
        del self.sources[checkpoint.key], self.contents[checkpoint.key]

    # -- clients and owners ----------------------------------------------------------------------------------------

    def held(self, checkpoint: Checkpoint) -> list[Lease]:
        return [
            lease for lease in self.store.leases if lease.checkpoint == checkpoint.key and lease.number in self.locked
        ]

    @rule(pick=PICK)
    def attach(self, pick: int) -> None:
        checkpoint = one_of(sorted(self.store.checkpoints.values(), key=lambda c: c.key), pick)
        if checkpoint is None:
            return
        lease = self.store.leases.begin(checkpoint.key, LeasePeer(1, 2, 3, "python"), self.now)
        self.locked.add(lease.number)
        self.now += 1
        self.store.use(checkpoint, self.now)
        blobs = checkpoint.unique.values()
        self.attached[lease.number] = {
            (blob.segment, blob.offset): Mapped(self.segments[blob.segment], self.read_blob(blob)) for blob in blobs
        }

    @rule(pick=PICK)
    def let_go(self, pick: int) -> None:
        number = one_of(sorted(self.locked), pick)
        if number is not None:
            self.locked.remove(number)
            del self.attached[number]

    @rule(pick=PICK)
    def pin_or_unpin(self, pick: int) -> None:
        checkpoint = one_of(sorted(self.store.checkpoints.values(), key=lambda c: c.key), pick)
        if checkpoint is None:
            return
        (self.store.index.unpin if checkpoint.pinned else self.store.index.pin)(checkpoint, 1000)

    @rule(pick=PICK)
    def remove(self, pick: int) -> None:
        checkpoint = one_of(sorted(self.store.checkpoints.values(), key=lambda c: c.key), pick)
        if checkpoint is None:
            return
        if self.held(checkpoint):
            with pytest.raises(InUseError, match=r"pid (2|unknown)"):
                self.store.remove(checkpoint)
            assert self.store.checkpoints[checkpoint.key] is checkpoint
        else:
            self.store.remove(checkpoint)
            assert checkpoint.key not in self.store.checkpoints

    # -- the next daemon -------------------------------------------------------------------------------------------

    @rule(pick=PICK, kept=SEED)
    def restart(self, pick: int, kept: int) -> None:
        """The daemon is killed; the next one takes up what was kept. Loads end, locks live, and so do their bytes.

        What was not kept is gone from the books, but those who hold it read on.
        """
        if pick % 4:
            return
        chance, before, arenas = random.Random(kept), self.store, self.memory
        old = list(before.checkpoints.values())
        chosen = [c for c in old if chance.random() < 0.8]
        others = {segment for c in old if c not in chosen for segment in c.segments}
        frozen = others | {segment for segment in self.segments if self.is_frozen(segment)}
        for what in (self.loads, self.sealed_loads, self.pending, self.stale, self.creating, self.untaken):
            what.clear()
        self.gone.clear()
        self.begin_books(max((lease.number for lease in before.leases), default=0))
        adoption = StoreAdoption(self.store, {number: len(data) for number, data in self.segments.items()})
        domains: dict[int, str] = {}
        for checkpoint in chosen:
            key, content = checkpoint.key, self.contents[checkpoint.key]
            blobs = [blob for blob in content.blobs if blob is not None]
            places = [BlobPlace(blob.segment, blob.offset) for blob in blobs]
            described = CheckpointDescription(content.files, content.entries, [blob.identity for blob in blobs], places)
            new = adoption.add(key, described, checkpoint.owner, checkpoint.loaded)
            new.segments, new.last_used, new.pins = checkpoint.segments, checkpoint.last_used, checkpoint.pins
            self.contents[key] = replace(content, blobs=tuple(adoption._blobs[place] for place in places))
            domains |= dict.fromkeys(new.segments, key.domain)
            with pytest.raises(ValueError, match="twice"):
                adoption.add(key, described, 0, 0.0)
        number_uses(self.store, {c.key: (c.used, c.last_used) for c in chosen})
        order = sorted(self.store.checkpoints.values(), key=lambda c: c.used)
        assert [c.key for c in order] == [c.key for c in sorted(chosen, key=lambda c: c.used)]
        for checkpoint in old:
            if checkpoint not in chosen:
                del self.sources[checkpoint.key], self.contents[checkpoint.key]
        for number in [number for number in self.segments if number not in domains]:
            del self.segments[number]
        for number, domain in domains.items():
            taken, data = adoption.taken[number], self.segments[number]
            hollow = list(arenas.arena(domain)._segments[number].sparse)
            self.memory.adopt(domain, number, len(data), taken, hollow, frozen=number in frozen)
        assert self.memory.used <= arenas.used
        for lease in before.leases:
            if lease.number in self.locked and lease.checkpoint in self.store.checkpoints:
                self.store.leases.inherit(lease.number, lease.checkpoint, NOBODY, self.now)
        self.sealed = {blob.number: self.read_blob(blob) for blob in sealed_blobs(self.store)}
        assert self.store.checkpoints.keys() == {checkpoint.key for checkpoint in chosen}
        for checkpoint in chosen:
            new = self.store.checkpoints[checkpoint.key]
            assert (new.total_bytes, new.tensors) == (checkpoint.total_bytes, checkpoint.tensors)
            numbers = {lease.number for lease in before.leases_of(checkpoint) if not lease.waiting}
            assert {lease.number for lease in self.store.leases_of(new)} == numbers
        for _ in self.store.fit(DEVICE):
            pass

    def populated(self, segment: int) -> int:
        return self.memory.arena(self.memory.domain_of(segment)).populated(segment)

    def is_frozen(self, segment: int) -> bool:
        try:
            return self.memory.is_frozen(segment)
        except KeyError:  # on its way out
            return False

    # -- what holds always -----------------------------------------------------------------------------------------

    @invariant()
    def take_what_is_queued(self) -> None:
        self.pending += self.memory.next_reclaims()

    @property
    def there(self) -> list[Load]:
        """The loads that have not ended, but for those whose memory is gone."""
        return [load for load in (*self.loads, *self.sealed_loads) if not load.lost]

    @invariant()
    def what_a_loader_has_open_is_not_given_back(self) -> None:
        leaving = {reclaim.segment for reclaim in self.pending if not isinstance(reclaim, ExtentReclaim)}
        for load in self.there:
            assert load.opened <= self.segments.keys() - leaving

    @invariant()
    def nothing_overlaps(self) -> None:
        taken = [blob.slot for blob in sealed_blobs(self.store)]
        taken += [extent for load in self.there for extent in load.granted]
        taken += self.untaken.values()
        taken += [reclaim.extent for reclaim in self.pending if isinstance(reclaim, ExtentReclaim)]
        for before, after in zip(sorted(taken), sorted(taken)[1:], strict=False):
            assert before.segment != after.segment or before.end <= after.offset

    @invariant()
    def what_is_counted_is_there(self) -> None:
        for blob in sealed_blobs(self.store):
            users = [c for c in self.store.checkpoints.values() if blob.number in c.unique]
            assert blob.references == len(users)
            assert users or blob.holds or self.memory.freeing, "nobody needs it"
            assert all((c.key.device, c.key.domain) == blob.key[:2] for c in users)

    @invariant()
    def books_balance(self) -> None:
        used, live = self.memory.used, self.store.live_bytes(DEVICE)
        in_flight = self.store.in_flight_bytes(DEVICE)
        assert live == sum(len(self.read_blob(blob)) for blob in sealed_blobs(self.store))
        granted = [extent for load in self.there for extent in load.granted] + [*self.untaken.values()]
        assert in_flight == sum(extent.length for extent in granted) + sum(one.size for one in self.creating)
        assert used - live - in_flight >= 0
        arenas = [self.memory.arena(domain) for domain in DOMAINS]
        holding = sum(arena.populated(segment) for arena in arenas for segment in arena if not arena.is_empty(segment))
        assert self.store.hole_bytes(DEVICE) == holding - live - sum(extent.length for extent in granted)
        assert used <= self.memory.budget

    @invariant()
    def who_shares_is_known(self) -> None:
        index = self.store.sharing
        while index.go_on():
            pass
        sums, there = index.on(DEVICE), set(self.store.checkpoints.values())
        pinned = {c for c in there if c.pinned}
        leased = {c for c in there if self.store.leases.count(c.key)}
        assert sums.used_bytes == self.bytes_of(there)
        assert sums.pinned_bytes == self.bytes_of(pinned)
        assert sums.leased_bytes == self.bytes_of(leased)
        assert sums.evictable_bytes == self.bytes_of(there) - self.bytes_of(pinned | leased)
        for checkpoint in there:
            alone = sum(blob.length for blob in checkpoint.unique.values() if blob.references == 1)
            assert index.exclusive_bytes(checkpoint) == alone

    def bytes_of(self, checkpoints: set[Checkpoint]) -> int:
        """Bytes of the blobs that some checkpoints use, each counted once."""
        return sum(b.length for b in sealed_blobs(self.store) if any(b.number in c.unique for c in checkpoints))

    @invariant()
    def the_least_recently_used_are_known(self) -> None:
        found = list(self.store.index.by_use())
        assert found == sorted(self.store.checkpoints.values(), key=lambda c: c.used)

    @invariant()
    def what_was_lost_is_remembered_until_it_is_back(self) -> None:
        assert self.store.lost.keys() == self.gone
        assert not self.gone & self.store.checkpoints.keys()

    @invariant()
    def bytes_under_a_lease_stay(self) -> None:
        for seen in self.attached.values():
            for (_, offset), (segment, data) in seen.items():
                assert segment[offset : offset + len(data)] == data

    @invariant()
    def sealed_bytes_stay(self) -> None:
        now = {blob.number: self.read_blob(blob) for blob in sealed_blobs(self.store)}
        for number in now.keys() & self.sealed.keys():
            assert now[number] == self.sealed[number]
        self.sealed = now

    @invariant()
    def every_tensor_is_what_its_file_says(self) -> None:
        for key, content in self.contents.items():
            there = tuple(self.read_blob(blob) for blob in content.blobs if blob is not None)
            assert there == self.sources[key]
            small = [blob.number for blob in content.blobs if blob is not None and blob.length < SMALL]
            assert len(small) == len(set(small)), "two small names share an address"

    @invariant()
    def identity_is_equality(self) -> None:
        """Of sealed blobs with one digest: one variant, the same bytes, and the other way round."""
        found: dict[tuple[object, bytes], set[int]] = {}
        variants: dict[tuple[object, int], set[bytes]] = {}
        copies: dict[tuple[object, bytes], int] = {}
        for blob in sealed_blobs(self.store):
            data = self.read_blob(blob)
            found.setdefault((blob.key, data), set()).add(blob.variant)
            variants.setdefault((blob.key, blob.variant), set()).add(data)
            copies[blob.key, data] = copies.get((blob.key, data), 0) + 1
        assert all(len(numbers) == 1 for numbers in found.values()), "equal bytes under two identities"
        assert all(len(contents) == 1 for contents in variants.values()), "different bytes under one identity"
        assert all(count == 1 for (_, data), count in copies.items() if len(data) >= SMALL), "stored twice"

    @invariant()
    def without_collision_no_variant(self) -> None:
        """The content digest of a file does not depend on what else was being loaded."""
        for blob in sealed_blobs(self.store):
            assert blob.variant == 0 or len(self.seen[blob.key[1:]]) > 1

    @invariant()
    def a_content_is_resident_once(self) -> None:
        there = [(key.domain, source) for key, source in self.sources.items()]
        assert len(there) == len(set(there))

    def teardown(self) -> None:
        try:
            if not hasattr(self, "store"):
                return
            for load in (*self.loads, *self.sealed_loads):
                load.loading.end()
            while self.creating:
                self.answer(self.creating[0])
            self.locked.clear()
            for checkpoint in list(self.store.checkpoints.values()):
                self.store.remove(checkpoint)
            while self.memory.freeing.go_on():
                pass
            self.pending += self.memory.next_reclaims()
            while self.pending:
                self.carry_out(self.pending.pop())
                self.pending += self.memory.next_reclaims()
            assert sealed_blobs(self.store) == []
            assert (self.store.live_bytes(DEVICE), self.store.in_flight_bytes(DEVICE)) == (0, 0)
            assert self.memory.used == self.memory.pooled_bytes() <= self.pool
            assert self.memory.segments == len(self.segments)
        finally:
            self.patch.undo()


def test_who_maps_a_segment_keeps_it_when_the_next_daemon_releases_it() -> None:
    """What was not kept is read on in a frozen segment, which goes as soon as nothing that was kept is in it."""
    machine = StoreMachine()
    steps: list[Callable[[], None]] = [
        lambda: machine.begin(pages=6, sparse=False, pool=0, files=[[(1, 0, 0)]]),
        lambda: machine.load_at_once(contents=[(1, 0, 0), (1, 0, 0)], pick=0, seed=0),
        lambda: machine.attach(pick=0),
        lambda: machine.restart(kept=1, pick=0),
        lambda: machine.remove(pick=0),
        machine.free_some,
        machine.free_some,
        lambda: machine.reclaim(pick=0),
    ]
    try:
        for step in steps:
            step()
            machine.take_what_is_queued()
            machine.books_balance()
            machine.bytes_under_a_lease_stay()
        assert (len(machine.attached), len(machine.segments)) == (1, 0)
    finally:
        machine.teardown()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=300, stateful_step_count=50)
