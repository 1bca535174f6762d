"""A real daemon in a process of its own, with a leak check at its end."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import weightd
from support import command, template
from support.backends import HOST, Backend
from support.children import children
from support.descriptors import counted
from support.leash import leashed
from support.manager import Manager
from support.template import ForkedProcess
from weightd.client import Client

ROOT = Path(__file__).resolve().parents[2]
WATCHED = [sys.executable, "-m", "support.watched_weightd_daemon"]
"""A daemon that says in its log what its loop stood still for (support/loop_watch.py)."""
FORKED = ("support.watched_weightd_daemon", "support.launch")
"""Programs of daemons that are forked from a template (support/template.py)."""
PATIENCE = 60.0
"""Seconds to wait for what takes a moment on a quiet machine. A test that passes never waits that long."""


def eventually(check: Callable[[], object], seconds: float = PATIENCE, what: str = "") -> None:
    """Wait until `check` holds; fail with its last answer."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or check} (last answer: {answer!r})")
        time.sleep(0.02)


def environment(socket: Path | None = None) -> dict[str, str]:
    """The environment of a child process: our sources, and no setting of whoever runs the tests."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WEIGHTD_")}
    ours = [str(ROOT / folder) for folder in ("client", "daemon", "fleet", "tests")]
    inherited = os.environ.get("PYTHONPATH")  # packages that the interpreter lacks may lie there: tools/gpu_day.sh
    clean["PYTHONPATH"] = os.pathsep.join([*ours, *([inherited] if inherited else [])])
    clean["XDG_CONFIG_HOME"] = "/nonexistent"
    if socket is not None:
        clean["WEIGHTD_SOCKET"] = str(socket)
    return clean


def forked(argv: list[str], variables: dict[str, str], log: int, kept: template.Kept = None) -> ForkedProcess | None:
    """A daemon from a template; None outside of tests, or where no template has such a program or environment.

    `kept` is what a service manager hands out to it. Its command line says that it serves, but not how.
    """
    start, program, arguments = argv[:2], argv[2], argv[3:]
    if start != [sys.executable, "-m"] or program not in FORKED or not template.in_a_test():
        return None
    process = template.start(program, variables, environment(), arguments, log, kept, leads=True, words=("serve",))
    if process is not None:
        process.stdin.close()
    return process


class Daemon:
    """A daemon on a socket of its own. `settings` are its flags; `argv` replaces `python -m weightd_daemon`.

    `unset` are settings that get no flag although tests usually give one. With a `manager` it is that one's service,
    and is given each time what is kept.
    """

    def __init__(
        self,
        backend: Backend = HOST,
        argv: list[str] | None = None,
        unset: tuple[str, ...] = (),
        manager: Manager | None = None,
        **settings: object,
    ) -> None:
        self.manager = manager
        self.backend = backend
        self.folder = Path(tempfile.mkdtemp(prefix="weightd-"))
        self.socket = self.folder / "w.sock"
        self.log = self.folder / "log"
        self.argv = argv or WATCHED
        usual = {"budget": "1GiB", "log_level": "info", **backend.settings}
        self._settings = {key: value for key, value in usual.items() if key not in unset} | settings
        self.process: subprocess.Popen[str] | ForkedProcess | None = None
        self._clients: list[Client] = []
        self.start()

    def start(self) -> None:
        """Start, or start again on the same socket, and wait for the line that says ready."""
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in self._settings.items()]
        argv = [*self.argv, "serve", f"--socket={self.socket}", f"--state-dir={self.folder / 'state'}", *flags]
        variables = environment() | self.backend.environment
        if self.manager is not None:
            variables |= self.manager.environment()
        with self.log.open("a") as log:
            self.process = self._process(argv, variables, log.fileno())
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("weightd is ready"):
            self.process.wait(PATIENCE)
            self._close_pipe()
            raise AssertionError(f"the daemon did not start: {line!r}\n{self.log.read_text()}")
        self.baseline = self.descriptors()

    def _process(self, argv: list[str], variables: dict[str, str], log: int) -> subprocess.Popen[str] | ForkedProcess:
        kept = None if self.manager is None else self.manager.handed_out()
        if (process := forked(argv, variables, log, kept)) is not None:
            return process
        argv, given = (argv, []) if self.manager is None else self.manager.command(argv)
        return subprocess.Popen(
            leashed(argv), stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True, env=variables,
            pass_fds=given,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def connect(self, timeout: float = PATIENCE) -> Client:
        """A client of it, closed at the end of the test."""
        client = weightd.connect(self.socket, timeout=timeout)
        self._clients.append(client)
        return client

    def command(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `weightd ARGUMENTS` against it."""
        finished = command.run(map(str, arguments), environment(self.socket) | self.backend.environment, environment())
        if check and finished.returncode:
            raise AssertionError(f"exit {finished.returncode}: {finished.stderr}")
        return finished

    def connections(self) -> int:
        """How many handle connections it has, as the kernel lists them."""
        connected = "03"
        lines = Path("/proc/net/unix").read_text().splitlines()
        bound = f" {self.socket}~"  # and the daemon's process id, until the socket got its place
        return sum(bound in line and line.split()[5] == connected for line in lines)

    def descriptors(self) -> int:
        """Descriptors that the daemon has open, without what the libraries of a GPU keep."""
        return counted(self.pid)

    def allocated(self) -> int | None:
        """Bytes of memory behind the daemon's segments, as the kernel counts them; None: only the device could tell."""
        if self.backend.is_host:
            return sum(status.st_blocks * 512 for status in self._segments().values())
        return self.backend.device_bytes()

    def allocates(self, least: int, most: float = math.inf) -> bool:
        """Whether so many bytes are behind its segments; true where only the device could tell."""
        alive = self.allocated()
        return alive is None or least <= alive <= most

    def _segments(self) -> dict[int, os.stat_result]:
        found: dict[int, os.stat_result] = {}
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = os.readlink(entry)
                if re.match(r"/memfd:weightd-\d", name):  # neither a manifest nor a root record
                    status = entry.stat()
                    found[status.st_ino] = status
        return found

    def rss(self) -> int:
        """Resident bytes of the daemon's process."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024

    def loaders(self) -> list[int]:
        """Process ids of its loaders."""
        return [pid for pid in children(self.pid) if not _is_holder(pid)]

    def holders(self) -> list[int]:
        """Process ids of the processes that hold memory shared by CUDA IPC."""
        return [pid for pid in children(self.pid) if _is_holder(pid)]

    def wait_for_loader(self) -> int:
        """The pid of a loader, as soon as there is one."""
        eventually(self.loaders, what="a loader")
        return self.loaders()[0]

    def logged(self) -> str:
        """Its log so far."""
        return self.log.read_text()

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)
        self._close_pipe()

    def stop(self, seconds: float = PATIENCE) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(seconds)
        self._close_pipe()
        return code

    def check_no_leak(self) -> None:
        """Remove everything, and see that no byte, descriptor or segment stays behind but the pool."""
        for client in self._clients:
            client.close()
        with self._let_in() as client:
            eventually(lambda: not client.leases(), what=f"leases are still held: {client.leases()}")
            eventually(lambda: not any(c.state == "loading" for c in client.checkpoints()), what="loads under way")
            for checkpoint in client.checkpoints():
                client.remove(checkpoint.content_digest, checkpoint.device)

            def settled() -> bool:
                devices = client.stats().devices
                in_flight = sum(device.in_flight_bytes + device.live_bytes for device in devices)
                alive = self.allocated() if self.backend.is_host else self.backend.bytes_on_double() or 0
                unpooled = sum(device.used_bytes for device in devices if device.kind != "host")
                return not in_flight and not unpooled and alive <= sum(d.used_bytes for d in devices)

            eventually(settled, what=f"memory on its way back: {client.stats()}")
            stats = client.stats()
        assert (stats.checkpoints, stats.blobs) == (0, 0), stats
        for device in stats.devices:
            assert (device.live_bytes, device.in_flight_bytes) == (0, 0), stats
            assert device.used_bytes == device.reusable_bytes, stats

        # Two for each pooled segment, three for each idle loader, three for the index's database, opened when needed.
        allowed = self.baseline + 2 * sum(device.segments for device in stats.devices) + 3
        eventually(
            lambda: self.descriptors() <= allowed + 3 * len(self.loaders()),
            what=f"{self.descriptors()} descriptors are open, {allowed} allowed",
        )

    def _let_in(self) -> Client:
        """A client, as soon as a daemon with few connections has seen that those of the test are gone."""
        clients: list[Client] = []

        def admitted() -> bool:
            with contextlib.suppress(weightd.DaemonBusyError):
                clients.append(weightd.connect(self.socket, timeout=PATIENCE))
            return bool(clients)

        eventually(admitted, what="the daemon to let somebody in")
        return clients[0]

    def close(self, *, check: bool) -> None:
        """End of the test: kill survivors first, then look for leaks."""
        assert self.process is not None
        try:
            if check and self.process.poll() is None:
                self.check_no_leak()
                assert self.stop() == 0
                assert not self.socket.exists(), "the socket is left behind"
        finally:
            for client in self._clients:
                client.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
            self._close_pipe()
            if check and re.search(r"\bbug\b", self.logged()):  # no part of a folder's random name
                raise AssertionError(f"the daemon's log speaks of a bug:\n{self.logged()}")
            if check and "loop watch: a step of" in self.logged():
                raise AssertionError(f"the daemon's loop stood still:\n{self.logged()}")
            shutil.rmtree(self.folder)

    def _close_pipe(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.stdout.close()


def _is_holder(pid: int) -> bool:
    try:
        return b"cuda_holder" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
