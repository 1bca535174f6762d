"""What the service manager has given this start: the kept descriptors, and what the root record among them says."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any

from .root_record import PersistentRootRecord, RootRecordContents, read_root

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

log = logging.getLogger(__name__)

ROOT = "root"
"""The name under which the root record is kept."""


class GivenDescriptors:
    """The descriptors that were given. `taken` are those that have found an owner; `root` is written to from now on."""

    def __init__(self, named: Sequence[tuple[str, int]]) -> None:
        """Read the root record. Descriptors of damaged and older ones are closed."""
        self.all = list(named)
        self.descriptors: dict[str, int] = {}
        """By name; of two of one name, the first."""
        for name, descriptor in named:
            if name != ROOT:
                self.descriptors.setdefault(name, descriptor)
        self.taken: set[int] = set()
        self.root: PersistentRootRecord | None = None
        self.body = self._find_root()
        """The tables, counters and `schema` of the root record; empty where there is none."""

    def number(self, key: str) -> int:
        """A counter of the root record; 0 where there is none."""
        value = self.body.get(key, 0)
        return value if isinstance(value, int) and 0 <= value < 1 << 60 else 0

    @property
    def used_ids(self) -> list[int]:
        """Numbers that descriptors are named with."""
        return [int(match[1]) for name in self.descriptors if (match := re.fullmatch(r"\w{3}\.(\d{1,18})", name))]

    @property
    def kinds(self) -> dict[str, str]:
        """By UUID, the kind of each device of which anything is kept, as the first row of a segment says.

        A checkpoint without bytes has no segment. Of a GPU, only memory that is shared by VMM is ever kept.
        """
        found: dict[str, str] = {}
        for row in self._rows("segments"):
            uuid, kind = row.get("device"), row.get("kind")
            if f"seg.{row.get('id')}" in self.descriptors and isinstance(uuid, str) and isinstance(kind, str):
                found.setdefault(uuid, kind)
        for row in self._rows("checkpoints"):
            uuid = row.get("device")
            if f"man.{row.get('manifest')}" in self.descriptors and isinstance(uuid, str):
                found.setdefault(uuid, uuid if uuid == "host" else "cuda_vmm")
        return found

    def _rows(self, table: str) -> Iterator[Mapping[str, Any]]:
        rows = self.body.get(table)
        yield from (row for row in rows if isinstance(row, dict)) if isinstance(rows, list) else ()

    def _find_root(self) -> dict[str, Any]:
        """The last content of the root records that were given; the one that has it is `root`."""
        found: dict[int, RootRecordContents] = {}
        for name, descriptor in self.all:
            if name == ROOT:
                if record := read_root(descriptor):
                    found[descriptor] = record
                else:
                    os.close(descriptor)
                    log.warning("a root record is damaged, in both of its slots")
        if not found:
            if self.all:
                log.warning("nothing that was kept can be taken up, for want of a root record: starting empty")
            return {}
        chosen = max(found, key=lambda descriptor: found[descriptor].sequence)
        for descriptor in found.keys() - {chosen}:
            os.close(descriptor)
            log.warning("a root record is left: another is newer")
        self.root = PersistentRootRecord(chosen, found[chosen].sequence)
        return {**found[chosen].body, "schema": found[chosen].schema}
