"""What the kernel counts for a process: its share of what it maps, and what of our segments it has made its own."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


class _Mallinfo2(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def allocated() -> int:
    """Bytes that malloc has handed out in this process and not got back: of libraries, and of large Python objects.

    Errors: AttributeError without glibc 2.33.
    """
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _Mallinfo2
    told = function()
    return int(told.uordblks + told.hblkhd)


def pss(pid: int) -> int:
    """Proportional set size in bytes: a page that n processes map counts an nth in each."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1]) * 1024


def written(pid: int) -> int:
    """Bytes of mapped segments that the process has written to, and that are its own copies now.

    Not `Private_Dirty`: that counts a shared page, too, when this process happens to be the only one that maps it.
    """
    return segments_of(pid, "Anonymous")


def segments_of(pid: int, what: str = "Size") -> int:
    """Bytes of our segments that the process has mapped, or what else the kernel counts of them, such as Pss."""
    size, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            inside = "/memfd:weightd-" in line
        elif inside and first == f"{what}:":
            size += int(line.split()[1]) * 1024
    return size


def mappings(pid: int) -> int:
    """How many of our memfds, manifests included, the process has mapped; a split mapping counts more than once."""
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:weightd-")


class Segments:
    """Where a process has the daemon's segments mapped, as the kernel says."""

    def __init__(self, pid: int) -> None:
        self.runs: list[tuple[int, int]] = []
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "/memfd:weightd-" not in line:
                continue
            start, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
            if self.runs and self.runs[-1][1] == start:  # a mapping of which pages were protected is listed in parts
                start = self.runs.pop()[0]
            self.runs.append((start, end))

    def hold(self, address: int, length: int) -> bool:
        """Whether a range of addresses lies in one segment, or in several that are mapped one behind the other."""
        return any(start <= address and address + length <= end for start, end in self.runs)


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory in a process: all that is not a page of a file or of one of our segments.

    A page of a segment that the process has written to is anonymous as well.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in rollup.splitlines() if line.startswith("Anonymous:")).split()[1]) * 1024


def attached_pss(pid: int) -> int:
    """The part of a process's PSS that lies in our segments: of memory that n processes map, an nth in each."""
    size, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            inside = re.search(r"/memfd:weightd-\d", line) is not None
        elif inside and first == "Pss:":
            size += int(line.split()[1]) * 1024
    return size
