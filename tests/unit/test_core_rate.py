"""How often a user may do something."""

from __future__ import annotations

import pytest

from weightd_daemon.core import rate as rate_module
from weightd_daemon.core.rate import UserRateLimit


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_burst_goes_at_once_and_the_rest_at_the_rate(clock: Clock) -> None:
    rate = UserRateLimit(clock, burst=3, per_second=10.0)
    assert [rate.delay(1) for _ in range(5)] == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.2])
    clock.now += 0.2
    assert rate.delay(1) == pytest.approx(0.1)


def test_a_user_waits_for_nobody_else(clock: Clock) -> None:
    rate = UserRateLimit(clock, burst=1, per_second=1.0)
    assert rate.delay(1) == 0.0
    assert rate.delay(1) == pytest.approx(1.0)
    assert rate.delay(None) == 0.0
    assert rate.delay(2) == 0.0


def test_what_is_refused_is_not_entered(clock: Clock) -> None:
    rate = UserRateLimit(clock, burst=1, per_second=1.0)
    assert [rate.delay(1, most=1.5) for _ in range(4)] == [0.0, pytest.approx(1.0), None, None]
    clock.now += 1.0
    assert rate.delay(1, most=1.5) == pytest.approx(1.0)


def test_a_burst_is_saved_up_and_no_more(clock: Clock) -> None:
    rate = UserRateLimit(clock, burst=2, per_second=1.0)
    rate.delay(1)
    clock.now += 1000.0
    assert [rate.delay(1) for _ in range(3)] == pytest.approx([0.0, 0.0, 1.0])


def test_users_are_forgotten_when_they_owe_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_module, "_MOST_USERS", 3)
    rate = UserRateLimit(clock, burst=1, per_second=1.0)
    for uid in (1, 2, 3):
        rate.delay(uid)
    clock.now += 0.5
    rate.delay(3)
    clock.now += 1.0
    rate.delay(4)
    assert set(rate._used) == {3, 4}
