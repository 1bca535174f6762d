"""Checkpoints with their partners and processes, sorted and filtered. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from weightd.cli.output import digest
from weightd.inspection import SharedComponents, SharedPair
from weightd.top.snapshot import DaemonAnswers
from weightd.types import CheckpointInfo, LeaseInfo

Key = tuple[str, ...]
"""Device and digest of a checkpoint; of a process's row, its process id and user besides."""
_NEVER = datetime.min.replace(tzinfo=UTC)


class Partner(NamedTuple):
    """Another checkpoint that has bytes in common with a row's. `only_bytes` nobody uses beside the two."""

    name: str
    content_digest: str
    shared_bytes: int
    only_bytes: int
    components: tuple[SharedComponents, ...]


class ProcessRow(NamedTuple):
    """A process that holds a checkpoint. `private` is of all that it holds, None where it is not known."""

    key: Key
    pid: int | None
    user: str
    command: str
    since: datetime
    waiting: bool
    private: int | None


class CheckpointRow(NamedTuple):
    """A checkpoint with its partners, the biggest first, and the processes that hold it. Unknown partners are None."""

    key: Key
    name: str
    info: CheckpointInfo
    partners: tuple[Partner, ...] | None
    processes: tuple[ProcessRow, ...]


class TableRow(NamedTuple):
    """A line of the table: a checkpoint, or one of its processes."""

    key: Key
    checkpoint: CheckpointRow
    process: ProcessRow | None


@dataclass(frozen=True, slots=True)
class TableView:
    """What keys have chosen: the order, what is looked for, and the selected row."""

    sort: str = "alone"
    reverse: bool = False
    wanted: str = ""
    selected: Key | None = None


ORDERS: Mapping[str, Callable[[CheckpointRow], Any]] = {
    "alone": lambda row: -row.info.exclusive_bytes,
    "size": lambda row: -row.info.total_bytes,
    "shared": lambda row: -row.info.shared_bytes,
    "leases": lambda row: -row.info.leases,
    "used": lambda row: _NEVER - (row.info.last_used_at or _NEVER),
    "name": lambda row: row.name,
}
"""Sort keys, the biggest or latest first, by the name of the order."""


def called(name: str, content_digest: str = "") -> str:
    """Return what people call a checkpoint: its name, of a path the last part, or the start of its digest."""
    return (name.rstrip("/").rpartition("/")[2] or name if name.startswith("/") else name) or digest(content_digest)


def short_command(command: str) -> str:
    """Return a command line without the folder of its program."""
    program, blank, rest = command.partition(" ")
    return f"{called(program)}{blank}{rest}"


def _names(checkpoints: Sequence[CheckpointInfo]) -> dict[str, str]:
    """What each checkpoint is called by its first name or digest; of two paths that end alike, the whole paths."""
    short = {info.name or info.content_digest: called(info.name, info.content_digest) for info in checkpoints}
    counted = Counter(short.values())
    return {whole: name if counted[name] == 1 or not whole.startswith("/") else whole for whole, name in short.items()}


def checkpoint_rows(answers: DaemonAnswers) -> list[CheckpointRow]:
    """Make a row of each checkpoint; loads under way are left out where they are listed by themselves."""
    names = _names(answers.checkpoints)
    partners = None if answers.pairs is None else _partners(answers.pairs, names)
    processes = _processes(answers)
    found = []
    for info in answers.checkpoints:
        if info.state == "loading" and answers.loads is not None:
            continue
        key = (info.device, info.content_digest or info.name)
        theirs = None if partners is None else tuple(partners.get((info.device, info.content_digest), ()))
        name = names[info.name or info.content_digest]
        found.append(CheckpointRow(key, name, info, theirs, tuple(processes.get(key, ()))))
    return found


def _partners(pairs: Sequence[SharedPair], names: Mapping[str, str]) -> dict[Key, list[Partner]]:
    found: dict[Key, list[Partner]] = defaultdict(list)
    for pair in pairs:
        mirrored = tuple(SharedComponents(part.other, part.one, part.shared_bytes) for part in pair.components)
        shared, only = pair.shared_bytes, pair.only_bytes
        found[pair.device, pair.one].append(
            Partner(_named(pair.other_name, pair.other, names), pair.other, shared, only, pair.components)
        )
        found[pair.device, pair.other].append(
            Partner(_named(pair.one_name, pair.one, names), pair.one, shared, only, mirrored)
        )
    for partners in found.values():
        partners.sort(key=lambda partner: (-partner.shared_bytes, partner.name))
    return found


def _named(name: str, content_digest: str, names: Mapping[str, str]) -> str:
    return names.get(name or content_digest) or called(name, content_digest)


def _processes(answers: DaemonAnswers) -> dict[Key, list[ProcessRow]]:
    """The processes by the key of the checkpoint that they hold. Several leases of one process are one row."""
    known: dict[tuple[str, str], Key] = {}
    for info in answers.checkpoints:
        key = (info.device, info.content_digest or info.name)
        for name in (*info.names, info.content_digest):
            known[info.device, name] = key
    grouped: dict[Key, dict[Key, list[LeaseInfo]]] = defaultdict(lambda: defaultdict(list))
    for lease in answers.leases:
        held = known.get((lease.device, lease.checkpoint))
        if held is not None:
            who = "unknown" if lease.pid is None else str(lease.pid)
            grouped[held][(*held, who, lease.user)].append(lease)
    return {
        held: [_process(key, leases, answers.private) for key, leases in sorted(by_process.items(), key=_started)]
        for held, by_process in grouped.items()
    }


def _started(process: tuple[Key, list[LeaseInfo]]) -> tuple[int, Key]:
    """Order processes by number, not by its digits."""
    key, leases = process
    return leases[0].pid or 0, key


def _process(key: Key, leases: list[LeaseInfo], private: Mapping[int, int | None]) -> ProcessRow:
    first = min(leases, key=lambda lease: lease.since)
    copied = None if first.pid is None else private.get(first.pid)
    waiting = all(lease.waiting for lease in leases)
    return ProcessRow(key, first.pid, first.user, first.command, first.since, waiting, copied)


def chosen(checkpoints: Sequence[CheckpointRow], view: TableView) -> list[TableRow]:
    """Sort and filter: each checkpoint is followed by its processes.

    What a filter finds in a checkpoint keeps all its processes; found in processes, only those.
    """
    ordered = sorted(checkpoints, key=lambda row: row.name)  # equal rows keep their places
    ordered.sort(key=ORDERS[view.sort], reverse=view.reverse)
    wanted = view.wanted.casefold()
    found: list[TableRow] = []
    for row in ordered:
        processes = row.processes
        if wanted and not _has(wanted, *row.info.names, row.info.content_digest, row.info.state, row.info.device):
            processes = tuple(each for each in processes if _has(wanted, str(each.pid), each.user, each.command))
            if not processes:
                continue
        found.append(TableRow(row.key, row, None))
        found += [TableRow(process.key, row, process) for process in processes]
    return found


def _has(wanted: str, *texts: str) -> bool:
    return any(wanted in text.casefold() for text in texts)


def place(rows: Sequence[TableRow], selected: Key | None, before: int) -> int:
    """Return the index of the selected row; if it has gone, that of the row that took its place `before`."""
    for at, row in enumerate(rows):
        if row.key == selected:
            return at
    return max(min(before, len(rows) - 1), 0)
