"""Collections of garbage stay short however much is resident, and garbage is still found. In processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from support.daemon import environment

_HEAD = """
import asyncio, gc
from weightd_daemon import heap

class Knot:
    there = 0

    def __init__(self):
        self.itself = self
        Knot.there += 1

    def __del__(self):
        Knot.there -= 1

kept = [[] for _ in range(300_000)]
heap.settle()
looked_at = [0]
def look(phase, told):
    if phase == "start" and told["generation"] == 2:
        looked_at.append(len(gc.get_objects()))
gc.callbacks.append(look)
"""


def run(code: str) -> None:
    """Run the code behind _HEAD. Whatever it asserts holds."""
    argv = [sys.executable, "-c", _HEAD + textwrap.dedent(code)]
    finished = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == 0, finished.stderr


def test_no_collection_looks_at_what_has_been_resident_for_long() -> None:
    run("""
        kept += ([] for _ in range(500_000))
        assert len(looked_at) > 5
        assert max(looked_at) < 100_000, looked_at
    """)


def test_garbage_of_a_daemon_to_which_nothing_comes_is_collected() -> None:
    run("""
        for _ in range(200_000):
            Knot()
        assert len(looked_at) > 3 and not heap._frozen
        assert Knot.there < 60_000
    """)


def test_garbage_that_was_frozen_is_collected_when_little_is_left() -> None:
    run("""
        async def main():
            alive = [Knot() for _ in range(1000)]
            new = [[] for _ in range(200_000)]
            assert heap._frozen
            alive.clear()
            gc.collect()
            new.clear()
            left = [10_000_000]
            heap.PAUSE_SECONDS = 0.01
            for blobs, remaining in ((10_000_000, 1000), (0, 0)):
                left[0] = blobs
                assert Knot.there == 1000
                heap.gone(lambda: left[0])
                heap.gone(lambda: left[0])
                while heap._thawing:
                    await asyncio.sleep(0.01)
                gc.collect()
                assert Knot.there == remaining
        asyncio.run(main())
    """)
