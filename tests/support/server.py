"""A server of examples/, started as its user starts it, with all its worker processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self
from urllib.parse import quote

from support.daemon import ROOT, environment, eventually
from support.http import ask
from support.leash import leashed

EXAMPLES = ROOT / "examples"
# Its sitecustomize.py holds each process that starts Python anew, such as uvicorn's workers, to its parent.
_HELD = ROOT / "tests" / "support" / "held"


class Server:
    """The process that owns the workers: `argv` is a module with its arguments, which listens at `socket`."""

    def __init__(self, argv: list[str], socket: Path, daemon: Path, checkpoint: Path) -> None:
        self.socket = socket
        self.log = socket.with_suffix(".log")
        variables = environment(daemon) | {"CHECKPOINT": str(checkpoint), "OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] += f"{os.pathsep}{EXAMPLES}{os.pathsep}{_HELD}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                leashed([sys.executable, "-m", *argv]),
                env=variables, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):  # the group lives as long as one of its processes does
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
        print(self.log.read_text())

    def get(self, text: str) -> tuple[int, dict[str, object]]:
        """Status and answer to a request for a text's scores."""
        path = f"/scores?text={quote(text)}"
        status, _, body = ask(self.socket, f"GET {path} HTTP/1.1\r\nHost: it\r\nConnection: close\r\n\r\n".encode())
        return status, json.loads(body)

    def answers(self, count: int, text: str, without: tuple[int, ...] = ()) -> dict[int, list[float]]:
        """Scores by worker, as soon as `count` of them have answered; none may be one of `without`."""
        found: dict[int, list[float]] = {}

        def asked() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):  # it does not listen yet
                status, answer = self.get(text)
                assert status == 200, answer
                pid, scores = answer["pid"], answer["scores"]
                assert isinstance(pid, int)
                assert isinstance(scores, list)
                assert pid not in without
                assert found.setdefault(pid, scores) == scores
            return len(found) == count

        eventually(asked, what=f"{count} workers that answer")
        return found
