"""How a program answers that a command has started: in lines of JSON on standard output.

{"note"} is a choice that nobody asked for, {"what", "done", "total"} is progress in bytes. The last line is {"error",
"message"}, or what the program was asked for. `weightd/cli/programs.py` reads these lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from weightd.errors import WeightdError

from .libc import die_with

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

THREADS: Final = max(2, min(4, os.cpu_count() or 1))
"""How many threads read and hash: two also on one core, so that one reads while the other hashes."""
_PROGRESS_SECONDS: Final = 0.1


class ProgramAnswers:
    """Lines for the command that asks; of those about progress a few in a second."""

    def __init__(self) -> None:
        self._told = 0.0

    def say(self, answer: dict[str, Any]) -> None:
        """Write one line."""
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    def note(self, line: str) -> None:
        """Tell of a choice that nobody asked for."""
        self.say({"note": line})

    def advance(self, what: str, done: int, total: int) -> None:
        """Tell what is done, in bytes, from any thread."""
        now = time.monotonic()
        if now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            self.say({"what": what, "done": done, "total": total})


def answer(
    name: str,
    work: Callable[[argparse.Namespace, ProgramAnswers], dict[str, Any]],
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
) -> int:
    """Parse the arguments, work, and say what `work` returns, or its error. Returns the process's exit code.

    `name` says in errors which program it was. The parser gets the options `--parent` and `--debug`.
    """
    parser.add_argument("--parent", type=int, required=True, help="process that asks; this one dies with it")
    parser.add_argument("--debug", action="store_true")
    options = parser.parse_args(arguments)
    if not die_with(options.parent):  # also by kill -9
        return 1
    answers = ProgramAnswers()
    try:
        found = work(options, answers)
    except WeightdError as error:
        answers.say({"error": error.reason, "message": str(error)})
    except Exception as error:  # noqa: BLE001  # the boundary of the process: whatever broke is the answer
        if options.debug:
            traceback.print_exc()
        answers.say({"error": "INTERNAL", "message": f"{name}: {type(error).__name__}: {error}"})
    else:
        answers.say(found)
    return 0
