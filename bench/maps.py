"""What a map of a device's memory costs, and a list of tensors: pages, and the longest step of the loop.

    python bench/maps.py [--checkpoints 1000] [--blobs 1000000] [--shapes apart,halves,checkered] [--format human|json]

The books of a daemon are filled, without memory or files, with so many checkpoints and blobs of one of these shapes:

- apart: each checkpoint has blobs of its own, one behind the other, so that its extents are few and long;
- halves: 20 checkpoints at a time have the blobs of one in common, and of those each has half, drawn by chance;
- checkered: every second blob has gone with its checkpoint, so that each that is left has holes around it.

Then the whole map is asked for page by page on a loop, as clients do. Times are CPU time, over all threads; the longest
step is that of the loop. The list of
tensors is that of one checkpoint of as many tensors as `--tensors` says.

Aim: a page of 5,000 rows in under 100 ms, and no step over 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
from collections.abc import Awaitable, Callable, Iterable
from itertools import count
from typing import Any

from _daemon import machine
from _steps import Steps

from weightd._proto.v1 import inspection_pb2
from weightd_daemon import heap
from weightd_daemon.core.blob import Blob
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, Content
from weightd_daemon.core.creations import Creation
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.core.memory import MemoryAccounting
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.handles.manifest_file import encode_manifest, make_manifest
from weightd_daemon.handles.manifests import ManifestHandles
from weightd_daemon.inspection.segment_map import SegmentMaps
from weightd_daemon.inspection.sharing_upkeep import SharingUpkeep
from weightd_daemon.inspection.stored_tensors import StoredTensors

FAMILY = 20
LENGTH = 4096
WHO = Principal(0, admin=True, domain="all")
FILES = (ContentFile("", "model.safetensors", None),)


class Books:
    """A store of a device whose memory nobody touches."""

    def __init__(self) -> None:
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=lambda _: None)
        self.memory = MemoryAccounting(budget=1 << 50, page=4096, sparse=True, pool_limit=0, create=self._create)
        self.store.memories["host"] = self.memory
        self._digests, self._segments, self._numbers = count(), count(1), count()

    def add(self, fresh: int, shared: Iterable[Blob] = ()) -> Checkpoint:
        """Load a checkpoint of so many new blobs, and of some that are there."""
        load = StoreTransaction(self.store, "host", "all", 0)
        blobs = [load.share(blob.number, None, 0) for blob in shared if load.candidate(blob.key.digest, LENGTH)]
        extent = load.grant(fresh * LENGTH, fresh * LENGTH)
        assert extent is not None
        for at in range(fresh):
            digest = next(self._digests).to_bytes(16)
            blobs.append(load.settle(digest, LENGTH, extent.segment, extent.offset + at * LENGTH)[1])
        entries = tuple(
            ContentTensor("", f"model.layers.{at}.weight", "U8", (LENGTH,), 0, LENGTH) for at in range(len(blobs))
        )
        content = Content(f"sha256:{next(self._numbers):064x}", FILES, entries, tuple(blobs))
        checkpoint = load.seal(content, 0.0)
        load.end()
        self.content = content
        return checkpoint

    def settle(self) -> None:
        """Give back what is on its way."""
        while self.memory.freeing.go_on():
            pass
        for reclaim in self.memory.next_reclaims():
            self.memory.reclaimed(reclaim)

    def _create(self, creation: Creation) -> None:
        self.memory.made(creation, next(self._segments))


def fill(books: Books, shape: str, checkpoints: int, blobs: int) -> None:
    """Bring checkpoints with about so many blobs."""
    chance, each = random.Random(0), blobs // checkpoints
    common: list[Blob] = []
    gone: list[Checkpoint] = []
    for number in range(checkpoints):
        if shape == "apart":
            books.add(each)
        elif shape == "checkered":
            gone.append(books.add(each))
            books.add(1, list(gone[-1].unique.values())[::2])
        elif number % FAMILY:
            books.add(each, [blob for blob in common if chance.random() < 0.5])
        else:
            common = list(books.add(each).unique.values())
    for checkpoint in gone:
        books.store.evict(checkpoint, "removed")
        books.settle()


async def pages(steps: Steps, call: Callable[[str], Awaitable[Any]], rows: Callable[[Any], int]) -> dict[str, Any]:
    """Ask for all pages."""
    counted, times, longest, token = [], [], 0.0, ""
    while True:
        page, cost = await steps.of(lambda: call(token))  # noqa: B023  # called here
        counted.append(rows(page))
        times.append(cost.process_ms)
        longest = max(longest, cost.step_ms)
        token = page.next_page_token
        if not token:
            break
    return {
        "pages": len(times), "rows": sum(counted), "most_rows": max(counted), "first_ms": round(times[0], 1),
        "slowest_later_ms": round(max(times[1:], default=0.0), 1), "all_ms": round(sum(times)),
        "longest_step_ms": round(longest, 1),
    }  # fmt: skip


async def measure_map(shape: str, checkpoints: int, blobs: int) -> dict[str, Any]:
    """All pages of a map, first when nothing was asked before, then again."""
    books, steps = Books(), Steps()
    fill(books, shape, checkpoints, blobs)
    gc.collect()
    heap.settle()
    upkeep = SharingUpkeep(books.store.sharing)
    maps = SegmentMaps(books.store, Catalog(books.store, UserLimits()), upkeep)

    def ask(token: str) -> Awaitable[inspection_pb2.GetMapResponse]:
        return maps.page(WHO, inspection_pb2.GetMapRequest(page_token=token), "host")

    _, cost = await steps.of(upkeep.caught_up)
    found: dict[str, Any] = {
        "blobs": books.store.blobs.sealed,
        "sharing_ms": round(cost.process_ms),
        "sharing_step_ms": round(cost.step_ms, 1),
        "first": await pages(steps, ask, lambda page: len(page.extents)),
        "again": await pages(steps, ask, lambda page: len(page.extents)),
    }
    books.add(1000)
    found["after_a_load"] = await pages(steps, ask, lambda page: len(page.extents))
    return found


async def measure_tensors(tensors: int) -> dict[str, Any]:
    """All pages of the tensors of one checkpoint."""
    books, steps, manifests = Books(), Steps(), ManifestHandles()
    checkpoint = books.add(tensors)
    encoded = encode_manifest(books.content, "host", "host", books.memory.size)
    manifests.add(checkpoint.key, make_manifest(encoded))
    gc.collect()
    heap.settle()
    upkeep = SharingUpkeep(books.store.sharing)
    listing = StoredTensors(books.store, Catalog(books.store, UserLimits()), manifests, upkeep)
    await upkeep.caught_up()

    def ask(token: str) -> Awaitable[inspection_pb2.ListTensorsResponse]:
        digest = checkpoint.key.content_digest
        return listing.page(WHO, inspection_pb2.ListTensorsRequest(reference=digest, page_token=token), "")

    found = await pages(steps, ask, lambda page: len(page.tensors))
    manifests.close()
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--blobs", type=int, default=1_000_000)
    parser.add_argument("--shapes", default="apart,halves,checkered")
    parser.add_argument("--tensors", default="1000,100000")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for shape in filter(None, options.shapes.split(",")):
        there = asyncio.run(measure_map(shape, options.checkpoints, options.blobs))
        results |= {f"map, {shape}, {key}": there.pop(key) for key in ("first", "again", "after_a_load")}
        print(shape, there, file=sys.stderr, flush=True)
    for tensors in filter(None, options.tensors.split(",")):
        results[f"tensors, {int(tensors):,}"] = asyncio.run(measure_tensors(int(tensors)))
    if options.format == "json":
        print(json.dumps({"machine": machine(), **results}))
        return
    print(machine())
    keys = list(next(iter(results.values())))
    print(f"\n| what | {' | '.join(keys)} |\n|---{'|---' * len(keys)}|")
    for what, row in results.items():
        print(f"| {what} | {' | '.join(f'{row[key]:,}' for key in keys)} |")


if __name__ == "__main__":
    main()
