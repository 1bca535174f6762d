"""Turns: a task with much to do lets others go on, and a thread hands the interpreter on."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from support.daemon import environment
from weightd_daemon.turns import TURN_SECONDS, LoopTurn


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is: one number, to be changed."""
    now = [100.0]
    monkeypatch.setattr("weightd_daemon.turns.time.perf_counter", lambda: now[0])
    return now


def test_a_turn_ends_after_a_while_and_the_next_one_begins_when_others_have_had_theirs(clock: list[float]) -> None:
    async def run() -> None:
        turn = LoopTurn()
        assert not turn.is_over
        clock[0] += 1.1 * TURN_SECONDS
        assert turn.is_over
        await turn.next()
        assert not turn.is_over
        clock[0] += 0.9 * TURN_SECONDS
        assert not turn.is_over

    asyncio.run(run())


def test_others_run_between_two_turns() -> None:
    async def run() -> list[str]:
        done: list[str] = []

        async def work(name: str) -> None:
            turn = LoopTurn()
            for _ in range(3):
                done.append(name)
                await turn.next()

        await asyncio.gather(work("a"), work("b"))
        return done

    assert asyncio.run(run()) == ["a", "b"] * 3


def test_threads_hand_the_interpreter_on_within_a_turn() -> None:
    code = "import sys; from weightd_daemon import turns; turns.share_interpreter(); print(sys.getswitchinterval())"
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=True, timeout=60)
    assert float(run.stdout) <= TURN_SECONDS
