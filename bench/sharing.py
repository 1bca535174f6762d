"""What it costs to know who shares with whom: the index of the sets of blobs, pages of pairs, figures of a device.

    python bench/sharing.py [--checkpoints 1000] [--blobs 1000000] [--shapes families,base,halves] [--format human|json]

The books of a daemon are filled, without memory or files, with so many checkpoints and blobs of one of these shapes:

- families: 20 checkpoints have half of their tensors in common, as fine-tunes of one model have;
- base: all checkpoints have half of their tensors in common, so all pairs share;
- halves: the same, but each checkpoint has another half of the common tensors, so that each tensor has other users.

Then its index catches up on a loop, and pages are asked for as clients do. Times are CPU time of the thread, and the
longest step is that of the loop; memory is what the index has added to the process, for each use of a blob.

Aim: a page of 5,000 rows in under 100 ms, and no step over 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from _daemon import machine
from _steps import CallCost, Steps

from weightd._proto.v1 import inspection_pb2
from weightd_daemon import heap
from weightd_daemon.core.blob import Blob, BlobKey
from weightd_daemon.core.catalog import Catalog
from weightd_daemon.core.checkpoint import Checkpoint, CheckpointKey
from weightd_daemon.core.lease import LeaseTable
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.principal import Principal
from weightd_daemon.core.store import ContentStore
from weightd_daemon.inspection.sharing_list import SharingList
from weightd_daemon.inspection.sharing_upkeep import SharingUpkeep

FAMILY = 20
LENGTH = 4096
WHO = Principal(0, admin=True, domain="all")


class Books:
    """A store without memory, and what comes into it."""

    def __init__(self) -> None:
        self.store = ContentStore(leases=LeaseTable(lambda _: True), on_event=lambda _: None)
        self._digests = count()

    def blobs(self, number: int) -> list[Blob]:
        return [
            self.store.blobs.place(BlobKey("host", "all", next(self._digests).to_bytes(16), LENGTH), 0, 1, 0, 1)
            for _ in range(number)
        ]

    def add(self, number: int, blobs: list[Blob]) -> Checkpoint:
        key = CheckpointKey("host", "all", f"sha256:{number:064x}")
        unique = {blob.number: blob for blob in blobs}
        total = LENGTH * len(blobs)
        checkpoint = Checkpoint(key, {"": blobs}, {"": len(blobs)}, total, 0, 0.0, 0.0, unique=unique)
        self.store.enter(checkpoint)
        return checkpoint


def fill(books: Books, shape: str, checkpoints: int, blobs: int) -> int:
    """Bring checkpoints with about so many blobs. Returns how often blobs are used."""
    chance, uses = random.Random(0), 0
    half = blobs // checkpoints
    common: list[Blob] = []
    for number in range(checkpoints):
        if not common or (shape == "families" and number % FAMILY == 0):
            common = books.blobs(half)
        some = chance.sample(common, half // 2) if shape == "halves" else common
        own = books.blobs(half - half // FAMILY if shape == "families" else half - 1)
        uses += len(books.add(number, some + own).unique)
    return uses


def shown(cost: CallCost) -> dict[str, float]:
    """CPU milliseconds of the loop's thread, and of the longest step."""
    return {"ms": round(cost.thread_ms, 1), "step_ms": round(cost.step_ms, 1)}


async def measure(shape: str, checkpoints: int, blobs: int) -> dict[str, Any]:
    """Time everything with one shape."""
    books, steps = Books(), Steps()
    uses = fill(books, shape, checkpoints, blobs)
    gc.collect()
    heap.settle()
    store = books.store
    upkeep = SharingUpkeep(store.sharing)
    listing = SharingList(store, Catalog(store, UserLimits()), upkeep)
    found: dict[str, Any] = {"blobs": store.blobs.sealed, "uses": uses}
    _, cost = await steps.of(upkeep.caught_up)
    found["catch up"] = shown(cost)
    found["sets"] = len(store.sharing.on("host").sets)

    def page(token: str = "", reference: str = "") -> Callable[[], Awaitable[inspection_pb2.ListSharingResponse]]:
        return lambda: listing.page(WHO, inspection_pb2.ListSharingRequest(page_token=token, reference=reference), "")

    first, cost = await steps.of(page())
    found["first page"] = shown(cost)
    _, cost = await steps.of(page())
    found["first page again"] = shown(cost)
    if first.next_page_token:
        second, cost = await steps.of(page(first.next_page_token))
        found["second page"] = shown(cost)
        if second.next_page_token:
            _, cost = await steps.of(page(second.next_page_token))
            found["third page"] = shown(cost)
    digest = f"sha256:{checkpoints // 2:064x}"
    of_one, cost = await steps.of(page(reference=digest))
    found["pairs of one"] = shown(cost)
    found["rows"] = [len(first.pairs), len(of_one.pairs)]
    one = next(one for one in store.checkpoints.values() if one.key.content_digest == digest)
    store.index.pin(one, 0)
    _, cost = await steps.of(upkeep.caught_up)
    found["after a pin"] = shown(cost)
    store.index.unpin(one, 0)
    for blob in one.unique.values():
        blob.holds += 1  # so that it stays, for the next load
    store.evict(one, "removed")
    _, cost = await steps.of(upkeep.caught_up)
    found["after an eviction"] = shown(cost)
    books.add(checkpoints, list(one.unique.values()))
    _, cost = await steps.of(upkeep.caught_up)
    found["after a load"] = shown(cost)
    return found


def memory(shape: str, checkpoints: int, blobs: int) -> float:
    """Bytes of the index for each use of a blob."""
    books = Books()
    uses = fill(books, shape, checkpoints, blobs)
    tracemalloc.start()
    while books.store.sharing.go_on():
        pass
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return round(size / uses, 1)


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=1000)
    parser.add_argument("--blobs", type=int, default=1_000_000)
    parser.add_argument("--shapes", default="families,base,halves")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    for shape in options.shapes.split(","):
        results[shape] = asyncio.run(measure(shape, options.checkpoints, options.blobs))
        results[shape]["bytes a use"] = memory(shape, options.checkpoints // 10, options.blobs // 10)
        print(shape, results[shape], file=sys.stderr, flush=True)
    if options.format == "json":
        print(json.dumps(results))
        return
    print(results.pop("machine"))
    for shape, found in results.items():
        print(f"\n{shape}\n\n| what | CPU ms | longest step ms |\n|---|---|---|")
        for what, value in found.items():
            cells = f"{value['ms']} | {value['step_ms']}" if isinstance(value, dict) else f"{value} |"
            print(f"| {what} | {cells} |")


if __name__ == "__main__":
    main()
