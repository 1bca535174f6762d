"""What a node holds, as its agent tells it to a catalogue: plain values, and their form on the wire.

A peer may send anything: whatever cannot be is refused when it is decoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from weightd.errors import FormatError
from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.core.digests import is_fleet_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .addresses import AgentAddress

MAX_ENTRIES: Final = 100_000
_MAX_DEVICES: Final = 64
_MAX_TEXT: Final = 4096
_MAX_BYTES: Final = 1 << 60
_MAX_PAGE_BYTES: Final = 1 << 30
"""The largest pages there are. Books multiply them by the segments of a checkpoint, in 64 bits."""


class ServableCheckpoint(NamedTuple):
    """A checkpoint that can be fetched: its name in the fleet, where on a hub it is from, what it was published as."""

    name: str
    total_bytes: int
    tensors: int
    repository: str
    commit: str
    reference: str


class ResidentCheckpoint(NamedTuple):
    """A checkpoint that a device holds whole; it cannot be evicted now if it is `firm`, by a pin or by leases."""

    name: str
    pinned: bool
    firm: bool


class DeviceInventory(NamedTuple):
    """What a device holds, in bytes. No eviction frees `firm_bytes` now; `page_bytes` is the unit of allocation."""

    device: str
    kind: str
    budget_bytes: int
    used_bytes: int
    firm_bytes: int
    page_bytes: int
    checkpoints: tuple[ResidentCheckpoint, ...]


class NodeInventory(NamedTuple):
    """What a node can serve, and what its devices hold; `problem` says why there are none."""

    entries: tuple[ServableCheckpoint, ...]
    devices: tuple[DeviceInventory, ...]
    draining: bool = False
    problem: str = ""


def encode(inventory: NodeInventory) -> peer_pb2.Inventory:
    """An inventory as a message."""
    return peer_pb2.Inventory(
        entries=[peer_pb2.InventoryEntry(**entry._asdict()) for entry in inventory.entries],
        draining=inventory.draining,
        devices=[
            peer_pb2.DeviceInventory(
                **device._replace(checkpoints=())._asdict() | {"checkpoints": _encoded(device.checkpoints)}
            )
            for device in inventory.devices
        ],
        problem=inventory.problem,
    )


def _encoded(checkpoints: Iterable[ResidentCheckpoint]) -> list[peer_pb2.ResidentCheckpoint]:
    return [peer_pb2.ResidentCheckpoint(**one._asdict()) for one in checkpoints]


def decode(message: Any, peer: AgentAddress) -> NodeInventory:
    """The inventory in a message of a peer. Errors: FormatError."""
    devices = [device for device in message.devices if device.device]
    counts = (len(message.entries), sum(len(device.checkpoints) for device in devices))
    if max(counts) > MAX_ENTRIES or len(devices) > _MAX_DEVICES:
        raise FormatError(f"peer {peer}: lists {max(counts)} checkpoints on {len(devices)} devices, over the limit")
    names = [entry.name for entry in message.entries] + [one.name for each in devices for one in each.checkpoints]
    sizes = [entry.total_bytes for entry in message.entries]
    sizes += [n for d in devices for n in (d.budget_bytes, d.used_bytes, d.firm_bytes)]
    largest_page = max((device.page_bytes for device in devices), default=0)
    if not all(map(is_fleet_name, names)) or max(sizes, default=0) > _MAX_BYTES or largest_page > _MAX_PAGE_BYTES:
        raise FormatError(f"peer {peer}: sends an inventory with a name or a size that cannot be")
    if len({device.device for device in devices}) < len(devices):
        raise FormatError(f"peer {peer}: sends an inventory that names a device twice")
    return NodeInventory(
        entries=tuple(
            ServableCheckpoint(
                entry.name,
                entry.total_bytes,
                entry.tensors,
                _text(entry.repository),
                _text(entry.commit),
                _text(entry.reference),
            )
            for entry in message.entries
        ),
        devices=tuple(_decoded(device) for device in devices),
        draining=message.draining,
        problem=_text(message.problem),
    )


def _decoded(device: Any) -> DeviceInventory:
    return DeviceInventory(
        device=_text(device.device),
        kind=_text(device.kind),
        budget_bytes=device.budget_bytes,
        used_bytes=device.used_bytes,
        firm_bytes=device.firm_bytes,
        page_bytes=max(1, device.page_bytes),
        checkpoints=tuple(ResidentCheckpoint(one.name, one.pinned, one.firm) for one in device.checkpoints),
    )


def _text(text: str) -> str:
    """A text for people on one line, whoever wrote it."""
    return text[:_MAX_TEXT].encode("unicode_escape").decode() if not text.isprintable() else text[:_MAX_TEXT]
