"""What people write for a checkpoint or a node of a fleet, and what it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from weightd.errors import InvalidReferenceError, NotFoundError
from weightd_fleet.core.digests import is_fleet_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from weightd_fleet.agent.inventory import ServableCheckpoint

    from .members import FleetMember

_SHORTEST: Final = 6
"""Digits of a node's id that may stand for it if no other begins with them."""
_MOST_LISTED: Final = 8


class FleetNames:
    """The checkpoints of a fleet, and what they were published as: a path, a repository, or a revision of one."""

    def __init__(self, entries: Iterable[ServableCheckpoint]) -> None:
        self._sizes: dict[str, int] = {}
        self._names: dict[str, set[str]] = {}
        self._checkpoints: dict[str, set[str]] = {}
        for entry in entries:
            self._sizes[entry.name] = entry.total_bytes
            said = {entry.reference, entry.repository}
            if entry.repository:
                said.add(f"{entry.repository}@{entry.commit}")
            # An agent may say anything: a name in the fleet stands for the bytes that it is of, and for no others.
            for name in said - {""}:
                if not is_fleet_name(name):
                    self._names.setdefault(entry.name, set()).add(name)
                    self._checkpoints.setdefault(name, set()).add(entry.name)

    def checkpoints(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self._sizes)

    def of(self, checkpoint: str) -> tuple[str, ...]:
        """What a checkpoint was published as, the shortest first."""
        return tuple(sorted(self._names.get(checkpoint, ()), key=lambda name: (len(name), name)))

    def own_name(self, checkpoint: str) -> str:
        """What a checkpoint was published as, and no other one was; "" if there is no such name."""
        return next((name for name in self.of(checkpoint) if len(self._checkpoints[name]) == 1), "")

    def size_bytes(self, checkpoint: str) -> int:
        """Bytes of a checkpoint's tensors."""
        return self._sizes[checkpoint]

    def checkpoint(self, reference: str) -> str:
        """The checkpoint that a reference stands for. Errors: NotFoundError, InvalidReferenceError (several)."""
        found = (
            {reference} & self._sizes.keys() if is_fleet_name(reference) else self._checkpoints.get(reference, set())
        )
        if not found:
            raise NotFoundError(f"{reference[:200]}: no node that answers has it; publish it on one of them")
        if len(found) > 1:
            listed = ", ".join(
                f"{one} ({'; '.join(name for name in self.of(one) if name != reference) or reference})"
                for one in sorted(found)[:_MOST_LISTED]
            )
            raise InvalidReferenceError(
                f"{reference[:200]}: {len(found)} checkpoints have this name; give one of {listed}"
            )
        return next(iter(found))


class NodeNames:
    """The nodes of a fleet by id, the beginning of an id, name or address."""

    def __init__(self, members: Sequence[FleetMember]) -> None:
        self._members = members

    def node(self, reference: str) -> str:
        """The node's id. Errors: NotFoundError, InvalidReferenceError (several)."""
        found = [one for one in self._members if reference in (one.node, one.name, one.host)]
        if not found and len(reference) >= _SHORTEST:
            found = [one for one in self._members if one.node.startswith(reference)]
        if not found:
            raise NotFoundError(
                f"node {reference[:200]}: the engine counts no node of this id, name or address as alive"
            )
        if len(found) > 1:
            listed = ", ".join(one.node for one in found[:_MOST_LISTED])
            raise InvalidReferenceError(f"node {reference[:200]}: stands for several nodes; give one of {listed}")
        return found[0].node
