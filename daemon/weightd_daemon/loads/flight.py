"""A load in progress, and its waiters."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from weightd.errors import WeightdError
from weightd_daemon.core.events import LoadBegun, LoadEnded

from .pace import LoadPace
from .request import LoadOutcome, LoadRequest, LoadStatus
from .waiting import happens

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from weightd_daemon.core.checkpoint import Checkpoint
    from weightd_daemon.core.revision import BooksRevision


class InFlightLoad:
    """A load under way, and the requests that wait for it. One that `composes` has neither files nor an intake.

    `begun` is when it was asked for, in seconds since the epoch; `revision` moves when it ends, or waiters come or go.
    """

    task: asyncio.Task[None]
    """What executes it; there before anybody else can see the load."""

    def __init__(
        self, request: LoadRequest, intake: int, begun: float, revision: BooksRevision, *, composes: bool = False
    ) -> None:
        self.request = request
        self.composes = composes
        self.begun = begun
        self._revision = revision
        self.intake = intake
        """The descriptor that brings the files, until a loader has it; -1 then."""
        self.progress = LoadStatus()
        self._pace = LoadPace()
        self.detached = request.detached
        self.announced = 0
        """Bytes that it will bring; 0 before that is known, and when they are there."""
        self.number = 0
        """Its number in the books; 0 before it has one."""
        self.evicted: list[str] = []
        """What had to go for it: names, or digests, of checkpoints of its sharing domain."""
        self.evicted_others = 0
        """How many of other domains had to go."""
        self.abandoned = False
        """Whether it was cancelled because nobody waits for it any more."""
        self.waiters: dict[int, LoadRequest] = {}
        self.done: asyncio.Future[tuple[Checkpoint, LoadOutcome]] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Event()
        self.loader_there = asyncio.Event()
        """Set when a loader has the intake: the files may come."""
        self.files_there = asyncio.Event()
        """Set when the loader has the files."""

    def join(self, waiter: int, request: LoadRequest) -> None:
        """One more waits for it."""
        self.waiters[waiter] = request
        self.detached = self.detached or request.detached
        self._revision.move()

    def leave(self, waiter: int) -> None:
        """One no longer waits. What a detached request asks for, a name or a pin, stays wanted."""
        request = self.waiters.pop(waiter, None)
        if request is not None:
            self._revision.move()
            if request.detached:
                self.waiters[-waiter] = request

    def succeed(self, checkpoint: Checkpoint, outcome: LoadOutcome) -> None:
        """Tell those who wait that it has succeeded; nothing happens where they have been told how it went."""
        if not self.done.done():
            self.done.set_result((checkpoint, outcome))
            self._revision.move()

    def fail(self, error: WeightdError) -> None:
        """Tell those who wait that it has failed; nothing happens where they have been told how it went."""
        if not self.done.done():
            # Without its traceback: that would keep the load's steps, and they a list of all its tensors.
            self.done.set_exception(error.with_traceback(None))
            self.done.exception()  # seen: a load without waiters must not warn about it
            self._revision.move()

    def cancel(self, error: WeightdError) -> None:
        """End it now, with an error for those who wait."""
        self.fail(error)
        self.task.cancel()

    def went(self, domain: str, called: str) -> None:
        """A checkpoint was evicted for it. Who loads is not told what those are called that it may not see."""
        if domain == self.request.who.domain:
            self.evicted.append(called)
        else:
            self.evicted_others += 1

    def close_intake(self) -> None:
        """A loader has the files' descriptor, or none will come."""
        if self.intake >= 0:
            os.close(self.intake)
            self.intake = -1

    async def has_loader(self) -> bool:
        """Wait until a loader takes the files; False when the load ends before that."""
        return await happens(self.loader_there, self.done)

    async def has_files(self) -> bool:
        """Wait until the loader has the files; False when the load ends before that."""
        return await happens(self.files_there, self.done)

    def report(self, progress: LoadStatus) -> None:
        """New figures."""
        self.progress = progress
        self._pace.note(asyncio.get_running_loop().time(), progress.phase, progress.done)
        self._changed.set()
        self._changed = asyncio.Event()

    def rate(self) -> float:
        """Bytes a second of its phase, lately; 0 where that is not known."""
        return self._pace.rate(asyncio.get_running_loop().time())

    async def events(self) -> AsyncGenerator[LoadStatus, None]:
        """Progress, at once and until the load is done; its error is not raised here."""
        if not self.done.done():
            yield self.progress
        while not self.done.done():
            if await happens(self._changed, self.done):
                yield self.progress

    def ended(self, begun: LoadBegun, seconds: float) -> LoadEnded:
        """How it went, once it is over."""
        error = self.done.exception()
        evicted = tuple(self.evicted), self.evicted_others
        if error is not None:
            reason = error.reason if isinstance(error, WeightdError) else "INTERNAL"
            reason = "CANCELLED" if self.abandoned else reason
            return LoadEnded(begun, reason, str(error), seconds, "", 0, 0, 0, *evicted)
        _, outcome = self.done.result()
        return LoadEnded(
            begun, "OK", "", seconds, outcome.content_digest,
            outcome.total_bytes, outcome.unique_bytes, outcome.read_bytes, *evicted,
        )  # fmt: skip
