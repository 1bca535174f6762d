"""What a process does at a failpoint: what a file says that a test writes, and only the first that comes there."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from weightd import _failpoints
from weightd._limits import limit_error
from weightd.errors import DaemonUnreachableError, DeviceError, FormatError, ResourceLimitError

ACTIONS = ("error", "delay", "kill")
DELAY_SECONDS = 0.3
VARIABLE = "FAILPOINTS_ARMED_BY"
FOLDER = Path(__file__).parent / "injected"


def _out_of_memory(point: str) -> OSError:
    return OSError(errno.ENOMEM, f"failpoint {point}")


def _limit(point: str) -> ResourceLimitError:
    error = limit_error(_out_of_memory(point), f"failpoint {point}")
    assert error is not None  # ENOMEM is a limit
    return error


def _of_driver(code: str, point: str) -> DeviceError:
    return DeviceError(f"failpoint {point}: {code}", {"code": code, "call": f"failpoint {point}"})


ERRORS: Mapping[str, Callable[[str], Exception]] = {
    "OSError": _out_of_memory,
    "ResourceLimitError": _limit,
    "DaemonUnreachableError": lambda point: DaemonUnreachableError(f"failpoint {point}"),
    "FormatError": lambda point: FormatError(f"failpoint {point}: {os.strerror(errno.EIO)}"),
    "MemoryError": lambda point: MemoryError(f"failpoint {point}"),
    "DeviceError, out of memory": lambda point: _of_driver("CUDA_ERROR_OUT_OF_MEMORY", point),
    "DeviceError, a dead context": lambda point: _of_driver("CUDA_ERROR_ILLEGAL_ADDRESS", point),
}
"""What "error" raises, by the name that a point gives: an error that the step which follows can really raise."""


class Trigger:
    """The test's end: arms one point at a time, in all processes that were started with `variables`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs in its environment, beside PYTHONPATH with what it imports."""
        return {VARIABLE: str(self._path)}

    def arm(self, point: str, action: str, error: str = "OSError") -> None:
        """Have the first process that reaches a point fail there; `error` is one of ERRORS."""
        _reached(self._path).unlink(missing_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(f"{point} {action} {error}")
        beside.rename(self._path)

    def disarm(self) -> None:
        self._path.unlink(missing_ok=True)

    def reached(self) -> float | None:
        """When the point that was armed last was reached, in seconds since the epoch; None: it was not yet."""
        try:
            return float(_reached(self._path).read_text())
        except (FileNotFoundError, ValueError):
            return None


def install(armed: str) -> None:
    """Have this process do at a failpoint what the file `armed` says."""
    path = Path(armed)

    def reach(point: str) -> None:
        try:
            wanted, action, error = path.read_text().split(maxsplit=2)
            if point != wanted:
                return
            beside = path.with_suffix(f".{os.getpid()}")
            path.rename(beside)  # one process, and one thread of it, gets this far
        except FileNotFoundError:
            return
        done = beside.with_name(f"{beside.name}.done")  # another file: a thread may still read the one that was there
        done.write_text(str(time.time()))
        done.rename(_reached(path))
        beside.unlink()
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "delay":
            time.sleep(DELAY_SECONDS)
        else:
            raise ERRORS[error](point)

    _failpoints.reach = reach


def _reached(path: Path) -> Path:
    return path.with_suffix(".reached")
