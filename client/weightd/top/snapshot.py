"""What the daemon answered last, as one value that never changes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from weightd.inspection import LoadInfo, SharedPair
from weightd.types import CheckpointInfo, DaemonEvent, LeaseInfo, Stats


@dataclass(frozen=True, slots=True)
class DaemonAnswers:
    """The answers to one round of questions. Parts that did not change between two rounds are the same objects.

    `loads` and `pairs` are None where the daemon cannot tell; `missing` says why. `private` has the bytes of private
    copies by process id, None where they cannot be read. `totals` are bytes of whole GPUs by UUID, as far
    as NVML knows them.
    """

    stats: Stats
    checkpoints: tuple[CheckpointInfo, ...] = ()
    leases: tuple[LeaseInfo, ...] = ()
    loads: tuple[LoadInfo, ...] | None = ()
    pairs: tuple[SharedPair, ...] | None = ()
    private: Mapping[int, int | None] = field(default_factory=dict)
    totals: Mapping[str, int] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True, slots=True)
class DaemonSnapshot:
    """The last answers and events, at a moment in UTC.

    While the daemon does not answer, `problem` says why, `since` is when that began, and the answers are old ones.
    """

    at: datetime
    answers: DaemonAnswers | None = None
    events: tuple[DaemonEvent, ...] = ()
    problem: str = ""
    since: datetime | None = None
