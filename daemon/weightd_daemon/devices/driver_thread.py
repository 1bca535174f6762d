"""The thread that makes the calls of one GPU's driver, so that a call that hangs stops neither the loop nor other GPUs.

The driver and NVML take locks of the whole machine, which a process that dies with much memory, a reset or a broken GPU
may hold for seconds or for ever. No call can be ended from outside; so the GPU counts as not answering until its call
comes back, and only those who need that GPU hear of it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from weightd.errors import DeviceAbsentError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .device import Calls

log = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""How long a call may take before its GPU counts as not answering. Calls take milliseconds."""

T = TypeVar("T")


class _Job(NamedTuple):
    """A step, its name for people, and what hears its result or its error, on the thread."""

    call: str
    step: Callable[[], Any]
    done: Callable[[Any, BaseException | None], None]


class _UnderWay(NamedTuple):
    call: str
    since: float
    """On the clock that only goes forward."""


class DriverThread:
    """Makes calls for one device, one after the other.

    `on_change` is told, on the loop, when the device no longer answers, and when it answers again.
    """

    def __init__(self, uuid: str) -> None:
        self._uuid = uuid
        self.on_change: Callable[[], None] = lambda: None
        self.problem = ""
        """What the device does not answer, and since when, for people; empty while it answers."""
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._under_way: _UnderWay | None = None
        self._unfinished = 0
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, call: str, step: Callable[[], T]) -> T:
        """Take a step on the thread, where nothing else is under way. `call` names it, for people.

        Whoever waits may be cancelled; the step is taken all the same. Errors: those of the step.
        """
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[T] = loop.create_future()

        def done(result: T, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._finished, loop, outcome, result, error)

        self._unfinished += 1
        self._add(_Job(call, step, done))
        if self._timer is None:
            self._timer = loop.call_later(ANSWER_SECONDS, self._look, loop)
        return await outcome

    def wait_for(self, call: str, step: Callable[[], T]) -> T:
        """Take a step on the thread, and wait on this one, as while a device is opened. Errors: those of the step."""
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

        def done(result: T, error: BaseException | None) -> None:
            if error is None:
                outcome.set_result(result)
            else:
                outcome.set_exception(error)

        self._add(_Job(call, step, done))
        return outcome.result()

    def check(self) -> None:
        """Errors: DeviceAbsentError, while the device does not answer."""
        if self.problem:
            raise DeviceAbsentError(f"device {self._uuid} is absent: {self.problem}", {"device": self._uuid})

    def stop(self) -> None:
        """End the thread after what it was given. On any thread."""
        self._jobs.put(None)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _add(self, job: _Job) -> None:
        if self._thread is None:
            # It is no thread that the interpreter waits for in the end: a call may never return.
            self._thread = threading.Thread(target=self._work, name="weightd-driver", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._under_way = _UnderWay(job.call, time.monotonic())
            result, error = None, None
            try:
                result = job.step()
            except BaseException as caught:  # noqa: BLE001  # whatever it is, it is the waiter's
                error = caught
            self._under_way = None
            job.done(result, error)
            del job, result, error  # they would live until the next job, and memory with them

    def _finished(
        self, loop: asyncio.AbstractEventLoop, outcome: asyncio.Future[T], result: T, error: BaseException | None
    ) -> None:
        self._unfinished -= 1
        if self.problem:
            log.warning("device %s answers again", self._uuid)
            self.problem = ""
            self.on_change()
            self._look(loop)
        if outcome.cancelled():
            return
        if error is None:
            outcome.set_result(result)
        else:
            outcome.set_exception(error)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look whether the call under way is late; again when it may be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._unfinished:
            return
        under_way = self._under_way
        took = 0.0 if under_way is None else time.monotonic() - under_way.since
        if under_way is None or took < ANSWER_SECONDS:
            self._timer = loop.call_later(ANSWER_SECONDS - took, self._look, loop)
            return
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - took))
        self.problem = f"it does not answer since {since}, in {under_way.call}; what is kept on it stays kept"
        log.warning("device %s does not answer since %s, in %s", self._uuid, since, under_way.call)
        self.on_change()


async def answered(calls: Calls, call: str, step: Callable[[], T], undo: Callable[[T], object]) -> T:
    """Take a step of a device that nobody else uses yet, unless it does not answer.

    Then a step that comes back later is undone, on the thread. Errors: those of the step; DeviceAbsentError.
    """
    lock, left, there = threading.Lock(), threading.Event(), threading.Event()

    def taken() -> T:
        result = step()
        with lock:
            there.set()
            if not left.is_set():
                return result
        undo(result)
        raise DeviceError("it came too late")

    changed = asyncio.Event()
    calls.on_change = changed.set
    waiting = [asyncio.ensure_future(calls.run(call, taken)), asyncio.ensure_future(changed.wait())]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    waiting[1].cancel()
    with lock:
        if not there.is_set() and not waiting[0].done():
            left.set()
    if left.is_set():
        waiting[0].cancel()
        calls.check()
        raise DeviceError("the driver has answered too late")
    result: T = await waiting[0]
    return result


class AnyThread:
    """Takes the steps of a device that has no driver, each on whatever thread is free. It always answers."""

    problem = ""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None

    async def run(self, call: str, step: Callable[[], T]) -> T:
        """Take a step. Errors: those of the step."""
        return await asyncio.to_thread(step)

    def check(self) -> None:
        """Nothing can be wrong."""
