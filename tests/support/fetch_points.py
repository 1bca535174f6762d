"""`python -m support.fetch_points WHEN POINT N PROGRAM …`: a program of the fleet's that kills itself at a named point.

POINT is one of weightd/_failpoints.py, which stand before a step. WHEN is "before", or "after": when the function that
takes the step has returned. The point is reached for the N-th time; PROGRAM is "asking" or "agent".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from weightd import _failpoints
from weightd_fleet.agent import __main__ as agent_program
from weightd_fleet.agent import asking


def install(when: str, point: str, number: int) -> None:
    """Have the process kill itself before or after a point is reached for the `number`-th time."""
    counting, left = threading.Lock(), number

    def reach(reached: str) -> None:
        nonlocal left
        if reached != point:
            return
        with counting:
            left -= 1
            due = not left
        if due and when == "before":
            _die()
        if due:
            frame = sys._getframe(1)
            sys.settrace(lambda *_: None)  # or Python looks at no frame
            frame.f_trace = _ended

    _failpoints.reach = reach


def _ended(_: FrameType, event: str, __: Any) -> Any:
    if event == "return":
        _die()
    return _ended


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    when, point, number, program, *rest = sys.argv[1:]
    install(when, point, int(number))
    sys.exit({"asking": asking.main, "agent": agent_program.main}[program](rest))
