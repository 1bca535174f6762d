"""Who shares with whom, as `stats` and `inspect` show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weightd._sizes import size
from weightd.cli.output import device as short_device
from weightd.cli.output import digest, emit
from weightd.cli.tables import Column, emit_table, emit_text
from weightd.errors import ProtocolMismatchError
from weightd.inspection import SharedPair

if TYPE_CHECKING:
    from weightd.client import Client

MOST_SHOWN = 10
"""Pairs that a table has; --wide prints all."""

_SHARED = Column("SHARED", right=True)
_ONLY = Column("ONLY THEY", right=True, spare=3)
_COMPONENTS = Column("COMPONENTS", elided=True, common=True, spare=1)
_DEVICE = Column("DEVICE", common=True, spare=2)


def ask(
    client: Client, reference: str | None = None, device: str | None = None, *, every: bool
) -> list[SharedPair] | None:
    """Ask for every pair, or for one more than a table has; None from a daemon that is too old to know them."""
    try:
        return client.sharing(reference, device, most=None if every else MOST_SHOWN + 1)
    except ProtocolMismatchError:
        return None


def pair_json(pair: SharedPair) -> dict[str, Any]:
    """A pair as `stats --format json` has it. Its keys are a contract."""
    return {
        "device": pair.device,
        "checkpoints": [_called(pair.one_name, pair.one), _called(pair.other_name, pair.other)],
        "content_digests": [pair.one, pair.other],
        "shared_bytes": pair.shared_bytes,
        "only_bytes": pair.only_bytes,
        "components": _components(pair),
        "component_pairs": [part._asdict() for part in pair.components],
    }


def print_pairs(pairs: Sequence[SharedPair], width: int | None, *, wide: bool) -> None:
    """Print the pairs with most in common, or with `wide` all."""
    columns = (_SHARED, _ONLY, Column("BETWEEN", elided=True), Column("AND", elided=True), _COMPONENTS, _DEVICE)
    _print(columns, pairs, width, wide=wide)


def print_partners(pairs: Sequence[SharedPair], width: int | None, *, wide: bool) -> None:
    """Print what one checkpoint, `one` of each pair, shares with others."""
    _print((_SHARED, _ONLY, Column("WITH", elided=True), _COMPONENTS), pairs, width, wide=wide)


def _print(columns: Sequence[Column], pairs: Sequence[SharedPair], width: int | None, *, wide: bool) -> None:
    if not pairs:
        return
    empty = {
        _COMPONENTS.title: not any(pair.components for pair in pairs),
        _DEVICE.title: all(pair.device == "host" for pair in pairs),
    }
    kept = [column for column in columns if not empty.get(column.title)]
    rows = []
    for pair in pairs if wide else pairs[:MOST_SHOWN]:
        one, other = _called(pair.one_name, pair.one), _called(pair.other_name, pair.other)
        cells = {
            "SHARED": size(pair.shared_bytes),
            "ONLY THEY": size(pair.only_bytes),
            "BETWEEN": one,
            "AND": other,
            "WITH": other,
            "COMPONENTS": ", ".join(_components(pair)) or "-",
            "DEVICE": short_device(pair.device, full=wide),
        }
        rows.append(tuple(cells[column.title] for column in kept))
    emit("")
    emit_table(kept, rows, width)
    if len(rows) < len(pairs):
        emit_text("and more; --wide lists all", width)


def _components(pair: SharedPair) -> list[str]:
    return sorted({name for part in pair.components for name in (part.one, part.other) if name})


def _called(name: str, content_digest: str) -> str:
    return name or digest(content_digest)
