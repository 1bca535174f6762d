"""The revision moves with every change of what monitors list: checkpoints, names, pins, leases, loads, absences."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from support.prompt_memory import PromptMemory
from weightd.errors import LeaseLostError, WeightdError
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
from weightd_daemon.core.events import CheckpointEvicted, Event
from weightd_daemon.core.lease import LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.revision import BooksRevision
from weightd_daemon.core.store import ContentStore
from weightd_daemon.loads.flight import InFlightLoad
from weightd_daemon.loads.request import LoadOutcome, LoadRequest, LoadStatus

WHO = st.sampled_from([Principal(0, admin=True, domain="all"), Principal(1000, admin=False, domain="all")])
DIGESTS = st.sampled_from(["sha256:" + f"{digit}" * 64 for digit in "123"])
DEVICES = ("host", "GPU-1")
PEERS = [LeasePeer(number, number, 1000, "") for number in (1, 2)]
PICK = st.integers(0, 59)


class RevisionMachine(RuleBasedStateMachine):
    """Books that change in every way; what is listed may only be another when the revision is."""

    def __init__(self) -> None:
        super().__init__()
        self.locked: set[int] = set()
        self.store = ContentStore(leases=LeaseTable(lambda lease: lease.number in self.locked), on_event=self.happened)
        self.catalog = Catalog(self.store, UserLimits())
        for device in DEVICES:
            self.store.memories[device] = PromptMemory(
                budget=1, page=1, sparse=False, pool_limit=0, create=lambda size: size
            )
        self.seen: tuple[int, object] | None = None

    def happened(self, event: Event) -> None:
        if isinstance(event, CheckpointEvicted):
            self.catalog.forget(event.checkpoint, chosen=event.reason == "removed")

    def one(self, pick: int) -> Checkpoint | None:
        there = list(self.store.checkpoints.values())
        return there[pick % len(there)] if there else None

    @rule(digest=DIGESTS, device=st.sampled_from(DEVICES), who=WHO)
    def enter(self, digest: str, device: str, who: Principal) -> None:
        key = CheckpointKey(device, "all", digest)
        if key not in self.store.checkpoints:
            self.store.enter(Checkpoint(key, {}, {}, 0, who.uid, 0.0, 0.0))

    @rule(who=WHO, name=st.sampled_from(["a", "/b"]), digest=DIGESTS, is_default=st.booleans())
    def name(self, who: Principal, name: str, digest: str, is_default: bool) -> None:
        self.tried(lambda: self.catalog.set(who, name, digest, is_default=is_default))

    @rule(who=WHO, name=st.sampled_from(["a", "/b"]) | DIGESTS)
    def remove(self, who: Principal, name: str) -> None:
        self.tried(lambda: self.catalog.remove(who, name))

    @rule(pick=PICK, who=WHO, keep=st.booleans())
    def pin(self, pick: int, who: Principal, keep: bool) -> None:
        if there := self.one(pick):
            self.tried(lambda: (self.catalog.pin if keep else self.catalog.unpin)(who, there))

    @rule(pick=PICK)
    def use(self, pick: int) -> None:
        if there := self.one(pick):
            self.store.use(there, float(pick))

    @rule(pick=PICK, waiting=st.booleans())
    def lend(self, pick: int, waiting: bool) -> None:
        if there := self.one(pick):
            lease = self.store.leases.begin(there.key, PEERS[0], 0.0, waiting=waiting)
            self.locked.add(lease.number)

    @rule(pick=PICK, how=st.sampled_from(["end", "unlock", "claim"]))
    def change_lease(self, pick: int, how: str) -> None:
        leases = list(self.store.leases)
        if not leases:
            return
        lease = leases[pick % len(leases)]
        if how == "claim":
            self.store.leases.attribute(lease.number, PEERS[1])
        elif how == "end":
            self.store.leases.end(lease.number)
        else:
            self.locked.discard(lease.number)

    @rule()
    def sweep(self) -> None:
        self.store.leases.sweep(100)

    @rule(pick=PICK)
    def evict(self, pick: int) -> None:
        if (there := self.one(pick)) and not self.store.stays(there):
            self.store.evict(there, "capacity")

    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        if pick % 6 == 0:
            self.store.lose(DEVICES[pick % 2], "it fell off the bus")

    @rule(reason=st.sampled_from(["", "it is out"]))
    def leave_or_come_back(self, reason: str) -> None:
        self.store.set_absent("GPU-1", reason)

    def tried(self, act: Callable[[], object]) -> None:
        with contextlib.suppress(WeightdError):
            act()

    def shown(self) -> Hashable:
        store = self.store
        return (
            tuple((c.key, c.used, tuple(sorted(map(str, c.pins)))) for c in store.checkpoints.values()),
            tuple(store.lost),
            tuple(sorted((*place, *map(str, (tag.owner, tag.is_default, tag.content_digest)))
                         for place, tag in self.catalog.tags.items())),
            frozenset((lease, lease.peer.connection) for lease in store.leases),
            tuple(store.absent.items()),
        )  # fmt: skip

    @invariant()
    def a_revision_shows_one_state(self) -> None:
        now = self.store.revision.number, self.shown()
        if self.seen is not None:
            assert now[0] >= self.seen[0]
            assert now[0] != self.seen[0] or now == self.seen
        self.seen = now
        for checkpoint in self.catalog.visible(Principal(0, admin=True, domain="all")):
            self.catalog.names(checkpoint)
        self.catalog.listed(Principal(0, admin=True, domain="all"))
        assert self.store.revision.number == now[0], "a look has moved it"


TestRevision = RevisionMachine.TestCase


def test_rare_changes_move_it() -> None:
    machine, digest = RevisionMachine(), "sha256:" + "1" * 64
    root = Principal(0, admin=True, domain="all")
    machine.enter(digest, "host", root)
    for act in (
        lambda: machine.pin(0, root, keep=True),
        lambda: machine.pin(0, root, keep=False),
        lambda: machine.lose(0),
        lambda: machine.remove(root, digest),
    ):
        machine.a_revision_shows_one_state()
        before = machine.shown()
        act()
        assert machine.shown() != before
    machine.a_revision_shows_one_state()


def test_loads_move_it_and_their_progress_does_not() -> None:
    revision = BooksRevision()
    seen = 0

    def has_moved() -> bool:
        nonlocal seen
        before, seen = seen, revision.number
        return seen != before

    async def load() -> None:
        who = Principal(0, admin=True, domain="")
        request = LoadRequest(who=who, peer=PEERS[0], sources=(), device="host", detached=True)
        flight = InFlightLoad(request, -1, 0.0, revision)
        flight.join(1, request)
        assert has_moved()
        flight.report(LoadStatus("copying", 1, 2))
        assert not has_moved()
        flight.leave(1)
        assert has_moved()
        assert flight.waiters, "what it asks for stays wanted"
        flight.leave(7)
        assert not has_moved()
        checkpoint = Checkpoint(CheckpointKey("host", "", ""), {}, {}, 0, 0, 0.0, 0.0)
        flight.succeed(checkpoint, LoadOutcome("", 0, 0, 0, 0, 0.0))
        assert has_moved()
        flight.fail(LeaseLostError("it ended"))
        assert not has_moved()
        failed = InFlightLoad(request, -1, 0.0, revision)
        failed.fail(LeaseLostError("it ended"))
        assert has_moved()

    asyncio.run(load())
