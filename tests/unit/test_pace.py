"""The pace of a load: what a progress bar needs, and no more memory than that."""

from __future__ import annotations

import pytest

from weightd_daemon.loads.pace import WINDOW_SECONDS, LoadPace

MIB = 1 << 20


def test_a_steady_load_has_its_rate_and_a_faster_one_soon_the_new() -> None:
    pace = LoadPace()
    assert pace.rate(0.0) == 0
    done = 0
    for tick in range(100):
        pace.note(tick * 0.1, "copying", done)
        done += MIB
    assert pace.rate(9.9) == pytest.approx(10 * MIB, rel=0.05)
    for tick in range(100, 170):
        pace.note(tick * 0.1, "copying", done)
        done += 3 * MIB
    assert pace.rate(16.9) == pytest.approx(30 * MIB, rel=0.05), "what lies before the window counts no more"


def test_one_that_stops_gets_slower_and_then_has_none() -> None:
    pace = LoadPace()
    for tick in range(20):
        pace.note(tick * 0.5, "copying", tick * MIB)
    rates = [pace.rate(9.5 + seconds) for seconds in (0, 1, 2)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0
    pace.note(30.0, "copying", 19 * MIB)
    assert pace.rate(30.0 + 2 * WINDOW_SECONDS) == 0


def test_a_phase_begins_anew() -> None:
    pace = LoadPace()
    pace.note(0.0, "hashing", 0)
    pace.note(1.0, "hashing", 100 * MIB)
    pace.note(1.5, "copying", 0)
    assert pace.rate(1.5) == 0
    pace.note(2.5, "copying", MIB)
    assert pace.rate(2.5) == MIB
    pace.note(2.6, "copying", 0)
    assert pace.rate(3.0) == 0


def test_it_keeps_little_however_often_it_is_told() -> None:
    pace = LoadPace()
    for tick in range(100_000):
        pace.note(tick * 0.001, "copying", tick)
    assert len(pace._samples) < 50
    assert pace.rate(99.999) == pytest.approx(1000, rel=0.05)
