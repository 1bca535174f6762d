"""A client process that does what a test tells it: the test's end (Worker) and the process itself (main)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from support import template
from support.daemon import environment
from support.leash import leashed

PROGRAM = "support.worker"
IMPORTS = ("torch", "weightd.torch")
"""What most workers of tests import. Neither starts a thread, nor asks for a GPU, when it is imported."""


class Worker:
    """A process of its own. `run` executes source in it and returns what it put in `result`."""

    def __init__(self, socket: Path, more: Mapping[str, str] | None = None) -> None:
        variables = environment(socket) | dict(more or {})
        self.process = template.start(PROGRAM, variables, environment()) or subprocess.Popen(
            leashed([sys.executable, "-m", PROGRAM]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def run(self, source: str, **names: object) -> Any:
        """Execute `source` with `names` set (JSON values). Errors there are raised here as AssertionError."""
        self.start(source, **names)
        return self.finish()

    def start(self, source: str, **names: object) -> None:
        """Begin to execute, without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"source": source, "names": names}) + "\n")
        self.process.stdin.flush()

    def finish(self) -> Any:
        """The result of what was started."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the worker ended with {self.process.wait(60)}")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["result"]

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.close()

    def end(self) -> None:
        """End it when its test is over. That of an interpreter with torch takes longer than most tests do."""
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, or is closed
            self.start("import atexit, os; atexit._run_exitfuncs(); os._exit(0)")
        self.close()

    def close(self) -> None:
        """Let it end as an interpreter does, by force if need be."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)


def serve(orders: TextIO, answers: TextIO, names: dict[str, Any]) -> None:
    """Execute what comes as `orders`, one JSON object a line; names stay from one to the next."""
    for line in orders:
        order = json.loads(line)
        names.update(order["names"], result=None)
        try:
            exec(order["source"], names)  # that is what it is for
            answer = {"result": names["result"]}
        except BaseException:  # noqa: BLE001  # reported to the test
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve standard input; what the executed source and its children print goes to standard error."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as output:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        sys.stdout = sys.stderr
        serve(sys.stdin, output, {})


if __name__ == "__main__":
    if (line := template.line_of(sys.argv[1:])) is None:
        main()
    else:
        template.serve(line, main, IMPORTS)
