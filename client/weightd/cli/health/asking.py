"""Looks that may hang, each in a process of its own: a GPU's driver, a mount, a daemon, systemd.

A process that hangs in the kernel cannot be killed, and a thread that does keeps its process alive. So nobody waits for
a look that is late: it is killed, and left to itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from weightd.cli.health.finding import Finding, Status

LIMIT_SECONDS = 5.0
"""How long a look may take."""
START_SECONDS = 20.0
"""How long its interpreter may take to start; that is not the look's fault."""
_END_SECONDS = 0.5
_BEGUN = b"begun\n"


class Answer(NamedTuple):
    """What a look has found, or why nothing; `late` is whether it did not answer in time."""

    facts: dict[str, Any]
    problem: str = ""
    late: bool = False

    def failed(self, *checks: str) -> list[Finding]:
        """Findings for checks that this look was for, if it did not answer; none if it did."""
        status = Status.DOUBTFUL if self.late else Status.UNKNOWN
        remedy = "look into the system's log for what hangs: a driver, a mount or a process" if self.late else ""
        return [Finding(check, status, self.problem, remedy) for check in checks] if self.problem else []


class Look:
    """A process that looks; `answer` waits for it. At its end it is killed, and not waited for.

    With `begins` it says when it begins to look, and the limit counts from then.
    """

    def __init__(self, command: Sequence[str], *, begins: bool = False, limit: float = LIMIT_SECONDS) -> None:
        self._limit = limit
        self._begins = begins
        self._problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        try:
            # In a process group of its own, so that Ctrl-C reaches this process only, which then ends it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0
            )
        except OSError as error:
            self._problem = f"{command[0]} cannot be run: {error.strerror}"
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def text(self) -> Answer:
        """All that it prints, as the fact `text`, however it ends."""
        printed, answer = self._read()
        return answer if answer.problem else Answer({"text": printed.decode(errors="replace")})

    def answer(self) -> Answer:
        """Its line of JSON as facts."""
        printed, answer = self._read()
        if answer.problem:
            return answer
        try:
            return Answer(json.loads(printed.removeprefix(_BEGUN)))
        except ValueError:
            return Answer({}, "the look ended without an answer")

    def _read(self) -> tuple[bytes, Answer]:
        if self._process is None or self._process.stdout is None:
            return b"", Answer({}, self._problem)
        descriptor, printed = self._process.stdout.fileno(), b""
        waits_for_begin = self._begins
        deadline = self._started + (START_SECONDS if waits_for_begin else self._limit)
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return b"", Answer({}, f"did not answer in {self._limit:g} s", late=True)
                piece = os.read(descriptor, 1 << 16)
                if not piece:
                    return printed, Answer({})
                printed += piece
                if waits_for_begin and printed.startswith(_BEGUN):
                    waits_for_begin, deadline = False, time.monotonic() + self._limit


def python(module: str, *arguments: str, limit: float = LIMIT_SECONDS) -> Look:
    """Start a module of ours that says when it begins. -P: one in the current directory must not be what starts."""
    command = [sys.executable, "-P", "-m", module, *arguments, f"--parent={os.getpid()}"]
    return Look(command, begins=True, limit=limit)
