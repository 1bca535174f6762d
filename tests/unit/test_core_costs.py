"""What a load or an eviction of one checkpoint costs does not grow with the number of the others: counted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.counting import operations
from support.prompt_memory import PromptMemory
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import BYTES_OF_TENSOR, Checkpoint, Content
from weightd_daemon.core.lease import LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.loads.fair_queue import LoadQueue
from weightd_daemon.loads.loads import Loads
from weightd_daemon.loads.quota import LoadQuota
from weightd_daemon.loads.request import LoadRequest

PAGE = 4096
TENSORS = 3
WHO = Principal(1000, admin=False, domain="all")
FEW, MANY = 100, 1000


class Desk:
    """A store with so many checkpoints of TENSORS pages, all different, on a device that takes `room` of them."""

    def __init__(self, there: int, room: int, *, sparse: bool) -> None:
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=lambda _: None)
        self.segments = 0
        self.memory = self.store.memories["host"] = PromptMemory(
            budget=room * TENSORS * PAGE, page=PAGE, sparse=sparse, pool_limit=0, create=self.create
        )
        unused = cast("Any", None)
        self.loads = Loads(
            store=self.store, catalog=Catalog(self.store, UserLimits()), devices={}, reclaimers={}, index=unused,
            prepare=unused, now=lambda: 1.0, on_event=lambda _: None, open_manifest=unused, lock=-1, threads=1,
            fair_queue=LoadQueue(1, 1), limits=UserLimits(),
        )  # fmt: skip
        for number in range(there):
            self.load(number)

    def create(self, _: int) -> int:
        self.segments += 1
        return self.segments

    def sources(self, number: int) -> tuple[SourceFile, ...]:
        return (SourceFile("", "f", FileIdentity(1, number, 3, 4, 5)),)

    def load(self, number: int) -> Checkpoint:
        load = StoreTransaction(self.store, "host", "all", 1000)
        load.reserve_books(TENSORS * BYTES_OF_TENSOR, TENSORS * PAGE + number, TENSORS)
        if not load.admit([PAGE] * TENSORS):
            digests = [((f"{number}-{at}".encode().ljust(16), PAGE), 1) for at in range(TENSORS)]
            load.match(digests)
            while not load.make_room():
                self.reclaim()
        while (extent := load.grant(TENSORS * PAGE, TENSORS * PAGE)) is None:
            self.reclaim()
        blobs = [
            load.settle(f"{number}-{at}".encode().ljust(16), PAGE, extent.segment, extent.offset + at * PAGE)[1]
            for at in range(TENSORS)
        ]
        entries = tuple(ContentTensor("", f"t{at}", "U8", (PAGE,), 0, PAGE) for at in range(TENSORS))
        content = Content(f"sha256:{number:064x}", (ContentFile("", "f", None),), entries, tuple(blobs))
        assert load.rechecked
        checkpoint = load.seal(content, 1.0)
        self.store.index.claim(checkpoint, self.sources(number))
        load.end()
        self.reclaim()
        return checkpoint

    def reclaim(self) -> None:
        while reclaims := self.memory.next_reclaims():
            for reclaim in reclaims:
                self.memory.reclaimed(reclaim)

    def admit(self) -> None:
        """Admit a load of a user whose bytes are limited, when its figures are known and when its content is."""
        flight: Any = SimpleNamespace(request=SimpleNamespace(who=WHO, device="host"), announced=0)
        quota = LoadQuota(self.store, UserLimits(bytes=1 << 40))
        for content in ("", "sha256:new"):
            quota.admit(flight, [], 1, 1, 1, content)
        assert flight.announced == 2

    def find(self, number: int) -> Checkpoint | None:
        request = LoadRequest(who=WHO, peer=LeasePeer(1, 1, 1000, ""), sources=self.sources(number), device="host")
        return self.loads.find_resident(request)


def evict_one(desk: Desk) -> None:
    desk.store.remove(next(iter(desk.store.checkpoints.values())))
    desk.reclaim()


CALLS: dict[str, Callable[[Desk], object]] = {
    "load": lambda desk: desk.load(desk.segments + 1000),
    "evict": evict_one,
    "admit": Desk.admit,
    "find what is resident": lambda desk: desk.find(7),
    "find what is not": lambda desk: desk.find(-1),
}


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "whole segments"])
@pytest.mark.parametrize("full", ["", "device", "books"])
@pytest.mark.parametrize("name", CALLS)
def test_one_of_many_costs_what_one_of_few_does(name: str, full: str, sparse: bool) -> None:
    costs = []
    for there in (FEW, MANY):
        desk = Desk(there, there if full == "device" else there + 10, sparse=sparse)
        desk.store.books.limit = desk.store.books.used if full == "books" else 0
        CALLS[name](desk)  # the first fills what is reckoned once
        costs.append(operations(lambda: CALLS[name](desk)))  # noqa: B023  # called here
        assert desk.store.evictions == (2 if full and name == "load" else 0)
    assert costs[1] <= costs[0] * 1.05, costs
