"""Processes forked from one that has imported already what they need, which takes longer than most tests do.

A template is a process of its own, and so is everything that it forks: nothing of the test's own process is in them.
One serves for each program, and for each set of variables that count when a process starts. It dies with the test's
process, and all that was forked with it (support/leash.py).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from support import leash

FORKS = "--forks="
"""The last argument of a template: the number of its end of the line."""
_SET_LATER = ("CUDA_VISIBLE_DEVICES", "FAKECUDA_", "FDSTORE", "NOTIFY_SOCKET", "WEIGHTD_", "XDG_")
"""Variables, by how they begin, that nobody reads before they are needed."""
_MOST_DESCRIPTORS = 253
"""Of one message, by the kernel."""
_OURS = 4
"""Those of them that every process gets."""
_SECONDS = 100.0
"""How long a program that is to end may run."""

Kept = Sequence[tuple[str, int]] | None


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
                raise subprocess.TimeoutExpired("a forked process", timeout)
            told = os.read(self._ended, 16)
            os.close(self._ended)
            self.returncode = int(told or -signal.SIGKILL)  # with its keeper, who says nothing any more
        return self.returncode

    def poll(self) -> int | None:
        """The exit code, as `wait` returns it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ends at this very moment
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM, unless it has ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9, unless it has ended."""
        self.send_signal(signal.SIGKILL)


class _Template:
    """The test's end of a template."""

    def __init__(self, program: str, words: Iterable[str], variables: Mapping[str, str]) -> None:
        self._line, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                leash.leashed([sys.executable, "-m", program, *words, f"{FORKS}{other.fileno()}"]),
                stdin=subprocess.DEVNULL, env=dict(variables), pass_fds=[other.fileno()],
            )  # fmt: skip

    def fork(
        self, variables: Mapping[str, str], arguments: list[str], errors: int, kept: Kept, *, leads: bool
    ) -> ForkedProcess:
        """A process with other variables, its pipes, and one on which its end is told."""
        orders, stdin = os.pipe()
        stdout, answers = os.pipe()
        ended, tells = os.pipe()
        theirs = [orders, answers, tells]
        order = {
            "variables": dict(variables), "folder": os.getcwd(), "umask": _umask(), "arguments": arguments,
            "leads": leads, "kept": None if kept is None else [name for name, _ in kept],
        }  # fmt: skip
        sent = [*theirs, errors, *(number for _, number in kept or ())]
        socket.send_fds(self._line, [json.dumps(order).encode()], sent)
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
_templates: dict[tuple[str, ...], _Template] = {}


def start(
    program: str,
    variables: Mapping[str, str],
    usual: Mapping[str, str],
    arguments: Iterable[str] = (),
    errors: int | None = None,
    kept: Kept = None,
    *,
    words: Sequence[str] = (),
    leads: bool = False,
) -> ForkedProcess | None:
    """A process of a program with this environment, forked if the environment is one that a template may have.

    It may where libraries are found (the double of the driver has a folder of its own), and in what is read late, but
    not else in what differs from `usual`; then this returns None, and so it does on a thread other than the main one:
    orders on the line are one at a time. `errors` is its standard error, by default ours; `kept` are the names and
    descriptors that a service manager hands out. A process that `leads` is in a session and a process group of its own.
    Its command line is its template's, which has the `words` that others look for there, and none of the `arguments`.
    """
    if threading.current_thread() is not threading.main_thread() or len(kept or ()) > _MOST_DESCRIPTORS - _OURS:
        return None
    where = variables.get("LD_LIBRARY_PATH", "")
    early = {key: value for key, value in variables.items() if not key.startswith(_SET_LATER)}
    expected = {**usual} | {key: early[key] for key in ("LD_LIBRARY_PATH", "PYTEST_CURRENT_TEST") if key in early}
    if early != {key: value for key, value in expected.items() if not key.startswith(_SET_LATER)} or _changed():
        return None
    kind = (program, *words, where)
    if kind not in _templates:
        _templates[kind] = _Template(program, words, early)
    errors = sys.__stderr__.fileno() if errors is None else errors
    return _templates[kind].fork(variables, [*arguments], errors, kept, leads=leads)


def run(
    program: str,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    usual: Mapping[str, str],
    argv: Sequence[str],
    *,
    words: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with nothing to read, forked if `start` can, else by `argv`. It ends after 100 s."""
    with tempfile.TemporaryFile("w+") as errors:
        process = start(program, variables, usual, arguments, errors.fileno(), words=words) if in_a_test() else None
        if process is None:
            return subprocess.run(
                argv, env=dict(variables), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS,
                check=False,
            )  # fmt: skip
        limit = threading.Timer(_SECONDS, os.kill, (process.pid, signal.SIGKILL))
        limit.start()
        try:
            process.stdin.close()
            with process.stdout:
                printed = process.stdout.read()
            code = process.wait()
        finally:
            limit.cancel()
        errors.seek(0)
        return subprocess.CompletedProcess(list(argv), code, printed, errors.read())


def in_a_test() -> bool:
    """Whether pytest runs a test. A bench starts what its users start, whose imports and memory are a part of it."""
    return "PYTEST_CURRENT_TEST" in os.environ


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


def _umask() -> int:
    """That of this process; to ask with umask(2) is to change it for every thread."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("Umask:")).split()[1], 8)


# -- the template's end ------------------------------------------------------------------------------------------------


def line_of(arguments: list[str]) -> int | None:
    """The line of a template, if the program was started as one."""
    last = arguments[-1] if arguments else ""
    return int(last.removeprefix(FORKS)) if last.startswith(FORKS) else None


def serve(line: int, work: Callable[[], None], imports: Iterable[str]) -> None:
    """Import, then fork a process that does `work` for each order on the line, until there is none."""
    for module in imports:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that a collection in one of them copies no page of what all have
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are waited for by the kernel
    with socket.socket(fileno=line) as orders:
        while order := _next(orders):
            if os.fork() == 0:
                _keep(orders, *order, work)
            for descriptor in order[1]:  # or who waits for the end of its output would wait for ours
                os.close(descriptor)


def _next(orders: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    message, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, _MOST_DESCRIPTORS)
    return (json.loads(message), descriptors) if message else None


def _keep(orders: socket.socket, order: dict[str, Any], descriptors: list[int], work: Callable[[], None]) -> None:
    """In a child of the template: fork the process, say who it is, wait for it, say how it ended."""
    leash.hold()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    stdin, stdout, tells, errors, *kept = descriptors
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        for theirs in (stdin, stdout, errors, *kept):
            os.close(theirs)
        orders.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        os.write(tells, str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    leash.hold()
    if os.getppid() != keeper:
        os._exit(1)
    orders.close()
    os.close(tells)
    for ours, number in ((stdin, 0), (stdout, 1), (errors, 2)):
        os.dup2(ours, number)
        os.close(ours)
    if order["leads"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(order["variables"])
    if order["kept"] is not None:
        _hand_over(order["kept"], kept)
    os.umask(order["umask"])
    os.chdir(order["folder"])
    sys.argv[1:] = order["arguments"]
    work()
    raise SystemExit


def _hand_over(names: list[str], descriptors: list[int]) -> None:
    """Move descriptors to where sd_listen_fds(3) wants them, and say so for this process (support/manager.py)."""
    lowest = 3 + len(names) + max(descriptors, default=0)
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, lowest) for number in descriptors]
    for number in descriptors:
        os.close(number)
    for index, number in enumerate(moved):
        os.dup2(number, 3 + index)
        os.close(number)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
