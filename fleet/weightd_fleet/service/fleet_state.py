"""What a catalogue knows of its fleet: each node's last inventory, and by content what is missing where.

It is soft state. Agents tell all of it again to a catalogue that begins anew.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from weightd_fleet.agent.resident import DEVICE
from weightd_fleet.core.catalogue import DeviceReport, FleetCatalogue, PlacementDecision
from weightd_fleet.core.joint_planning import JointPlan, plan_together

from .references import FleetNames, NodeNames
from .results import FleetCheckpoint, FleetNode, NodeDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightd_fleet.agent.inventory import DeviceInventory, NodeInventory, ServableCheckpoint
    from weightd_fleet.core.manifest import FleetManifest

    from .members import FleetMember

_NOT_YET: Final = "its agent has not answered yet"


class _NodeRecord:
    """A member, and what its agent said last; None if it does not answer now, and `problem` says why."""

    def __init__(self, member: FleetMember, address: str) -> None:
        self.member = member
        self.address = address
        self.inventory: NodeInventory | None = None
        self.problem = _NOT_YET
        self.settled = False
        """Whether it was heard, or could not be."""

    @property
    def is_open(self) -> bool:
        """Whether it can take and serve checkpoints."""
        return self.inventory is not None and not self.inventory.draining

    @property
    def host_memory(self) -> DeviceInventory | None:
        """The device that checkpoints are fetched into."""
        devices = self.inventory.devices if self.inventory else ()
        return next((device for device in devices if device.device == DEVICE), None)

    def resident(self) -> dict[str, bool]:
        """The checkpoints in host memory, and whether each is pinned."""
        memory = self.host_memory
        return {one.name: one.pinned for one in memory.checkpoints} if memory else {}

    @property
    def entries(self) -> tuple[ServableCheckpoint, ...]:
        """The checkpoints of which it has every byte."""
        return self.inventory.entries if self.inventory else ()

    def serves(self) -> set[str]:
        """Their names in the fleet."""
        return {entry.name for entry in self.entries}


class FleetState:
    """The nodes of a fleet and its catalogue. Safe for use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._catalogue = FleetCatalogue()
        self._nodes: dict[str, _NodeRecord] = {}
        self._names: FleetNames | None = None
        self._revision = 0
        self._begun = time.monotonic()
        self.refilled_seconds: float | None = None
        """After how long each member had been heard, or could not be; None until then."""

    # -- what changes it ---------------------------------------------------------------------------------------------

    def join(self, member: FleetMember, address: str) -> None:
        """Enter a node, whose agent is looked for at an address."""
        with self._changed:
            self._nodes[member.node] = _NodeRecord(member, address)

    def leave(self, node: str) -> None:
        """Forget a node."""
        with self._changed:
            self._update(node, None, "")
            self._nodes.pop(node, None)
            self._note_refill()

    def lose(self, node: str, problem: str) -> None:
        """Note that a node's agent does not answer: nothing is known of its memory then."""
        with self._changed:
            self._update(node, None, problem)
            self._settle(node)

    def lacks(self, inventory: NodeInventory) -> set[str]:
        """The checkpoints in an inventory whose manifests the catalogue needs before it is taken."""
        named = {entry.name for entry in inventory.entries}
        named |= {one.name for device in inventory.devices for one in device.checkpoints}
        with self._changed:
            return {name for name in named if name not in self._catalogue}

    def add(self, manifest: FleetManifest) -> None:
        """Enter a manifest, which its name has proven. Errors: FormatError, InvalidReferenceError (too many)."""
        with self._changed:
            self._catalogue.add(manifest.name, manifest.blobs())

    def take(self, node: str, inventory: NodeInventory) -> None:
        """Take what a node's agent says."""
        with self._changed:
            self._update(node, inventory, inventory.problem)
            self._settle(node)

    def _update(self, node: str, inventory: NodeInventory | None, problem: str) -> None:
        record = self._nodes.get(node)
        if record is None:
            return
        was_there = record.is_open and record.host_memory is not None
        before = record.entries
        record.inventory, record.problem = inventory, problem
        if record.entries != before:  # what is resident changes much more often
            self._names = None
        if record.is_open and (memory := record.host_memory) is not None:
            self._revision += 1
            self._catalogue.report(_report(node, memory, self._revision))
        elif was_there:
            self._catalogue.remove(_device(node))
        self._changed.notify_all()

    def _settle(self, node: str) -> None:
        if record := self._nodes.get(node):
            record.settled = True
        self._note_refill()

    def _note_refill(self) -> None:
        if self.refilled_seconds is None and self._nodes and all(one.settled for one in self._nodes.values()):
            self.refilled_seconds = time.monotonic() - self._begun
        self._changed.notify_all()

    # -- what it answers ---------------------------------------------------------------------------------------------

    def wait_for_refill(self, seconds: float) -> None:
        """Wait until each member has been heard, or could not be."""
        self.wait_until(lambda: self.refilled_seconds is not None, seconds)

    def wait_until(self, so: Callable[[], bool], seconds: float) -> bool:
        """Wait until something is so, which is asked after each change. Returns whether it is."""
        with self._changed:
            return self._changed.wait_for(so, seconds)

    def nodes(self) -> tuple[FleetNode, ...]:
        """All nodes, by their names."""
        with self._changed:
            records = sorted(self._nodes.values(), key=lambda record: record.member[1::-1])
            return tuple(_node(record) for record in records)

    def checkpoints(self) -> tuple[FleetCheckpoint, ...]:
        """All checkpoints that a node has, by their names."""
        resident: dict[str, list[str]] = defaultdict(list)
        pinned: dict[str, list[str]] = defaultdict(list)
        served: dict[str, list[str]] = defaultdict(list)
        with self._changed:
            names = self._current_names()
            for node, record in sorted(self._nodes.items()):
                for checkpoint, is_pinned in record.resident().items():
                    resident[checkpoint].append(node)
                    if is_pinned:
                        pinned[checkpoint].append(node)
                for checkpoint in record.serves():
                    served[checkpoint].append(node)
        found = [
            FleetCheckpoint(
                checkpoint=checkpoint,
                names=names.of(checkpoint),
                size_bytes=names.size_bytes(checkpoint),
                resident_on=tuple(resident[checkpoint]),
                pinned_on=tuple(pinned[checkpoint]),
                served_by=tuple(served[checkpoint]),
            )
            for checkpoint in names.checkpoints()
        ]
        return tuple(sorted(found, key=lambda one: (one.names or (one.checkpoint,), one.checkpoint)))

    def named(self, reference: str) -> str:
        """The checkpoint that a reference stands for. Errors: NotFoundError, InvalidReferenceError (several)."""
        with self._changed:
            return self._current_names().checkpoint(reference)

    def name_of(self, checkpoint: str) -> str:
        """What people call a checkpoint; its own name if others are called the same, or it is called nothing."""
        with self._changed:
            return self._current_names().own_name(checkpoint) or checkpoint

    def node_named(self, reference: str) -> FleetNode:
        """The node of an id, a name or an address. Errors: NotFoundError, InvalidReferenceError (several)."""
        with self._changed:
            members = [record.member for record in self._nodes.values()]
            return _node(self._nodes[NodeNames(members).node(reference)])

    def node_name(self, node: str) -> str:
        """What people call a node; its id if it has left."""
        with self._changed:
            record = self._nodes.get(node)
            return record.member.name if record else node

    def choose(self, checkpoint: str, replicas: int) -> PlacementDecision:
        """The devices for replicas of a checkpoint, best first. Errors: NotFoundError.

        Where equally much is missing in memory, a node that has the bytes in files comes first: it moves fewer.
        """
        with self._changed:
            return self._catalogue.choose(checkpoint, replicas, self.servers(checkpoint).keys())

    def plan(self, wanted: Mapping[str, int]) -> JointPlan:
        """Where so many replicas of checkpoints go together. Errors: NotFoundError."""
        with self._changed:
            return plan_together(self._catalogue, wanted)

    def holders(self, checkpoint: str) -> dict[str, bool]:
        """The nodes that can serve others and hold a checkpoint in memory, and whether it is pinned there."""
        with self._changed:
            held = {node: record.resident() for node, record in self._nodes.items() if record.is_open}
        return {node: resident[checkpoint] for node, resident in held.items() if checkpoint in resident}

    def servers(self, checkpoint: str) -> dict[str, str]:
        """The nodes that can serve a checkpoint, with their agents' addresses."""
        with self._changed:
            return {
                node: record.address
                for node, record in self._nodes.items()
                if record.is_open and checkpoint in record.serves()
            }

    def _current_names(self) -> FleetNames:
        if self._names is None:
            self._names = FleetNames(entry for record in self._nodes.values() for entry in record.entries)
        return self._names


