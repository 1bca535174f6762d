"""Whom eviction chooses, held against the books asked anew for every set of checkpoints that could go."""

from __future__ import annotations

from itertools import count

import hypothesis.strategies as st
from hypothesis import given

from support.prompt_memory import PromptMemory
from support.sealed import sealed_blobs
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.digest import BlobIdentity
from weightd_daemon.core.events import CheckpointEvicted, Event
from weightd_daemon.core.eviction import choose
from weightd_daemon.core.lease import LeasePeer, LeaseTable
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.making_room import Evictor
from weightd_daemon.core.manifest import ContentFile, ContentTensor, content_digest
from weightd_daemon.core.prospect import _Prospect, prospect
from weightd_daemon.core.store import ContentStore

PAGE = 1024
BUDGET = 40 * PAGE
DOMAINS = ("all", "uid:7")
FILES = (ContentFile("", "f", None),)

CONTENTS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from((200, 900, 1800, 3000))), min_size=1, max_size=4)
CHECKPOINTS = st.lists(
    st.tuples(st.sampled_from((DOMAINS[0], *DOMAINS)), CONTENTS, st.sampled_from(("", "", "", "pinned", "leased"))),
    min_size=1, max_size=6,
)  # fmt: skip


class Books:
    """A store over a device of 40 pages; what a load is granted for a tensor is cut into one segment each or shared."""

    def __init__(self, *, sparse: bool) -> None:
        self.events: list[Event] = []
        numbers = count(1)
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=self.events.append)
        self.memory = self.store.memories["host"] = PromptMemory(
            budget=BUDGET, page=PAGE, sparse=sparse, pool_limit=0, create=lambda _: next(numbers)
        )

    def load(self, domain: str, contents: list[tuple[int, int]]) -> Checkpoint | None:
        """Tensors side by side in one extent, those that are there already shared; None where they do not fit."""
        load = StoreTransaction(self.store, "host", domain, 0)
        fresh, blobs = [], {}
        for content in dict.fromkeys(contents):
            blob = load.candidate(bytes([content[0]]) * 16, content[1])
            if blob is not None:
                blobs[content] = load.share(blob.number, None, 0)
            if blobs.get(content) is None:
                fresh.append(content)
        want = sum(-(-length // 256) * 256 for _, length in fresh)
        if want > self.memory.obtainable(domain, load.number):
            load.end()
            return None
        if fresh:
            extent = self.memory.grant(load.number, domain, want, want)
            if extent is None:
                load.end()
                self.reclaim()
                return None
            at = extent.offset
            for content in fresh:
                _, blobs[content] = load.settle(bytes([content[0]]) * 16, content[1], extent.segment, at)
                at += -(-content[1] // 256) * 256
        found = tuple(blobs[content] for content in contents)
        entries = [ContentTensor("", f"t{at}", "U8", (c[1],), 0, c[1]) for at, c in enumerate(contents)]
        identities = [BlobIdentity(b.key.digest, b.length, b.variant) for b in found if b is not None]
        digest = content_digest(entries, identities, FILES)
        checkpoint = load.seal(Content(digest, FILES, tuple(entries), found), 0.0)
        load.end()
        self.reclaim()
        return checkpoint

    def reclaim(self) -> None:
        while reclaims := self.memory.next_reclaims():
            for reclaim in reclaims:
                self.memory.reclaimed(reclaim)

    def without(self, domain: str, load: int, gone: set[Checkpoint]) -> _Prospect:
        """What the load could get if these were gone: reckoned from nothing."""
        uses: dict[int, int] = {}
        for checkpoint in gone:
            for number in checkpoint.unique:
                uses[number] = uses.get(number, 0) + 1
        slots = [b.slot for b in sealed_blobs(self.store) if uses.get(b.number) == b.references and not b.holds]
        return prospect(self.memory, domain, load, slots)


@given(
    sparse=st.booleans(), checkpoints=CHECKPOINTS, order=st.permutations(range(6)), domain=st.sampled_from(DOMAINS),
    needed=st.integers(1, 44), piece=st.integers(0, 12), held=CONTENTS,
)  # fmt: skip
def test_those_go_without_whom_it_would_not_be_enough(
    sparse: bool,
    checkpoints: list[tuple[str, list[tuple[int, int]], str]],
    order: list[int],
    domain: str,
    needed: int,
    piece: int,
    held: list[tuple[int, int]],
) -> None:
    books = Books(sparse=sparse)
    store = books.store
    kept = set()
    for where, contents, mark in checkpoints:
        if (checkpoint := books.load(where, contents)) is None:
            continue
        if mark == "pinned":
            checkpoint.pins.add(1000)
        elif mark == "leased":
            store.leases.begin(checkpoint.key, LeasePeer(1, 2, 3, "python"), 0.0)
        if mark:
            kept.add(checkpoint)
    there = list(store.checkpoints.values())
    for at in order:
        if at < len(there):
            store.use(there[at], -1.0)
    load = StoreTransaction(store, "host", domain, 0)
    for content, length in held:
        load.candidate(bytes([content]) * 16, length)
    may_go = sorted((c for c in there if c not in kept), key=lambda c: c.used)
    before = books.without(domain, load.number, set())

    def enough(gone: set[Checkpoint]) -> bool:
        then = books.without(domain, load.number, gone)
        return then.total >= needed * PAGE and then.largest >= piece * PAGE

    def gives(gone: set[Checkpoint]) -> bool:
        return books.without(domain, load.number, gone).total > before.total

    wanted = gives if enough(set()) else enough
    expected = wanted(set(may_go))
    tried = {*may_go}  # asked now: afterwards the books are others
    useful = {subset: wanted(set(subset)) for subset in _subsets(may_go)}
    went = Evictor(store, load.place, load.number, None).evict_for(needed * PAGE, piece * PAGE)

    gone = [event.checkpoint for event in books.events if isinstance(event, CheckpointEvicted)]
    assert {*gone} <= tried
    assert went == bool(gone) == expected
    if not went:
        return
    assert gone == sorted(gone, key=lambda c: c.used)
    assert useful[frozenset(gone)]
    assert not any(useful[frozenset(gone) - {one}] for one in gone), "one went for nothing"
    assert not useful[frozenset(c for c in may_go if c.used < gone[-1].used)], "the less recently used would have done"


def _subsets(things: list[Checkpoint]) -> list[frozenset[Checkpoint]]:
    return [frozenset(thing for at, thing in enumerate(things) if bits >> at & 1) for bits in range(1 << len(things))]


def test_looking_takes_time_for_those_that_are_looked_at_only() -> None:
    """However many there are: at most three steps for each, and none for those that come later."""
    steps = {"free": 0, "keep": 0}
    won = 0

    def free(gain: int) -> None:
        nonlocal won
        steps["free"] += 1
        won += gain

    def keep(gain: int) -> None:
        nonlocal won
        steps["keep"] += 1
        won -= gain

    asked = iter([1] * 50 + [100] + [1] * 10_000)
    assert choose(asked, free, keep, lambda: won >= 100) == [100]
    assert steps == {"free": 51, "keep": 50}
    assert next(asked) == 1
