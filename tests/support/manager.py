"""A service manager for one service: takes its notifications, keeps its descriptors, and starts it with them again."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import re
import socket
import stat
import sys
import threading
from itertools import count
from pathlib import Path

_MOST_BYTES = 4096
_MOST_DESCRIPTORS = 253
_KCMP = {"x86_64": 312, "aarch64": 272}
_libc = ctypes.CDLL(None, use_errno=True)
# Moves descriptors to where sd_listen_fds(3) wants them, says so for this very process, and becomes the service.
_LAUNCH = """
import fcntl, os, sys
given = [one.rpartition("=") for one in sys.argv[2 : 2 + int(sys.argv[1])]]
lowest = 3 + len(given) + max([int(number) for _, _, number in given], default=0)
moved = [fcntl.fcntl(int(number), fcntl.F_DUPFD_CLOEXEC, lowest) for _, _, number in given]
for _, _, number in given:
    os.close(int(number))
for index, number in enumerate(moved):
    os.dup2(number, 3 + index)
names = ":".join(name for name, _, _ in given)
listen = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(given)), "LISTEN_FDNAMES": names}
argv = sys.argv[2 + len(given) :]
os.execve(argv[0], argv, {**os.environ, **listen})
"""


class Manager:
    """Listens at `path`, and does with FDSTORE, FDSTOREREMOVE and BARRIER what systemd does, but for one thing.

    That is polling: a descriptor that hangs up stays, as FDPOLL=0 asks for. The rest is as in systemd's service.c and
    manager.c. A descriptor that is kept already, under whatever name, is not kept again. A name that cannot be is
    "stored". BARRIER stands alone in its message, or the message is passed over, and so is one of more than 4096 bytes.

    `kept` is (name, descriptor), the newest first, as systemd hands them out; `said` are all other lines so far, and
    `ignored` are messages that were passed over. With `tells` it says how many it keeps at most, as systemd does from
    254 on.
    """

    def __init__(self, path: Path, most: int = 4096, *, tells: bool = True) -> None:
        self.path = path
        self.kept: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.ignored: list[str] = []
        self._most = most
        self._tells = tells
        self._numbers = count(1)
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def command(self, argv: list[str]) -> tuple[list[str], list[int]]:
        """What starts the service again with all that is kept, and the descriptors that the process must inherit."""
        kept = self.handed_out()
        given = [f"{name}={descriptor}" for name, descriptor in kept]
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(len(given)), *given]
        return [*launch, *argv], [descriptor for _, descriptor in kept]

    def handed_out(self) -> list[tuple[str, int]]:
        """All that is kept, as the next process of the service gets it."""
        self.settle()
        with self._changed:
            return list(self.kept)

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until all has been done that was sent before."""
        line = f"X_SETTLED={next(self._numbers)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(line.encode(), str(self.path))
        self.wait_for(line, seconds)

    def environment(self, **more: str) -> dict[str, str]:
        """What the service's process needs, beside what `start_descriptors` says."""
        tells = {"FDSTORE": str(self._most)} if self._tells else {}
        return {"NOTIFY_SOCKET": str(self.path), **tells, **more}

    def wait_for(self, line: str, seconds: float = 60.0) -> None:
        """Wait until the service has said a line."""
        with self._changed:
            if not self._changed.wait_for(lambda: line in self.said, seconds):
                raise AssertionError(f"the service did not say {line!r}; it said {self.said}")

    def names(self) -> list[str]:
        """Names of what is kept."""
        with self._changed:
            return [name for name, _ in self.kept]

    def close(self) -> None:
        """Forget everything."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._socket.close()
        for _, descriptor in self.kept:
            os.close(descriptor)
        self.kept.clear()

    def _serve(self) -> None:
        while True:
            try:
                data, descriptors, flags, _ = socket.recv_fds(self._socket, _MOST_BYTES, _MOST_DESCRIPTORS)
            except OSError:
                return
            if not data:
                return
            with self._changed:
                text = data.decode()
                if flags & socket.MSG_TRUNC or not self._take(text.split("\n"), descriptors):
                    self.ignored.append(text)
                for descriptor in descriptors:  # whoever waits for a barrier waits for that
                    os.close(descriptor)
                self._changed.notify_all()

    def _take(self, lines: list[str], descriptors: list[int]) -> bool:
        """Do what a message says; false where it is passed over. Descriptors are kept as duplicates."""
        if "BARRIER=1" in lines:
            return lines == ["BARRIER=1"] and len(descriptors) == 1
        name = next((line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")), "")
        valid = re.fullmatch(r"[ -9;-~]{1,255}", name)  # printable ASCII without the colon
        if "FDSTOREREMOVE=1" in lines and valid:
            self._drop(name)
        if "FDSTORE=1" in lines:
            for descriptor in descriptors:
                self._keep(name if valid else "stored", descriptor)
        self.said += [line for line in lines if not line.startswith(("FDSTORE", "FDNAME=", "FDPOLL="))]
        return True

    def _keep(self, name: str, descriptor: int) -> None:
        if len(self.kept) < self._most and not any(_same(kept, descriptor) for _, kept in self.kept):
            self.kept.insert(0, (name, os.dup(descriptor)))

    def _drop(self, name: str) -> None:
        for kept in [one for one in self.kept if one[0] == name]:
            self.kept.remove(kept)
            os.close(kept[1])


def _same(one: int, other: int) -> bool:
    """Whether two descriptors are duplicates, as systemd asks: of the kernel, else by what they are opened on."""
    answer = _libc.syscall(_KCMP.get(platform.machine(), -1), os.getpid(), os.getpid(), 0, one, other)
    if answer >= 0:
        return answer == 0
    first, second = os.fstat(one), os.fstat(other)
    if stat.S_ISCHR(first.st_mode) or stat.S_ISBLK(first.st_mode):
        return False
    flags = [fcntl.fcntl(descriptor, fcntl.F_GETFL) for descriptor in (one, other)]
    return (first.st_dev, first.st_ino, flags[0]) == (second.st_dev, second.st_ino, flags[1])
