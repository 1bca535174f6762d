"""Room on a full GPU for what a loader needs of it: idle loaders go first, then checkpoints, as few as will do."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import pytest

from support.prompt_memory import PromptMemory
from weightd.errors import CapacityError
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.making_room import Evictor
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.reclaims import SegmentReclaim
from weightd_daemon.core.store import ContentStore
from weightd_daemon.loads.loader_memory import LoaderMemory, make_room_for_verifying

GPU = "GPU-0"
PAGE = 2 << 20
CHECKPOINT = 4 * PAGE
CONTEXT = 8 * CHECKPOINT
CALL = "cuDevicePrimaryCtxRetain"


class Gpu:
    """A full GPU, the store of what lies on it, a load that has just begun, and its reclaimer."""

    uuid = GPU
    loader_bytes = CONTEXT

    def __init__(self, checkpoints: int, *, others: int = 0, is_known: bool = True) -> None:
        self.is_known = is_known
        self.size = checkpoints * CHECKPOINT + others
        self.others = others
        self.seen = 0
        self.idle = 0
        segments = count(1)
        self.store = ContentStore(leases=LeaseTable(lambda lease: True), on_event=lambda _: None)
        self.memory = self.store.memories[GPU] = PromptMemory(
            budget=self.size, page=PAGE, sparse=False, pool_limit=0, create=lambda _: next(segments),
            available=self.available,
        )  # fmt: skip
        self.checkpoints = [self.add(number) for number in range(checkpoints)]
        load = StoreTransaction(self.store, GPU, "", 1000)
        self.loader = LoaderMemory(
            room=Evictor(self.store, load.place, load.number, None), memory=self.memory, device=self.as_any,
            reclaimer=self.as_any, pool=self.as_any,
        )  # fmt: skip

    @property
    def as_any(self) -> Any:
        return self

    def add(self, number: int) -> Checkpoint:
        load = StoreTransaction(self.store, GPU, "", 1000)
        extent = load.grant(CHECKPOINT, CHECKPOINT)
        assert extent is not None
        _, blob = load.settle(number.to_bytes(16, "little"), CHECKPOINT, extent.segment, extent.offset)
        entry = ContentTensor("", "t", "U8", (CHECKPOINT,), 0, CHECKPOINT)
        content = Content(f"{number}", (ContentFile("", "f", None),), (entry,), (blob,))
        checkpoint = load.seal(content, 1.0)
        load.end()
        return checkpoint

    def available(self) -> int | None:
        """As seen at the last look."""
        return self.seen if self.is_known else None

    async def refresh(self) -> None:
        self.seen = self.size - self.others - self.memory.used

    async def wait(self) -> None:
        """As the reclaimer: what was queued is given back, and that takes its time."""
        for reclaim in self.memory.next_reclaims():
            assert isinstance(reclaim, SegmentReclaim)
            await asyncio.sleep(0)
            self.memory.reclaimed(reclaim)

    async def dismiss_idle(self) -> bool:
        idle, self.idle = self.idle, 0
        return idle > 0

    def make_room(self) -> list[int]:
        """Let the loader be refused once. Returns the checkpoints that are left."""
        asyncio.run(self.loader.make_room(CALL))
        assert not self.memory.reclaiming, "the next try comes before the memory has come back"
        return [number for number, one in enumerate(self.checkpoints) if one.key in self.store.checkpoints]


def test_idle_loaders_go_before_any_checkpoint() -> None:
    gpu = Gpu(3)
    gpu.idle = 2
    assert gpu.make_room() == [0, 1, 2]
    assert gpu.idle == 0
    assert gpu.make_room() == [1, 2]


def test_checkpoints_go_one_by_one_the_least_recently_used_first() -> None:
    gpu = Gpu(12)
    gpu.store.use(gpu.checkpoints[0], 2.0)
    gpu.checkpoints[2].pins.add(1000)
    assert gpu.make_room() == [0, *range(2, 12)]
    assert gpu.make_room() == [0, 2, *range(4, 12)]


def test_memory_that_is_on_its_way_back_is_waited_for() -> None:
    gpu = Gpu(3)
    gpu.store.remove(gpu.checkpoints[0])
    assert gpu.make_room() == [1, 2]
    assert gpu.memory.used == 2 * CHECKPOINT


@pytest.mark.parametrize("is_known", [True, False])
def test_no_more_goes_than_a_context_can_take(is_known: bool) -> None:
    """The driver refuses for another reason, and would refuse for ever."""
    gpu = Gpu(20, is_known=is_known)
    for left in reversed(range(12, 20)):
        assert len(gpu.make_room()) == left
    with pytest.raises(CapacityError):
        gpu.make_room()
    assert len(gpu.store.checkpoints) == 12


def test_nothing_goes_where_the_device_has_enough() -> None:
    gpu = Gpu(3)
    gpu.others = -CONTEXT
    with pytest.raises(CapacityError, match=r"64\.0 MiB free there"):
        gpu.make_room()
    assert len(gpu.store.checkpoints) == 3


def test_the_refusal_names_the_context_and_has_the_numbers() -> None:
    gpu = Gpu(2)
    for checkpoint in gpu.checkpoints:
        checkpoint.pins.add(1000)
    with pytest.raises(CapacityError) as caught:
        gpu.make_room()
    assert str(caught.value) == (
        "no room on GPU-0 for the context of a loader process, which takes up to 64.0 MiB of the device beside tensors "
        "(cuDevicePrimaryCtxRetain): 0 B free there, 0 B evictable, 16.0 MiB pinned, 0 B leased; "
        "stop what else uses the device, remove or unpin a checkpoint, or lower --budget"
    )
    assert (caught.value.requested_bytes, caught.value.pinned_bytes) == (CONTEXT, 2 * CHECKPOINT)
    assert caught.value.metadata["device_free_bytes"] == "0"


def test_verifying_evicts_nothing() -> None:
    gpu = Gpu(2)
    gpu.idle = 1
    asyncio.run(make_room_for_verifying(gpu.as_any, gpu.as_any, CALL))
    gpu.others = -PAGE
    with pytest.raises(CapacityError, match="cannot verify: no room on GPU-0 for the context of a loader") as caught:
        asyncio.run(make_room_for_verifying(gpu.as_any, gpu.as_any, CALL))
    assert "2.00 MiB free there" in str(caught.value), "as it is now"
    assert len(gpu.store.checkpoints) == 2
