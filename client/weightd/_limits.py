"""Name the operating system limit that a failed call has reached, for clients, daemon and loaders alike."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from pathlib import Path

from .errors import ResourceLimitError

THIS_PROCESS = "this process"
DAEMON = "the weightd daemon"
LOADER = "the daemon's loader process"
MAX_LOAD_REQUEST = 8 << 20
"""Bytes of a load's request: 10,000 files with names of 600 bytes, and 200,000 tensors in groups, fit into it."""
_MAPS = "vm.max_map_count"
_NEAR = 16
"""A call may need a few mappings more than it makes: it splits others."""
_GRPC_DESCRIPTORS = 16
"""To start, gRPC 1.85 takes 6, a server 10, and ends the process where it gets none (measured)."""


def limit_error(error: OSError, what: str, who: str = THIS_PROCESS) -> ResourceLimitError | None:
    """The error that says which limit `who` has come to while it did `what`; None where it is another failure.

    `who` other than this process is of the daemon: then its settings are to be raised, which are its loaders' too.
    """
    limits = {
        errno.EMFILE: _descriptors,
        errno.ETOOMANYREFS: _descriptors_on_their_way,
        errno.ENFILE: lambda _: ("fs.file-max", "the machine has no descriptor left", "raise `sysctl fs.file-max`"),
        errno.EAGAIN: _processes,
        errno.EFBIG: _file_size,
        errno.ENOMEM: _memory,
    }
    if error.errno not in limits:
        return None
    limit, state, advice = limits[error.errno](who)
    found = ResourceLimitError(f"{what}: {state.format(who=who)}; {advice}", {"limit": limit})
    found.errno, found.strerror = error.errno, error.strerror
    return found


def out_of_descriptors(what: str, who: str = THIS_PROCESS, *, needed: int = 1) -> ResourceLimitError | None:
    """The error, where this very process cannot open that many more files.

    To be asked where nobody else says so: the kernel drops descriptors that it cannot hand over, and gRPC aborts.
    """
    opened: list[int] = []
    try:
        while len(opened) < needed:
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return limit_error(error, what, who)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return None


def check_grpc_can_start(who: str = THIS_PROCESS) -> None:
    """To be called before grpc is imported and its first channel or server made. Errors: ResourceLimitError."""
    if limit := out_of_descriptors("starting gRPC", who, needed=_GRPC_DESCRIPTORS):
        raise limit


def _descriptors(who: str) -> tuple[str, str, str]:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    state = f"{{who}} has all the descriptors that it may have (RLIMIT_NOFILE is {most})"
    return "RLIMIT_NOFILE", state, _raise(who, "n")


def _descriptors_on_their_way(who: str) -> tuple[str, str, str]:
    state = "the user of {who} has too many descriptors on their way to other processes (RLIMIT_NOFILE)"
    return "RLIMIT_NOFILE", state, f"{_raise(who, 'n')}, or load one at a time"


def _processes(who: str) -> tuple[str, str, str]:
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    number = "unlimited" if most == resource.RLIM_INFINITY else most
    state = f"the user or cgroup of {{who}} has all the processes that it may have (RLIMIT_NPROC is {number})"
    return "RLIMIT_NPROC", state, f"{_raise(who, 'u')}, or the cgroup's pids.max"


def _file_size(who: str) -> tuple[str, str, str]:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    state = f"{{who}} may make no file as large as its memory is to be (RLIMIT_FSIZE is {most} bytes)"
    return "RLIMIT_FSIZE", state, _raise(who, "f")


def _memory(who: str) -> tuple[str, str, str]:
    """Of ENOMEM the kernel does not say what was short: mappings, addresses, or memory."""
    mappings, most = 0, _NEAR + 1
    with contextlib.suppress(OSError, ValueError):  # no /proc, or no descriptor to look into it
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as file:
            mappings = sum(1 for _ in file)
    if mappings >= most - _NEAR:
        state = f"{{who}} has {mappings} mappings ({_MAPS} is {most})"
        return _MAPS, state, f"raise `sysctl {_MAPS}`, or attach fewer tensors"
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        return "RLIMIT_AS", f"{{who}} has too little address space left (RLIMIT_AS is {space} bytes)", _raise(who, "v")
    return "memory", "the kernel has no memory for {who}", "free some, or see `sysctl vm.overcommit_memory`"


def _raise(who: str, flag: str) -> str:
    if who == THIS_PROCESS:
        return f"raise `ulimit -{flag}`"
    setting = {"n": "LimitNOFILE", "u": "TasksMax", "v": "LimitAS", "f": "LimitFSIZE"}[flag]
    return f"raise the daemon's `ulimit -{flag}` ({setting}= of its unit)"
