"""The lines about one checkpoint: its parts, its partners, and the processes that hold it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from weightd._sizes import size
from weightd.cli.output import device as short_device
from weightd.cli.output import digest, plural
from weightd.cli.tables import Column
from weightd.inspection import SharedComponents
from weightd.top.checkpoint_rows import CheckpointRow, Partner, short_command
from weightd.top.columns import aligned
from weightd.top.lines import Glyphs, Line, clean, padded, wrapped
from weightd.top.panels import age
from weightd.types import CheckpointDetails

_LABEL = 10
_MOST_LINES = 4
_PARTS = (Column("COMPONENT", elided=True), Column("TENSORS", right=True, spare=1), Column("SIZE", right=True),
          Column("SHARED", right=True))  # fmt: skip
_PARTNERS = (Column("SHARES WITH", elided=True), Column("COMMON", right=True),
             Column("BOTH GIVE BACK", right=True), Column("COMPONENTS", elided=True, spare=1))  # fmt: skip
_PROCESSES = (Column("PID", right=True), Column("USER"), Column("PRIVATE", right=True), Column("SINCE", right=True),
              Column("COMMAND", elided=True))  # fmt: skip


def details(
    row: CheckpointRow,
    found: CheckpointDetails | None,
    everything: Sequence[CheckpointRow],
    width: int,
    now: datetime,
    glyphs: Glyphs,
) -> list[Line]:
    """Describe one checkpoint. `found` is what the daemon said of its parts and files, None until it has answered."""
    info = row.info
    facts = {
        "name": ", ".join(info.names) or "-",
        "digest": digest(info.content_digest) or "-",
        "device": short_device(info.device),
        "state": f"{info.state}, pinned" if info.pinned else info.state,
        "owner": info.owner or "unknown",
        "size": f"{size(info.total_bytes)} in {plural(info.tensors, 'tensor')}",
        "alone": f"{size(info.exclusive_bytes)}, which a removal gives back",
        "shared": size(info.shared_bytes),
        "loaded": _since(info.loaded_at, now),
        "last used": _since(info.last_used_at, now),
    }
    if found is not None and found.reference and found.reference not in info.names:
        facts["from"] = found.reference
    if found is not None and found.note:
        facts["note"] = found.note
    lines: list[Line] = []
    for label, value in facts.items():
        broken = wrapped(clean(value, glyphs), width - _LABEL - 1, _MOST_LINES)
        lines += [((padded(label if at == 0 else "", _LABEL + 1), "head"), *line) for at, line in enumerate(broken)]
    if found is not None and any(part.name for part in found.components):
        parts = [
            [part.name or "-", str(part.tensors), size(part.total_bytes), size(part.shared_bytes)]
            for part in found.components
        ]
        lines += _block(_PARTS, parts, width, glyphs)
    if row.partners:
        lines += _block(_PARTNERS, [_partner(row, each, everything) for each in row.partners], width, glyphs)
    if row.processes:
        processes = [
            [
                "unknown" if each.pid is None else str(each.pid),
                each.user,
                "unknown" if each.private is None else size(each.private),
                age(each.since, now),
                short_command(each.command),
            ]
            for each in row.processes
        ]
        lines += _block(_PROCESSES, processes, width, glyphs)
    return lines


def _since(moment: datetime | None, now: datetime) -> str:
    return "-" if moment is None else f"{age(moment, now)} ago, at {moment.astimezone():%Y-%m-%d %H:%M:%S}"


def _partner(row: CheckpointRow, partner: Partner, everything: Sequence[CheckpointRow]) -> list[str]:
    alone = [
        each.info.exclusive_bytes
        for each in everything
        if (each.info.device, each.info.content_digest) == (row.info.device, partner.content_digest)
    ]
    both = size(row.info.exclusive_bytes + alone[0] + partner.only_bytes) if alone else "unknown"
    ordered = sorted(partner.components, key=lambda part: -part.shared_bytes)
    return [partner.name, size(partner.shared_bytes), both, ", ".join(map(_component, ordered))]


def _component(part: SharedComponents) -> str:
    """`vae 317 MiB`, or `unet = model 1.60 GiB` where the parts have different names.

    A checkpoint without components has none.
    """
    names = dict.fromkeys(filter(None, (part.one, part.other)))
    return f"{' = '.join(names) or '-'} {size(part.shared_bytes)}"


def _block(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, glyphs: Glyphs) -> list[Line]:
    """An empty line and a table."""
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    wanted = [columns[at] for at in kept]
    return [(), *aligned(wanted, [[clean(row[at], glyphs) for at in kept] for row in rows], width)]
