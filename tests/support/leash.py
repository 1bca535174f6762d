"""Processes that end with the test that started them, also when it is killed: the kernel kills them then."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def leashed(argv: Sequence[str]) -> list[str]:
    """What to run instead of a command; from the main thread only, for the end of another would kill it at once."""
    assert threading.current_thread() is threading.main_thread()
    return [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), *argv]


def hold() -> None:
    """Have this process killed when its parent ends. A change of user undoes it; children do not inherit it."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError("prctl(PR_SET_PDEATHSIG) is refused")


def main() -> None:
    """Hold on to the parent, then become the command, which keeps that."""
    hold()
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the test has ended already")
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