def _node(record: _NodeRecord) -> FleetNode:
    inventory = record.inventory
    return FleetNode(
        node=record.member.node,
        name=record.member.name,
        address=record.address,
        state="unknown" if inventory is None else "draining" if inventory.draining else "live",
        problem=record.problem,
        devices=tuple(
            NodeDevice(
                device=device.device,
                kind=device.kind,
                budget_bytes=device.budget_bytes,
                used_bytes=device.used_bytes,
                firm_bytes=device.firm_bytes,
                checkpoints=tuple(one.name for one in device.checkpoints),
                firm=tuple(one.name for one in device.checkpoints if one.firm),
                pinned=tuple(one.name for one in device.checkpoints if one.pinned),
            )
            for device in (inventory.devices if inventory else ())
        ),
        serves=tuple(sorted(record.serves())),
    )


def _device(node: str) -> str:
    return f"{node}/{DEVICE}"


def _report(node: str, device: DeviceInventory, revision: int) -> DeviceReport:
    return DeviceReport(
        device=_device(node),
        node=node,
        epoch="",
        revision=revision,
        budget_bytes=device.budget_bytes,
        used_bytes=device.used_bytes,
        firm_bytes=device.firm_bytes,
        page_bytes=device.page_bytes,
        firm=tuple(one.name for one in device.checkpoints if one.firm),
        evictable=tuple(one.name for one in device.checkpoints if not one.firm),
    )
