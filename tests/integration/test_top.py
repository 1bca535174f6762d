"""`weightd top` in a real terminal, at a real daemon: what it shows, a removal, a daemon that comes back, the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, environment, eventually
from support.leash import leashed
from support.worker import Worker
from weightd.errors import NotFoundError

pytest.importorskip("textual")

MIB = 1 << 20
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?>=$]*[a-zA-Z]|\][^\x07]*\x07|[()=>].?)")


class Terminal:
    """`weightd top` on a pseudo-terminal; `text` is what it has written, in one line and without control sequences."""

    def __init__(self, socket: Path, columns: int = 100, lines: int = 40) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(theirs)
        variables = environment(socket) | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        for size in ("COLUMNS", "LINES"):  # they would count for more than the terminal's own
            variables.pop(size, None)
        self.process = subprocess.Popen(
            leashed([sys.executable, "-m", "weightd", "top"]), stdin=theirs, stdout=theirs, stderr=theirs,
            env=variables, start_new_session=True,
        )  # fmt: skip
        self._theirs = theirs
        self._written = bytearray()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._ours, 1 << 16):
                self._written += data

    @property
    def text(self) -> str:
        return " ".join(_ESCAPES.sub("", self._written.decode(errors="replace")).split())

    def shows(self, *texts: str) -> None:
        """Wait until each of these was written since `type` was last called."""
        for text in texts:
            try:
                # Without spaces: where a line is broken, or the cursor is moved over one, none is written.
                wanted = text.replace(" ", "")
                eventually(lambda wanted=wanted: wanted in self.text.replace(" ", ""))  # type: ignore[misc]  # bound now
            except AssertionError:
                raise AssertionError(f"{text!r} is not in {self.text[-3000:]!r}") from None

    def type(self, keys: str) -> None:
        """Press keys, and forget what was written before."""
        self._written.clear()
        os.write(self._ours, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def modes(self) -> list[object]:
        """The terminal's modes, echo among them."""
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        os.close(self._theirs)
        self._reading.join(60)
        os.close(self._ours)


@pytest.fixture
def terminal(daemon: Daemon) -> Iterator[Callable[[], Terminal]]:
    """Start `weightd top`."""
    with contextlib.ExitStack() as stack:

        def start() -> Terminal:
            found = Terminal(daemon.socket)
            stack.callback(found.close)
            return found

        yield start


def test_a_daemon_is_watched(
    daemon: Daemon, spawn: Callable[[Daemon], Worker], terminal: Callable[[], Terminal], tmp_path: Path
) -> None:
    base = checkpoints.write_random(tmp_path / "base.safetensors", 8, MIB, seed="base")
    tuned = checkpoints.write_random(
        tmp_path / "tuned.safetensors", 8, MIB, seed="tuned", shared={at: ("base", at) for at in range(6)}
    )
    client = daemon.connect()
    with weightd.connect(daemon.socket, timeout=60.0) as loading:
        loading.load(base, name="base", pin=True)
        loading.load(tuned, name="tuned")
    holder = spawn(daemon)
    holder.run(
        "import weightd; held = weightd.connect().attach('base'); memory = held.buffer('t0')\n"
        "for at in range(0, len(memory), 4096): memory[at] ^= 1"
    )
    screen = terminal()
    screen.shows(
        "host memory", "leased 8.00 MiB", "idle 2.00 MiB", f"{holder.pid}", "private 1.00 MiB", "attached base"
    )
    screen.shows(
        "base: removing it gives back 2.00 MiB of 8.00 MiB. It shares 6.00 MiB with tuned. It is pinned and held"
    )
    screen.type("r")
    screen.shows("Remove base on host? That gives back 2.00 MiB", "so the daemon will refuse")
    screen.type("y")
    screen.shows(f"checkpoint base is in use by pid {holder.pid}")
    screen.type("/tuned\r")
    screen.shows("tuned: removing it gives back 2.00 MiB")
    screen.type("r")
    screen.shows("Remove tuned on host?")
    assert client.inspect("tuned").checkpoint.state == "resident"
    screen.type("y")
    screen.shows("removed tuned, freed 2.00 MiB")
    with pytest.raises(NotFoundError):
        client.inspect("tuned")
    screen.type("\x1b")
    screen.shows("base: removing it gives back 8.00 MiB of 8.00 MiB. It shares nothing.")
    holder.close()
    screen.shows("pinned.")  # of "It is pinned." only what has changed is written
    daemon.stop()
    screen.shows("NO ANSWER", "what follows is old", "no weightd daemon at")
    screen.type("")
    daemon.start()
    screen.shows("serving", "nothing is loaded")
    screen.type("")
    screen.resize(60, 24)
    os.kill(screen.process.pid, signal.SIGWINCH)
    eventually(lambda: re.search(r"0 leases \d\d:", screen.text), what="the head without what was saved")
    assert screen.modes() != screen.before
    screen.type("q")
    assert screen.process.wait(60) == 0
    assert screen.modes() == screen.before


def test_ctrl_c_ends_it(daemon: Daemon, terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    screen.shows("nothing is loaded")
    screen.type("\x03")
    assert screen.process.wait(60) == 0
    assert screen.modes() == screen.before
