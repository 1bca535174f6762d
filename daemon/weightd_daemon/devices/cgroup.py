"""The memory limit that cgroups set for this process: version 1, version 2, or both side by side."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_UNLIMITED = 1 << 62
"""Version 1 has no word for "no limit" and shows the largest number of whole pages that fits into 63 bits."""


class _Mount(NamedTuple):
    """A hierarchy that is mounted: which group is seen at `point`, and whether it is version 2."""

    group: PurePosixPath
    point: Path
    unified: bool


def memory_limit(process: Path = Path("/proc/self")) -> int | None:
    """The lowest memory limit, in bytes, of a process's group and those around it; None where there is none.

    Groups above what is mounted, as in a container, cannot be seen. Version 1 counts them in all the same.
    """
    try:
        groups, mounts = _groups(process), _mounts(process)
    except OSError:
        return None
    limits = [
        limit
        for mount in mounts
        if (group := groups.get(mount.unified)) is not None
        for limit in (_limits_v2(mount, group) if mount.unified else _limits_v1(mount, group))
    ]
    return min(limits, default=None)


def _groups(process: Path) -> dict[bool, PurePosixPath]:
    """The process's group in the hierarchy of version 2 (True), and in that of version 1 which limits memory."""
    found = {}
    for line in (process / "cgroup").read_text(errors="surrogateescape").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        unified = number == "0" and not controllers
        if (unified or "memory" in controllers.split(",")) and path.startswith("/"):
            found[unified] = PurePosixPath(path)
    return found


def _mounts(process: Path) -> list[_Mount]:
    """Where hierarchies that may limit memory are mounted. See proc_pid_mountinfo(5)."""
    found = []
    for line in (process / "mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), [*after.split(" "), "", "", ""][:3]
        if len(fields) < 5 or not (kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(","))):
            continue
        group, point = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
        found.append(_Mount(PurePosixPath(group), Path(point), kind == "cgroup2"))
    return found


def _folders(mount: _Mount, group: PurePosixPath) -> list[Path]:
    """The folders of a group and of those around it, as far as they are mounted, innermost first.

    A group that does not lie below the mounted one is seen as that: a container mounts its own group, or calls it "/".
    """
    inside = group.relative_to(mount.group) if group.is_relative_to(mount.group) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    return [mount.point / inside, *((mount.point / outer) for outer in inside.parents)]


def _limits_v2(mount: _Mount, group: PurePosixPath) -> list[int]:
    texts = (_read(folder / "memory.max").strip() for folder in _folders(mount, group))
    return [int(text) for text in texts if text.isdigit()]  # else it is "max"


def _limits_v1(mount: _Mount, group: PurePosixPath) -> list[int]:
    """The kernel reckons the lowest limit itself, and knows whether those of outer groups count (use_hierarchy)."""
    folders = _folders(mount, group)
    reckoned = re.search(r"^hierarchical_memory_limit (\d+)$", _read(folders[0] / "memory.stat"), re.MULTILINE)
    texts = [reckoned[1]] if reckoned else [_read(folder / "memory.limit_in_bytes").strip() for folder in folders]
    return [int(text) for text in texts if text.isdigit() and int(text) < _UNLIMITED]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):  # it has gone, or may not be read: then it limits nothing that is known
        return ""
