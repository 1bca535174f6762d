"""A target of fuzzing, and what must hold of every input: a value or a clear error, soon, and nothing left behind."""

from __future__ import annotations

import contextlib
import re
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple, NoReturn

CPU_SECONDS = 5.0
"""Processor time of one input: on a busy machine an input takes longer by the clock, and no more of this."""
WAITED_SECONDS = 60.0
"""Time of one input by the clock: what waits takes no processor time."""
MOST_ERROR_TEXT = 4000
"""Characters of an error. A path, a name and a value may all be quoted in one."""

_UNCLEAR = re.compile(r"Traceback|object at 0x|\bby a bug\b")


class Target(NamedTuple):
    """Something that reads hostile bytes. `run` returns a value, or raises one of `errors`; all else is a fault.

    `modules` are those that a coverage-guided fuzzer is to watch. With `passes_on` errors may have the words of the
    other end, which whoever shows them has to quote (client/weightd/cli/output.py). `peak_bytes` is the most memory
    that Python may allocate at a time for an input of the corpus, of which none is over 16 KiB.
    """

    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    modules: tuple[str, ...]
    passes_on: bool = False
    peak_bytes: int = 16 << 20


class HungUpError(Exception):
    """The connection was ended: that is how a frame is refused that is none. The message is the line of the log."""


def outcome(target: Target, data: bytes) -> str:
    """Run a target on an input. Returns its error, or "" for a value. Raises what is a fault."""
    try:
        target.run(data)
    except target.errors as error:
        check_clear(error, passes_on=target.passes_on)
        return str(error)
    return ""


def check_clear(error: Exception, *, passes_on: bool) -> None:
    """An error is one printable line of bounded length."""
    text = str(error)
    assert text.strip(), f"{type(error).__name__} says nothing"
    if passes_on:
        return
    assert text.isprintable(), f"not a printable line: {text!r:.300}"
    assert len(text) <= MOST_ERROR_TEXT, f"{len(text)} characters: {text[:200]}"
    assert not _UNCLEAR.search(text), text[:300]


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Fail what takes more than CPU_SECONDS of this process, or has taken more than WAITED_SECONDS by the clock."""

    def too_slow(_: int, frame: FrameType | None) -> NoReturn:
        raise AssertionError(f"more than {CPU_SECONDS} s of processor time, in {frame}")

    before = signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    begun = time.monotonic()
    try:
        yield
        waited = time.monotonic() - begun
        assert waited <= WAITED_SECONDS, f"{waited:.0f} s by the clock"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def in_little_memory(most: int) -> Iterator[None]:
    """Fail what has Python allocate more than `most` bytes at a time."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
        assert peak <= most, f"{peak} bytes were allocated at a time"
    finally:
        tracemalloc.stop()
