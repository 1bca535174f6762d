"""Steps that look for GPUs and open them, each on a thread that nobody waits for longer than a call may take.

Before a GPU is open it has no thread of its own (devices/driver_thread.py), and no call of the driver can be ended
from outside. So a step whose call does not come back is left behind. There is one of a kind at most: as long as it
hangs, whoever wants the same hears so at once, and no try adds a thread.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from weightd.errors import DeviceError

from .driver_thread import ANSWER_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

T = TypeVar("T")

CALL_SECONDS = ANSWER_SECONDS
"""How long a call may take, as later."""
START_SECONDS = 60.0
"""How long cuInit may take, and a holder until it is ready. cuInit makes every GPU of the machine ready that is not:
where persistence mode is off, that takes a second or more for each.
"""
HOLDER_SECONDS = START_SECONDS + 2 * ANSWER_SECONDS
"""How long the start of a holder may take, which ends by itself before: with what NVML is asked first, and with the end
of a holder that was not ready in time.
"""


class OpeningStep(Generic[T]):
    """A step, and whoever waits for it. `kind` and `subject` are what it is about, for the log and for whoever waits.

    What comes back after it was given up goes to `undo`, on the thread.
    """

    def __init__(self, kind: str, subject: str, step: Callable[[], T], undo: Callable[[T], object]) -> None:
        self._kind, self._subject = kind, subject
        self._changed = threading.Condition()
        """Guards what follows."""
        self._call, self._since, self._seconds = "its first call", time.monotonic(), CALL_SECONDS
        self._ended = self._given_up = False
        self._result: T | None = None
        self._error: BaseException | None = None
        # It is no thread that the interpreter waits for in the end: a call may never return.
        threading.Thread(target=self._run, args=(step, undo), name="weightd-opening", daemon=True).start()

    def result(self) -> T:
        """Wait for the result; once. Errors: those of the step; DeviceError (a call has not come back in its time)."""
        with self._changed:
            try:
                self._wait()
            except DeviceError:
                self._given_up = True
                raise
            result, error = self._result, self._error
            self._result = self._error = None  # whoever has it decides how long it lives
        if error is not None:
            raise error
        return cast("T", result)

    def wait(self) -> None:
        """Wait until the step has ended, whoever has its result. Errors: DeviceError (a call has not come back)."""
        with self._changed:
            self._wait()

    def next_call(self, call: str, seconds: float) -> None:
        """The step makes its next call; on the thread."""
        with self._changed:
            self._call, self._since, self._seconds = call or self._call, time.monotonic(), seconds or self._seconds
            self._changed.notify_all()

    def _wait(self) -> None:
        while not self._ended:
            left = self._since + self._seconds - time.monotonic()
            if left <= 0:
                raise self._late()
            self._changed.wait(left)

    def _late(self) -> DeviceError:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - (time.monotonic() - self._since)))
        return DeviceError(f"{self._subject} does not answer since {since}, in {self._call}", {"call": self._call})

    def _run(self, step: Callable[[], T], undo: Callable[[T], object]) -> None:
        _here.step = self
        result, error = None, None
        try:
            result = step()
        except BaseException as caught:  # noqa: BLE001  # whatever it is, it is the waiter's
            error = caught
        with self._changed:
            if not self._given_up:
                self._result, self._error = result, error
                self._end()
                return
        log.warning("%s answers again", self._kind)
        try:
            if error is None:
                undo(cast("T", result))
        except Exception:
            log.exception("what came too late is not undone by a bug")
        finally:
            with self._changed:
                self._end()

    def _end(self) -> None:
        self._ended = True
        self._changed.notify_all()


_here = threading.local()
"""The step that the thread takes, if it is that of one."""
_steps: dict[str, OpeningStep[object]] = {}
"""The last step of each kind: of this process, for so is the driver."""
_steps_lock = threading.Lock()


def begin(kind: str, subject: str, step: Callable[[], T], undo: Callable[[T], object]) -> OpeningStep[T]:
    """Begin a step, after the one of its kind that is under way. Errors: DeviceError (that one hangs)."""
    while True:
        with _steps_lock:
            before = _steps.get(kind)
            if before is None or before._ended:
                begun = OpeningStep(kind, subject, step, undo)
                _steps[kind] = cast("OpeningStep[object]", begun)
                return begun
        before.wait()


def next_call(call: str = "", seconds: float = 0.0) -> None:
    """The step on this thread makes its next call, which has its own time; the same call again where nothing is said.

    Without `seconds` it has as long as the last one, CALL_SECONDS if `call` is another. On the thread of no step, this
    is nothing to anybody.
    """
    step: OpeningStep[object] | None = getattr(_here, "step", None)
    if step is not None:
        step.next_call(call, seconds or (CALL_SECONDS if call else 0.0))
