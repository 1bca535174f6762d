"""Judges the limits of processes: of this one, as a client, and of the daemon, or of one that this user would start."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping

from weightd._sizes import size
from weightd.cli.health.finding import Finding, Status

Limits = Mapping[str, tuple[int | None, int | None]]
"""Soft and hard limit by name; None is unlimited."""

_KINDS = {
    "nofile": ("Max open files", resource.RLIMIT_NOFILE),
    "nproc": ("Max processes", resource.RLIMIT_NPROC),
    "fsize": ("Max file size", resource.RLIMIT_FSIZE),
    "as": ("Max address space", resource.RLIMIT_AS),
    "memlock": ("Max locked memory", resource.RLIMIT_MEMLOCK),
}
_LEAST_DESCRIPTORS = 64
"""Fewer do not do for gRPC, the sockets and the descriptors of one attach."""
_CLIENT_DESCRIPTORS = 1024
_DAEMON_DESCRIPTORS = 8192
"""Two for each of 4,096 segments and manifests, which is what the units let systemd keep."""
_PROCESSES = 256
_SMALL_FILE = 1 << 30
_LITTLE_SPACE = 1 << 30
_PINNED = 64 << 20
"""A load pins 6 MiB for each of up to four reader threads, twice if it hashes first; there are four loads at a time."""


def own() -> Limits:
    """The limits of this process."""
    return {
        name: tuple(None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(number))  # type: ignore[misc]  # two of them
        for name, (_, number) in _KINDS.items()
    }


def read(text: str) -> Limits:
    """The limits in the text of /proc/PID/limits; names that are missing are left out."""
    found: dict[str, tuple[int | None, int | None]] = {}
    for name, (title, _) in _KINDS.items():
        if match := re.search(rf"^{title} +(\d+|unlimited) +(\d+|unlimited)", text, re.MULTILINE):
            soft, hard = (None if word == "unlimited" else int(word) for word in match.groups())
            found[name] = soft, hard
    return found


def judge_limits(ours: Limits, daemon: Limits | None, *, gpu: bool | None) -> list[Finding]:
    """Judge the limits; `daemon` are the running daemon's, None if they cannot be read.

    If no daemon runs, `daemon` are those of this process: it would inherit them, and raise its soft limit to the hard.
    `gpu` is whether there is one, None if nobody knows.
    """
    theirs = daemon or {}
    return [
        _descriptors(ours),
        _daemon_descriptors(theirs),
        _processes(theirs),
        _file_size(theirs),
        _address_space(ours),
        _locked_memory(theirs, gpu=gpu),
    ]


def _descriptors(ours: Limits) -> Finding:
    if "nofile" not in ours:
        return _unread("descriptors", "this process's")
    soft, hard = ours["nofile"]
    told = f"this process may open {_number(soft)} files ({_number(hard)} if it asks)"
    if soft is not None and soft < _LEAST_DESCRIPTORS:
        return Finding("descriptors", Status.BAD, told, f"`ulimit -n {_CLIENT_DESCRIPTORS}`")
    if soft is not None and soft < _CLIENT_DESCRIPTORS:
        return Finding("descriptors", Status.DOUBTFUL, told, f"`ulimit -n {_CLIENT_DESCRIPTORS}`")
    return Finding("descriptors", Status.GOOD, told)


def _daemon_descriptors(theirs: Limits) -> Finding:
    check = "daemon-descriptors"
    if "nofile" not in theirs:
        return _unread(check)
    _, hard = theirs["nofile"]
    told = f"the daemon may open {_number(hard)} files; each segment takes two"
    remedy = "raise LimitNOFILE= of the unit, or `ulimit -Hn` before `weightd serve`; the units set 65536"
    if hard is not None and hard < _DAEMON_DESCRIPTORS:
        return Finding(check, Status.BAD if hard < _LEAST_DESCRIPTORS else Status.DOUBTFUL, told, remedy)
    return Finding(check, Status.GOOD, told)


def _processes(theirs: Limits) -> Finding:
    if "nproc" not in theirs:
        return _unread("processes")
    soft, _ = theirs["nproc"]
    told = f"the daemon's user may have {_number(soft)} processes and threads"
    if soft is not None and soft < _PROCESSES:
        status = Status.BAD if soft < _PROCESSES // 8 else Status.DOUBTFUL
        return Finding("processes", status, told, "raise `ulimit -u`, or TasksMax= and LimitNPROC= of the unit")
    return Finding("processes", Status.GOOD, told)


def _file_size(theirs: Limits) -> Finding:
    if "fsize" not in theirs:
        return _unread("file-size")
    soft, _ = theirs["fsize"]
    if soft is None:
        return Finding("file-size", Status.GOOD, "segments may be of any size")
    told = f"no segment may be larger than {size(soft)} (RLIMIT_FSIZE)"
    status = Status.BAD if soft < _SMALL_FILE else Status.DOUBTFUL
    return Finding("file-size", status, told, "`ulimit -f unlimited`, or LimitFSIZE= of the unit")


def _address_space(ours: Limits) -> Finding:
    if "as" not in ours:
        return _unread("address-space", "this process's")
    soft, _ = ours["as"]
    if soft is None:
        return Finding("address-space", Status.GOOD, "no limit")
    told = f"this process may map {size(soft)} (RLIMIT_AS); attached weights count in full"
    status = Status.BAD if soft < _LITTLE_SPACE else Status.DOUBTFUL
    return Finding("address-space", status, told, "`ulimit -v unlimited`")


def _locked_memory(theirs: Limits, *, gpu: bool | None) -> Finding:
    check = "locked-memory"
    if "memlock" not in theirs:
        return _unread(check)
    soft, _ = theirs["memlock"]
    told = f"{'no limit' if soft is None else size(soft)} (RLIMIT_MEMLOCK)"
    if gpu is None and soft is not None and soft < _PINNED:
        return Finding(check, Status.UNKNOWN, f"{told}; whether there is a GPU that needs it is not known")
    if not gpu:
        return Finding(check, Status.GOOD, f"{told}; it matters for loads to a GPU only")
    if soft is not None and soft < _PINNED:
        return Finding(check, Status.DOUBTFUL, told, "`ulimit -l unlimited`, or LimitMEMLOCK=infinity in the unit")
    return Finding(check, Status.GOOD, told)


def _unread(check: str, whose: str = "the daemon's") -> Finding:
    return Finding(check, Status.UNKNOWN, f"{whose} limits are not known")


def _number(limit: int | None) -> str:
    return "any number of" if limit is None else str(limit)
