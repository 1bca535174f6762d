"""What a process does at a failpoint: what a file says that a test writes, and only the first that comes there."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

from weightd import _failpoints

ACTIONS = ("error", "delay", "kill")
DELAY_SECONDS = 0.3
VARIABLE = "FAILPOINTS_ARMED_BY"
FOLDER = Path(__file__).parent / "injected"


class Trigger:
    """The test's end: arms one point at a time, in all processes that were started with `variables`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs in its environment, beside PYTHONPATH with what it imports."""
        return {VARIABLE: str(self._path)}

    def arm(self, point: str, action: str) -> None:
        """Have the first process that reaches a point fail there."""
        _reached(self._path).unlink(missing_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_text(f"{point} {action}")
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
            wanted, action = path.read_text().split()
            if point != wanted:
                return
            beside = path.with_suffix(f".{os.getpid()}")
            path.rename(beside)  # one process, and one thread of it, gets this far
        except FileNotFoundError:
            return
        beside.write_text(str(time.time()))
        beside.rename(_reached(path))
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "delay":
            time.sleep(DELAY_SECONDS)
        else:
            raise OSError(errno.ENOMEM, f"failpoint {point}")

    _failpoints.reach = reach


def _reached(path: Path) -> Path:
    return path.with_suffix(".reached")
