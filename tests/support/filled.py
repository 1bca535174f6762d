"""What services answer from, in this process: books that are full, without a daemon, files or memory."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.prompt_memory import PromptMemory
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Content
from weightd_daemon.core.lease import LeasePeer, LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.inspection.sharing_upkeep import SharingUpkeep
from weightd_daemon.monitoring.statistics import Statistics
from weightd_daemon.operations.drain import DrainOperation

WHO = Principal(1000, admin=False, domain="")
BLOBS = 10
DEVICES = [f"GPU-{number}" for number in range(8)]


class Gpu:
    kind, name = "cuda_vmm", "a GPU"

    def available(self) -> int | None:
        return 1 << 30

    async def refresh(self) -> None:
        pass


class Filled:
    """What services answer from (see GrpcServiceContext), filled with checkpoints of a few blobs that all differ."""

    def __init__(self, checkpoints: int, *, held: bool = True, limits: UserLimits | None = None) -> None:
        self.held = held
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=lambda _: None)
        self.catalog = Catalog(self.store, limits or UserLimits())
        self.devices = {uuid: Gpu() for uuid in DEVICES}
        self.loads: Any = self
        self.under_way: list[Any] = []
        self.connections: list[Any] = []
        digests: Any = SimpleNamespace(path=Path("/state/index"), problem="", failures=0)
        connections: Any = self.connections
        drain = DrainOperation(store=self.store, loads=self.loads, on_event=lambda _: None, resumed=lambda: None)
        devices: Any = self.devices
        self.sharing = SharingUpkeep(self.store.sharing)
        self.statistics = Statistics(self.store, self.loads, connections, devices, drain, digests, self.sharing)
        numbers = count()
        for uuid in DEVICES:
            self.store.memories[uuid] = PromptMemory(
                budget=1 << 40, page=4096, sparse=False, pool_limit=0, create=lambda _: next(numbers)
            )
        for number in range(checkpoints):
            self.add(DEVICES[number % len(DEVICES)], number)

    def add(self, device: str, number: int) -> None:
        load = StoreTransaction(self.store, device, "", 1000)
        extent = load.grant(BLOBS * 4096, BLOBS * 4096)
        assert extent is not None
        blobs = [
            load.settle(f"{number}-{i}".encode().ljust(16), 4096, extent.segment, extent.offset + i * 4096)[1]
            for i in range(BLOBS)
        ]
        entries = tuple(ContentTensor("", f"t{i}", "U8", (4096,), 0, 4096) for i in range(BLOBS))
        content_digest = f"sha256:{number:064x}"
        checkpoint = load.seal(Content(content_digest, (ContentFile("", "f", None),), entries, tuple(blobs)), 0.0)
        load.end()
        self.catalog.set(WHO, f"n{number}", content_digest)
        if self.held:
            self.store.leases.begin(checkpoint.key, LeasePeer(number, number, 1000, ""), 0.0)

    def caller(self, context: object) -> tuple[None, Principal]:
        return None, WHO
