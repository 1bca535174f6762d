"""Judges host memory: the budget against what the machine and its cgroups give, and the settings of the kernel."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightd._sizes import size
from weightd.cli.health.asking import Answer
from weightd.cli.health.finding import Finding, Status

_FILES = {
    "overcommit": "/proc/sys/vm/overcommit_memory",
    "mappings": "/proc/sys/vm/max_map_count",
    "memfd_noexec": "/proc/sys/vm/memfd_noexec",
    "shmem_enabled": "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
    "meminfo": "/proc/meminfo",
}
_KERNELS_MAPPINGS = 65530
"""The kernel's default of vm.max_map_count."""
_FEW_MAPPINGS = 4096
_LEAST_HEADROOM = 256 << 20
_BOOKS_SHARE = 0.9
"""A budget above this share of a cgroup's limit leaves little for the daemon's books, manifests and loaders."""
_STRICT = "2"
_PAGEMAP = "pagemap"

Kernel = Mapping[str, str]
"""Texts of the files above, by name; a file that cannot be read is left out. `pagemap` is empty if that reads."""


def read(root: Path = Path("/")) -> Kernel:
    """Read the kernel's settings; files of /proc and /sys do not hang."""
    found: dict[str, str] = {}
    for name, file in _FILES.items():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found[name] = (root / file.lstrip("/")).read_text().strip()
    found[_PAGEMAP] = ""
    try:
        descriptor = os.open(root / "proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.pread(descriptor, 8, 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        found[_PAGEMAP] = error.strerror or str(error)
    return found


def judge_memory(answer: Answer, daemon: Mapping[str, Any], kernel: Kernel) -> list[Finding]:
    """Judge the answer of the look `host`; `daemon` are the facts of one that answers, empty if none does."""
    return [
        *(answer.failed("budget", "cgroup") or _limits(answer.facts, daemon)),
        _overcommit(kernel),
        _mappings(kernel),
        *(answer.failed("memfd") or [_memfd(answer.facts, kernel)]),
        _huge_pages(kernel),
        _pagemap(kernel),
    ]


def _limits(facts: Mapping[str, Any], daemon: Mapping[str, Any]) -> list[Finding]:
    hosts = [each for each in daemon.get("devices", ()) if each["kind"] == "host"]
    budget, used = facts["budget"], 0
    if daemon:  # what its settings say here need not be what it was started with
        budget, used = (hosts[0]["budget"], hosts[0]["used"]) if hosts else (None, 0)
    elif facts["settings_error"] or facts["budget_error"]:
        what = facts["settings_error"] or facts["budget_error"]
        wrong = Finding("budget", Status.BAD, what, "correct the setting; `weightd config` shows where it comes from")
        return [wrong, _cgroup(facts, None, known=facts["cgroup_known"])]
    known = facts["cgroup_known"] and (not daemon or bool(daemon["pid"]))  # else the limit is this process's own
    return [_budget(facts, budget, used), _cgroup(facts, budget, known=known)]


def _budget(facts: Mapping[str, Any], budget: int | None, used: int) -> Finding:
    if budget is None:
        return Finding("budget", Status.GOOD, "host memory is not served")
    told = f"{size(budget)} of host memory; the machine, or its cgroup, has {size(facts['capacity'])}"
    if facts["available"] is None:
        return Finding("budget", Status.UNKNOWN, f"{told}; how much is available is not known")
    if budget > facts["available"] + used:
        left = f"{told}; {size(facts['available'])} are available beside {size(used)} in use by the daemon"
        return Finding("budget", Status.DOUBTFUL, left, "end other programs, or lower `budget`")
    return Finding("budget", Status.GOOD, told)


def _cgroup(facts: Mapping[str, Any], budget: int | None, *, known: bool) -> Finding:
    if not known:
        return Finding("cgroup", Status.UNKNOWN, "the daemon's cgroup cannot be read by this user")
    limit = facts["cgroup"]
    if limit is None:
        return Finding("cgroup", Status.GOOD, "no cgroup limits the memory")
    told = f"the cgroup's limit is {size(limit)}"
    if budget is None:
        return Finding("cgroup", Status.UNKNOWN, f"{told}; the budget of host memory is not known")
    told += f", the budget {size(budget)}"
    remedy = "lower `budget`, or raise the limit (MemoryMax= of the unit, memory of the container)"
    if budget > limit:
        return Finding("cgroup", Status.BAD, f"{told}: the kernel will kill the daemon as it fills", remedy)
    if budget > limit * _BOOKS_SHARE:
        return Finding("cgroup", Status.DOUBTFUL, f"{told}: little is left for books, loaders and manifests", remedy)
    return Finding("cgroup", Status.GOOD, told)


def _overcommit(kernel: Kernel) -> Finding:
    if "overcommit" not in kernel:
        return Finding("overcommit", Status.UNKNOWN, "vm.overcommit_memory cannot be read")
    mode = kernel["overcommit"]
    told = f"vm.overcommit_memory is {mode}"
    if mode != _STRICT:
        return Finding("overcommit", Status.GOOD, told)
    sizes = [re.search(rf"^{key}:\s+(\d+) kB$", kernel.get("meminfo", ""), re.MULTILINE) for key in _COMMITTED]
    limit, committed = (int(found[1]) << 10 if found else None for found in sizes)
    remedy = "`sysctl vm.overcommit_memory=0`, or raise vm.overcommit_ratio"
    told += ": every process that attaches is charged for all that it maps, shared or not"
    if limit is None or committed is None:
        return Finding("overcommit", Status.DOUBTFUL, told, remedy)
    left = max(0, limit - committed)
    status = Status.BAD if left < _LEAST_HEADROOM else Status.DOUBTFUL
    return Finding("overcommit", status, f"{told}; {size(left)} are left", remedy)


_COMMITTED = ("CommitLimit", "Committed_AS")


def _mappings(kernel: Kernel) -> Finding:
    text = kernel.get("mappings", "")
    if not text.isdigit():
        return Finding("mappings", Status.UNKNOWN, "vm.max_map_count cannot be read")
    told = f"vm.max_map_count is {text}"
    if int(text) < _KERNELS_MAPPINGS:
        status = Status.BAD if int(text) < _FEW_MAPPINGS else Status.DOUBTFUL
        return Finding("mappings", status, told, f"`sysctl vm.max_map_count={_KERNELS_MAPPINGS}`, the kernel's default")
    return Finding("mappings", Status.GOOD, told)


def _memfd(facts: Mapping[str, Any], kernel: Kernel) -> Finding:
    setting = kernel.get("memfd_noexec")
    told = f"vm.memfd_noexec is {setting}" if setting else "this kernel has no vm.memfd_noexec"
    if facts["memfd_error"]:
        remedy = (
            "`sysctl vm.memfd_noexec=1`" if setting == _STRICT else "see what forbids memfd_create: seccomp, limits"
        )
        return Finding("memfd", Status.BAD, f"no segment can be made: {facts['memfd_error']}; {told}", remedy)
    if setting == _STRICT:
        remedy = "Linux 6.3 to 6.5 refuse segments with it: `sysctl vm.memfd_noexec=1`"
        return Finding("memfd", Status.DOUBTFUL, f"segments can be made; {told}", remedy)
    return Finding("memfd", Status.GOOD, f"segments can be made; {told}")


def _huge_pages(kernel: Kernel) -> Finding:
    check = "huge-pages"
    text = kernel.get("shmem_enabled", "")
    chosen = re.search(r"\[(\w+)\]", text)
    if chosen is None:
        return Finding(check, Status.UNKNOWN, "this kernel does not tell (transparent_hugepage/shmem_enabled)")
    told = f"shmem_enabled is {chosen[1]}"
    if chosen[1] in ("never", "deny"):
        remedy = f"as root: `echo advise >{_FILES['shmem_enabled']}`, before anything is loaded"
        told += ": shared memory has small pages, and a client's first access takes a fault for every 4 KiB, not 2 MiB"
        return Finding(check, Status.DOUBTFUL, f"{told} (2 GB: 158 ms instead of 18 where it was measured)", remedy)
    return Finding(check, Status.GOOD, f"{told}: shared memory may have huge pages, which make first accesses cheap")


def _pagemap(kernel: Kernel) -> Finding:
    if _PAGEMAP not in kernel:
        return Finding("pagemap", Status.UNKNOWN, "it was not looked at")
    if why := kernel[_PAGEMAP]:
        told = f"/proc/self/pagemap cannot be read ({why}): reports do not tell which shared bytes were written"
        return Finding("pagemap", Status.DOUBTFUL, told, "mount /proc without restrictions, or ignore this")
    return Finding("pagemap", Status.GOOD, "/proc/self/pagemap can be read")
