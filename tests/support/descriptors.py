"""Which descriptors a process has open, for tests that leave none."""

from __future__ import annotations

import contextlib
import gc
import os
import re

_OF_LIBRARIES = re.compile(
    r"""
      (?!/dev/nvidiactl$) .* /nvidia[^/]* $  # device nodes; one of nvidiactl may be an exported handle
    | /memfd: (?! weightd | fakecuda )  # a driver's own; fakecuda: memory of the double
    | anon_inode: \[eventfd\]
    """,
    re.VERBOSE,
)


def open_descriptors() -> set[str]:
    """Collect garbage, whose finalizers close descriptors at any moment; return the numbers of all open ones."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def counted(pid: int | str = "self") -> int:
    """How many descriptors a process has open, without what libcuda and NVML open when they like, and keep."""
    count = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += not _OF_LIBRARIES.match(os.readlink(f"/proc/{pid}/fd/{number}"))
    return count
