"""The watch over a test daemon's loop: what it finds, and what may be the machine's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.daemon import environment
from support.loop_watch import ALLOWED_STEP, FIRST_STEP, FOUND

LOOP = """
import asyncio, ctypes, time
from support import loop_watch

def hold(seconds):  # the interpreter's lock: no other thread can look
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))

async def seen(seconds):
    time.sleep(seconds)

async def stand_still(seconds):
    hold(seconds)

async def another(seconds):
    hold(seconds)

async def allowed(seconds):
    hold(seconds)

async def main():
    watch = loop_watch.Watch()
    watch.begin()
    await asyncio.sleep(0)
    {steps}
    watch.end()

loop_watch.ALLOWED["allowed"] = "by this test"
asyncio.run(main())
"""
ONCE = "await asyncio.create_task(stand_still(0.12))"
VERY_LONG = "await asyncio.create_task(stand_still(0.5))"
ANOTHER = "await asyncio.create_task(another(0.12))"
SEEN = "await asyncio.create_task(seen(0.15))"
ALLOWED = "await asyncio.create_task(allowed(0.5))"
CALLBACK = "asyncio.get_running_loop().call_soon(hold, 0.12); await asyncio.sleep(0)"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], []),
        ([ONCE], [FIRST_STEP]),
        ([ONCE, ANOTHER, CALLBACK], [FIRST_STEP] * 3),
        ([ONCE, ANOTHER, ONCE], [FIRST_STEP, FIRST_STEP, FOUND]),
        ([CALLBACK, CALLBACK], [FIRST_STEP, FOUND]),
        ([VERY_LONG], [FOUND]),
        ([SEEN], [FOUND]),
        ([ALLOWED, ALLOWED], [ALLOWED_STEP] * 2),
    ],
)
def test_a_step_is_found_when_it_was_seen_or_is_the_second_or_very_long(steps: list[str], said: list[str]) -> None:
    program = LOOP.format(steps="\n    ".join(steps))
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("loop watch:")]
    assert [line[: line.index(" a step of")] for line in lines] == [one[: one.index(" a step of")] for one in said], (
        lines
    )
