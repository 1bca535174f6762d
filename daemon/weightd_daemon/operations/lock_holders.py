"""Finds the processes that have a lock open, and ends them. The kernel identifies them; no other process is ended.

A process is taken for a holder if `/proc/PID/fdinfo` lists a lock of one of its open files on the very file.
No file is opened or looked at for that, so a file system that hangs cannot hold this process up.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK = re.compile(r"^lock:\s+\d+: \S+\s+\S+\s+\S+\s+-?\d+ (\S+:\S+:\d+) ", re.MULTILINE)
_GPU = "/dev/nvidia"


def kernel_name(descriptor: int) -> str | None:
    """The file of a descriptor as the kernel lists its locks; this process must hold one by that descriptor.

    `os.stat` would not do: some file systems show another device number there. None if the kernel does not tell.
    """
    with contextlib.suppress(OSError):
        found = _LOCK.search(Path(f"/proc/self/fdinfo/{descriptor}").read_text())
        return found[1] if found else None
    return None


def holders(files: dict[str, str], seconds: float = math.inf) -> list[int]:
    """Processes other than this one that have a lock on one of `files`: names in their folder, by `kernel_name`.

    A process takes about 0.2 ms. The youngest come first, and after `seconds` the others are left out.
    """
    deadline = time.monotonic() + seconds
    found = []
    for pid in sorted((int(entry) for entry in os.listdir("/proc") if entry.isdigit()), reverse=True):
        if pid != os.getpid() and holds(pid, files):
            found.append(pid)
        if time.monotonic() > deadline:
            break
    return found


def holds(pid: int, files: dict[str, str]) -> bool:
    """Whether a process has a lock on one of `files`. False if it has ended, or this process may not see its files."""
    return any(
        lock in files
        for fdinfo, link in _descriptors(pid)
        if link.removesuffix(" (deleted)").rpartition("/")[2] in files.values()
        for lock in _locks(fdinfo)
    )


def may_be_seen(pid: int) -> bool:
    """Whether `holds` can tell: the process has ended, or its open files are listed for this process."""
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] in ("Z", "X"):
            return True
        os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        return False
    except OSError:
        pass
    return True


def uses_gpu(pid: int) -> bool:
    """Whether a process has a GPU of NVIDIA open."""
    return any(link.startswith(_GPU) for _, link in _descriptors(pid))


def end(pid: int, files: dict[str, str]) -> None:
    """Kill a process if it has a lock on one of `files`."""
    with contextlib.suppress(OSError):  # it has ended, or is not ours to end
        # First the descriptor: if the process ended and another had its number by now, the signal would go nowhere.
        process = os.pidfd_open(pid)
        try:
            if holds(pid, files):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def _descriptors(pid: int) -> Iterator[tuple[str, str]]:
    """The path of each open descriptor's fdinfo, and where the descriptor leads.

    They are listed by the first thread that has any: of a process that was killed the main thread may be gone, while
    another hangs and keeps the files.
    """
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            folder, listed = f"/proc/{pid}/task/{thread}", False
            with contextlib.suppress(OSError):
                for descriptor in os.listdir(f"{folder}/fd"):
                    with contextlib.suppress(OSError):
                        link = os.readlink(f"{folder}/fd/{descriptor}")
                        listed = True
                        yield f"{folder}/fdinfo/{descriptor}", link
            if listed:
                return


def _locks(fdinfo: str) -> list[str]:
    try:
        return _LOCK.findall(Path(fdinfo).read_text())
    except OSError:
        return []
