"""Processes forked from one that has imported torch already, which takes longer than most tests do.

A template is a process of its own, and so is everything that it forks: nothing of the test's own process is in them.
One serves for each set of variables that count when a process starts. It dies with the test's process, and all that was
forked with it (support/leash.py).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

from support import leash
from support.daemon import environment

IMPORTS = ("torch", "weightd.torch")
"""What most workers of tests import. Neither starts a thread, nor asks for a GPU, when it is imported."""
_SET_LATER = ("CUDA_VISIBLE_DEVICES", "FAKECUDA_", "WEIGHTD_")
"""Variables, by how they begin, that nobody reads before they are needed."""


class ForkedProcess:
    """A process forked by a template; the part of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, stdin: int, stdout: int, ended: int) -> None:
        self.pid = pid
        self.stdin: TextIO = os.fdopen(stdin, "w")
        self.stdout: TextIO = os.fdopen(stdout)
        self.returncode: int | None = None
        self._ended = ended

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit code, or less than 0 for a signal. Errors: subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired("support.worker", timeout)
            told = os.read(self._ended, 16)
            os.close(self._ended)
            self.returncode = int(told or -signal.SIGKILL)  # with its keeper, who says nothing any more
        return self.returncode

    def kill(self) -> None:
        """kill -9, unless it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ends at this very moment
                os.kill(self.pid, signal.SIGKILL)


class _Template:
    """The test's end of a template."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._line, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                leash.leashed([sys.executable, "-m", "support.worker", str(other.fileno())]),
                stdin=subprocess.DEVNULL, env=dict(variables), pass_fds=[other.fileno()],
            )  # fmt: skip

    def fork(self, variables: Mapping[str, str]) -> ForkedProcess:
        """A process with other variables, its pipes, and one on which its end is told."""
        orders, stdin = os.pipe()
        stdout, answers = os.pipe()
        ended, tells = os.pipe()
        theirs = [orders, answers, tells]
        order = json.dumps({"variables": dict(variables), "folder": os.getcwd()}).encode()
        socket.send_fds(self._line, [order], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        pid = int(self._line.recv(16) or 0)
        if not pid:
            raise AssertionError(f"the template ended with {self._process.wait(60)}")
        return ForkedProcess(pid, stdin, stdout, ended)

    def close(self) -> None:
        """End it, and what is left of its processes with it."""
        self._line.close()
        self._process.wait(60)


_USUAL = dict(os.environ)
_templates: dict[str, _Template] = {}


def start(variables: Mapping[str, str]) -> ForkedProcess | subprocess.Popen[str]:
    """A process of support.worker with this environment, forked if the environment is one that a template may have.

    It may where libraries are found (the double of the driver has a folder of its own), and in what is read late.
    """
    where = variables.get("LD_LIBRARY_PATH", "")
    early = {key: value for key, value in variables.items() if not key.startswith(_SET_LATER)}
    usual = environment() | {key: early[key] for key in ("LD_LIBRARY_PATH", "PYTEST_CURRENT_TEST") if key in early}
    if early != {key: value for key, value in usual.items() if not key.startswith(_SET_LATER)} or _changed():
        return subprocess.Popen(
            leash.leashed([sys.executable, "-m", "support.worker"]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(variables),
        )  # fmt: skip
    if where not in _templates:
        _templates[where] = _Template(early)
    return _templates[where].fork(variables)


@atexit.register
def _close() -> None:
    while _templates:
        _templates.popitem()[1].close()


def _changed() -> bool:
    """Whether a test has changed the environment that all have."""
    return any(
        os.environ.get(key) != _USUAL.get(key)
        for key in os.environ.keys() | _USUAL.keys()
        if not key.startswith((*_SET_LATER, "PYTEST_"))
    )


# -- the template's end ------------------------------------------------------------------------------------------------


def serve(line: int, work: Callable[[], None]) -> None:
    """Import, then fork a process that does `work` for each order on the line, until there is none."""
    for module in IMPORTS:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that a collection in one of them copies no page of what all have
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are waited for by the kernel
    with socket.socket(fileno=line) as orders:
        while order := _next(orders):
            if os.fork() == 0:
                _keep(orders, *order, work)


def _next(orders: socket.socket) -> tuple[dict[str, str], str, list[int]] | None:
    message, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, 3)
    if not message:
        return None
    order = json.loads(message)
    return order["variables"], order["folder"], descriptors


def _keep(orders: socket.socket, variables: dict[str, str], folder: str, descriptors: list[int], work: object) -> None:
    """In a child of the template: fork the process, say who it is, wait for it, say how it ended."""
    leash.hold()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stdin, stdout, tells = descriptors
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        os.close(stdin)
        os.close(stdout)
        orders.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        os.write(tells, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    leash.hold()
    if os.getppid() != keeper:
        os._exit(1)
    orders.close()
    os.close(tells)
    for ours, number in ((stdin, 0), (stdout, 1)):
        os.dup2(ours, number)
        os.close(ours)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    assert callable(work)
    work()
    raise SystemExit
