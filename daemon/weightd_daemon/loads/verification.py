"""Verifications: a loader hashes resident blobs again, in a task that never waits for the reader of its results."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import islice
from typing import TYPE_CHECKING

from weightd.errors import LeaseLostError, WeightdError
from weightd_daemon.devices.device import DeviceSegment
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.channel import error_of
from weightd_daemon.turns import LoopTurn

from .loader_memory import make_room_for_verifying
from .loader_process import LoadProcess, LoadProcessDiedError
from .messages import verify_job
from .waiting import happens

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence

    from weightd_daemon.core.blob import Blob
    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.lease import LeasePeer
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.core.store import ContentStore
    from weightd_daemon.devices.device import Device

    from .fair_queue import LoadQueue
    from .loader_pool import LoadProcessPool
    from .quota import LoadQuota

BATCH = 2000
"""Blobs of one job. All of a checkpoint in one message would be a long step of the loop."""


class LoadVerification:
    """Progress of a check, by a loader, of what was loaded. Its reader sees the newest figures, at any pace.

    `done` has the numbers of the blobs that differ, or the error. `chosen` is what is verified, once its turn has come.
    """

    task: asyncio.Task[None]
    """What verifies; there from the beginning on."""

    def __init__(self) -> None:
        self.chosen: list[Checkpoint] = []
        self.total_blobs = self.total_bytes = 0
        self.done_blobs = self.done_bytes = 0
        self.done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()

    async def changes(self) -> AsyncGenerator[None, None]:
        """Whenever the figures have changed, until it is done; its error is not raised here."""
        while not self.done.done():
            if await happens(self._changed, self.done) and not self.done.done():
                self._changed.clear()
                yield

    def report(self, done_blobs: int, done_bytes: int) -> None:
        """New figures; they take the place of those that nobody has read."""
        self.done_blobs, self.done_bytes = done_blobs, done_bytes
        self._changed.set()

    def cancel(self) -> None:
        """Nobody wants to know: end it, and give back what it has."""
        self.task.cancel()


class LoadVerifications:
    """Starts checks of what was loaded, in loader processes. Each has a turn of its user, and leases, until it ends."""

    def __init__(
        self, *, store: ContentStore, devices: dict[str, Device], pool: LoadProcessPool, fair_queue: LoadQueue,
        quota: LoadQuota, now: Callable[[], float],
    ) -> None:  # fmt: skip
        self._store = store
        self._devices = devices
        self._pool = pool
        self._fair_queue = fair_queue
        self._quota = quota
        self._now = now
        self._tasks: set[asyncio.Task[None]] = set()
        self._loaders: dict[LoadProcess, str] = {}

    def begin(
        self,
        who: Principal,
        peer: LeasePeer,
        choose: Callable[[], list[Checkpoint]],
        loss: Callable[[Checkpoint], WeightdError],
    ) -> LoadVerification:
        """Verify what `choose` returns when the turn has come. `loss` says why a checkpoint is not resident any more.

        Errors: DrainingError, and those of `choose`, which is called for them at once; later ones are `done`'s.
        """
        self._store.leases.admit()
        choose()
        verification = LoadVerification()
        task = asyncio.get_running_loop().create_task(self._run(verification, who, peer, choose, loss))
        verification.task = task
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._end(task, verification))
        return verification

    def lose(self, device: str) -> None:
        """The memory of a device is gone: nothing there is verified any more."""
        for loader, where in self._loaders.items():
            if where == device:
                loader.kill()

    async def close(self) -> None:
        """End all of them."""
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _end(self, task: asyncio.Task[None], verification: LoadVerification) -> None:
        self._tasks.discard(task)
        if not verification.done.done():  # a task that is cancelled before its first step never ran
            verification.done.set_exception(LeaseLostError("the verification was ended; verify again"))
            verification.done.exception()  # seen: nobody may have waited for it

    async def _run(
        self,
        verification: LoadVerification,
        who: Principal,
        peer: LeasePeer,
        choose: Callable[[], list[Checkpoint]],
        loss: Callable[[Checkpoint], WeightdError],
    ) -> None:
        try:
            async with self._fair_queue.turn(who.uid):
                chosen = verification.chosen = choose()
                self._quota.check_leases(who, len(chosen))
                leases = [self._store.leases.begin(c.key, peer, self._now(), waiting=True) for c in chosen]

                def check() -> None:
                    for checkpoint in chosen:  # a lease keeps it resident, but not from a loss
                        if self._store.checkpoints.get(checkpoint.key) is not checkpoint:
                            raise loss(checkpoint)

                try:
                    bad = await self._verify(verification, check)
                    check()
                finally:
                    for lease in leases:
                        self._store.leases.end(lease.number)
            verification.done.set_result(bad)
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the reader's
            verification.done.set_exception(error)
            verification.done.exception()

    async def _verify(self, verification: LoadVerification, check: Callable[[], None]) -> list[int]:
        blobs: dict[str, dict[int, Blob]] = {uuid: {} for uuid in self._devices}
        turn = LoopTurn()
        for checkpoint in verification.chosen:
            here = blobs[checkpoint.key.device]
            for batch in _batches(list(checkpoint.unique.values())):
                here.update({blob.number: blob for blob in batch})
                if turn.is_over:
                    await turn.next()
        for here in blobs.values():
            verification.total_blobs += len(here)
            for batch in _batches(here.values()):
                verification.total_bytes += sum([blob.key.length for blob in batch])
                if turn.is_over:
                    await turn.next()
        check()
        bad: list[int] = []
        for uuid, here in blobs.items():
            for batch in _batches(here.values()):
                bad += await self._hash(verification, self._devices[uuid], batch, check)
        return bad

    async def _hash(
        self, verification: LoadVerification, device: Device, blobs: Sequence[Blob], check: Callable[[], None]
    ) -> list[int]:
        """Have a loader hash blobs. Returns the numbers of those that differ. Errors: LeaseLostError (it died)."""
        loader = await self._pool.acquire()
        usable = False
        self._loaders[loader] = device.uuid
        blobs_before, bytes_before = verification.done_blobs, verification.done_bytes
        try:
            check()
            rows = [(b.number, b.segment, b.offset, b.length, b.key.digest) for b in blobs]
            size = self._store.memories[device.uuid].size
            segments = [DeviceSegment(n, size(n), device.writable(n)) for n in {blob.segment for blob in blobs}]
            await loader.send(verify_job(rows, device), segments)
            bad: list[int] = []
            found = wire.Verified()
            while not found.all:
                message = await loader.receive()
                check()
                if message.HasField("failed"):
                    raise error_of(message.failed)
                if message.HasField("full"):
                    await make_room_for_verifying(device, self._pool, message.full.call)
                    await loader.send(wire.ToLoader(full=wire.Freed()))
                    continue
                found = message.verified
                bad += found.bad
                if not found.all:
                    verification.report(blobs_before + found.blobs, bytes_before + found.bytes)
            verification.report(blobs_before + len(rows), bytes_before + sum(blob.length for blob in blobs))
            usable = await self._pool.put_back(loader)
            return bad
        except LoadProcessDiedError:
            check()
            raise LeaseLostError("the loader process died while it verified; try again") from None
        finally:
            del self._loaders[loader]
            if not usable:
                loader.kill()


def _batches(blobs: Collection[Blob]) -> Iterator[list[Blob]]:
    left = iter(blobs)
    while batch := list(islice(left, BATCH)):
        yield batch
