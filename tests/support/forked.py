"""A forked child of a worker that does what a test tells it, also when its parent is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.worker import Worker

_FORK = """
import os, sys
forked_pid = os.fork()
if forked_pid == 0:
    from support.worker import serve
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # the parent's pipes are not the child's to hold
    os.dup2(nothing, 1)
    with open(orders) as there, open(answers, "w") as back:
        serve(there, back, globals())
    os._exit(0)
result = forked_pid
"""


class Forked:
    """The child of `Worker.run(os.fork())`: it has every name that the worker had, and outlives it."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        orders, answers = folder / f"orders-{worker.pid}", folder / f"answers-{worker.pid}"
        os.mkfifo(orders)
        os.mkfifo(answers)
        self.pid: int = worker.run(_FORK, orders=str(orders), answers=str(answers))
        self._orders = orders.open("w")
        self._answers = answers.open()

    def run(self, source: str, **names: object) -> Any:
        """Execute `source` there; errors are raised here as AssertionError."""
        self._orders.write(json.dumps({"source": source, "names": names}) + "\n")
        self._orders.flush()
        line = self._answers.readline()
        if not line:
            raise AssertionError(f"the forked child {self.pid} ended")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Let it end by itself."""
        self._orders.close()
        self._answers.close()

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def fork(worker: Worker, folder: Path) -> Iterator[Forked]:
    """Fork a worker; the child ends with the block."""
    child = Forked(worker, folder)
    try:
        yield child
    finally:
        child.close()
