"""A finding of `weightd doctor`, and the list of its checks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """What a check has found. Only `BAD` makes the command exit with 1."""

    GOOD = "good"
    DOUBTFUL = "doubtful"
    """It works, but less well than it could, or not for long; or a look did not answer in time."""
    BAD = "bad"
    """Something that weightd needs does not work."""
    UNKNOWN = "unknown"
    """This user cannot find out, or there is nothing to look at yet."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `check` is one of CHECKS, `remedy` says what to do and is empty if there is nothing."""

    check: str
    status: Status
    found: str
    remedy: str = ""


EXTRAS = (
    "cli", "daemon", "torch", "transformers", "diffusers", "cuda", "gguf", "metrics", "plan", "top", "web", "fleet",
)  # fmt: skip
"""The extras that a user may want; the others are for developers."""

AREAS: dict[str, tuple[str, ...]] = {
    "daemon": ("socket", "socket-folder", "access", "daemon", "devices"),
    "limits": ("descriptors", "daemon-descriptors", "processes", "file-size", "address-space", "locked-memory"),
    "memory": ("budget", "cgroup", "overcommit", "mappings", "memfd", "huge-pages", "pagemap"),
    "service": ("systemd", "unit", "unit-type", "descriptor-store"),
    "storage": ("state-dir",),
    "gpu": (
        "gpu",
        "gpu-nodes",
        "gpu-driver",
        "gpu-visible",
        "gpu-compute-mode",
        "gpu-mps",
        "gpu-persistence",
        "gpu-fabric",
    ),
    "packages": ("base-packages", *(f"extra-{name}" for name in EXTRAS)),
}
"""The checks by area, in the order of the report. Checks that do not apply here are left out of a report."""

CHECKS: dict[str, str] = {check: area for area, checks in AREAS.items() for check in checks}
"""The area of every check. The names are a contract: programs read them in the JSON."""
