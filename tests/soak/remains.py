"""What a daemon and its manager have in hand: the same at the end of a soak as at its start, or something leaked."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass

import weightd
from support.daemon import Daemon
from support.manager import Manager

_OF_INDEX = re.compile(r".*/digests-v\d+\.sqlite3")
"""Opened when it is first needed, and kept."""


@dataclass(frozen=True)
class Remains:
    """Counts, but for `kept`: the names that the manager keeps descriptors under."""

    descriptors: dict[str, int]
    processes: int
    memory_bytes: int
    leases: int
    checkpoints: int
    blobs: int
    used_bytes: int
    kept: tuple[str, ...]


def remains(daemon: Daemon, manager: Manager, client: weightd.Client) -> Remains:
    """Ask the kernel, the manager and the daemon."""
    manager.settle()
    stats = client.stats()
    own = daemon.allocated() if daemon.backend.is_host else daemon.backend.bytes_on_double()
    return Remains(
        descriptors=dict(sorted(_descriptors(daemon.pid).items())),
        processes=len(daemon.loaders()) + len(daemon.holders()),
        memory_bytes=own or 0,
        leases=stats.leases,
        checkpoints=stats.checkpoints,
        blobs=stats.blobs,
        used_bytes=sum(device.used_bytes for device in stats.devices),
        kept=tuple(sorted(manager.names())),
    )


def _descriptors(pid: int) -> Counter[str]:
    """How many descriptors of which kind: the numbers of sockets, pipes and segments are left out."""
    found: Counter[str] = Counter()
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{number}")
        except FileNotFoundError:  # closed meanwhile
            continue
        if not _OF_INDEX.match(target):
            found[re.sub(r"\d+", "N", target)] += 1
    return found
