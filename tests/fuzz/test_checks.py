"""The checks of an input themselves: each fails what it is to fail."""

from __future__ import annotations

import time

import pytest

from support.fuzzing import target
from support.fuzzing.target import Target, in_little_memory, in_time, outcome


def compute() -> None:
    while True:
        pass


def test_what_computes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "CPU_SECONDS", 0.05)
    with pytest.raises(AssertionError, match=r"more than 0\.05 s of processor time"), in_time():
        compute()


def test_what_waits_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "WAITED_SECONDS", 0.01)
    with pytest.raises(AssertionError, match="by the clock"), in_time():
        time.sleep(0.05)


def test_what_takes_too_much_memory() -> None:
    with pytest.raises(AssertionError, match="bytes were allocated"), in_little_memory(1 << 20):
        bytearray(2 << 20)


@pytest.mark.parametrize("text", ["", "two\nlines", "x" * 5000, "<object at 0x7f00>", "Traceback (most"])
def test_an_error_that_is_not_clear(text: str) -> None:
    def refuse(_: bytes) -> None:
        raise ValueError(text)

    with pytest.raises(AssertionError):
        outcome(Target(refuse, (ValueError,), ()), b"")


def test_an_error_that_a_target_does_not_document() -> None:
    def fail(_: bytes) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        outcome(Target(fail, (ValueError,), ()), b"")
