"""Questions that hang: they take a thread each and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from support.daemon import eventually
from weightd_daemon import lookups
from weightd_daemon.lookups import Lookups


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hangs waits for it, and is let go at the end."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_a_question_that_hangs_takes_one_thread_from_its_asker(gate: threading.Event) -> None:
    asked = Lookups("test", threads=2)
    answers: list[str] = []
    assert asked.ask("slow", partial(gate.wait, 60))
    eventually(lambda: asked.under_way == 1)
    assert asked.ask("slow", partial(answers.append, "slow"))
    assert asked.ask("other", partial(answers.append, "other"))
    eventually(lambda: answers == ["other"], what="the other asker's answer")
    assert asked.under_way == 1, "a second question of the one that hangs waits"
    gate.set()
    eventually(lambda: answers == ["other", "slow"], what="the rest")
    eventually(lambda: asked.under_way == 0)


def test_a_question_does_not_wait_behind_one_that_hangs_while_a_thread_may_be_made(gate: threading.Event) -> None:
    asked = Lookups("test", threads=2)
    done = threading.Event()
    assert asked.ask("first", done.set)
    assert done.wait(60)
    eventually(lambda: asked._idle == 1, what="a thread without a question")
    answered = threading.Event()
    assert asked.ask("slow", partial(gate.wait, 60))
    assert asked.ask("other", answered.set)
    assert answered.wait(60)


def test_when_all_hang_a_bounded_number_waits(gate: threading.Event) -> None:
    asked = Lookups("test", threads=2)
    before = threading.active_count()
    taken = [asked.ask(number, partial(gate.wait, 60)) for number in range(lookups._WAITING + 10)]
    assert False in taken
    assert threading.active_count() <= before + 2
    one = Lookups("test", threads=1)
    assert [one.ask("one", partial(gate.wait, 60)) for _ in range(100)].count(True) <= lookups._WAITING_OF_ONE + 1


def test_a_question_that_fails_is_logged_and_the_next_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    asked = Lookups("test", threads=1)
    answered = threading.Event()

    def fail() -> None:
        raise ZeroDivisionError

    asked.ask("a", fail)
    asked.ask("b", answered.set)
    assert answered.wait(60)
    assert "by a bug" in caplog.text
