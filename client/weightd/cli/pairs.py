"""What resident checkpoints share, and what an eviction could free, computed here from their lists of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from weightd.cli.output import digest
from weightd.errors import WeightdError
from weightd.types import ALIGNMENT, CheckpointInfo, TensorInfo

if TYPE_CHECKING:
    from weightd.client import Client

MOST_TENSORS = 200_000
"""Tensors of all resident checkpoints beyond which their lists are not asked for: those would take seconds."""


@dataclass(frozen=True, slots=True)
class DeviceHolds:
    """Bytes of one device: of pinned checkpoints, of leased ones, and of what an eviction of all others would free."""

    pinned_bytes: int
    leased_bytes: int
    evictable_bytes: int


@dataclass(frozen=True, slots=True)
class SharedPair:
    """Bytes that two checkpoints have in common on a device, and the components that they are of."""

    device: str
    checkpoints: tuple[str, str]
    shared_bytes: int
    components: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SharingReport:
    """What was computed; `missing` says why nothing was, and is empty otherwise. Pairs have the biggest first."""

    devices: Mapping[str, DeviceHolds]
    pairs: tuple[SharedPair, ...]
    missing: str = ""


def sharing(client: Client) -> SharingReport:
    """Ask for the lists of tensors of all resident checkpoints that this user sees. It counts as no use of them."""
    found = [info for info in client.checkpoints() if info.state == "resident"]
    tensors = sum(info.tensors for info in found)
    if tensors > MOST_TENSORS:
        return SharingReport({}, (), f"the checkpoints have {tensors:,} tensors, more than {MOST_TENSORS:,}")
    listed: list[tuple[CheckpointInfo, Iterable[TensorInfo]]] = []
    for info in found:
        try:
            with client.attach(info.content_digest, device=info.device, manifest_only=True) as attachment:
                listed.append((info, list(attachment.tensors.values())))
        except WeightdError as error:  # it drains, or one has gone meanwhile
            return SharingReport({}, (), str(error))
    return computed(listed)


def computed(listed: Sequence[tuple[CheckpointInfo, Iterable[TensorInfo]]]) -> SharingReport:
    """Compute the report of checkpoints and their tensors."""
    devices: dict[str, list[int]] = {info.device: [] for info, _ in listed}
    users: dict[tuple[str, bytes, int], set[int]] = defaultdict(set)
    lengths: dict[tuple[str, bytes, int], int] = {}
    components: dict[tuple[str, bytes, int], set[str]] = defaultdict(set)
    for at, (info, tensors) in enumerate(listed):
        devices[info.device].append(at)
        for tensor in tensors:
            blob = info.device, tensor.digest, tensor.variant
            users[blob].add(at)
            lengths[blob] = -(-tensor.length // ALIGNMENT) * ALIGNMENT  # as the daemon counts them
            if tensor.component:
                components[blob].add(tensor.component)
    groups: dict[frozenset[int], int] = defaultdict(int)  # far fewer than blobs
    named: dict[frozenset[int], set[str]] = defaultdict(set)
    for blob, holders in users.items():
        group = frozenset(holders)
        groups[group] += lengths[blob]
        named[group] |= components.get(blob, set())
    pinned = {at for at, (info, _) in enumerate(listed) if info.pinned}
    leased = {at for at, (info, _) in enumerate(listed) if info.leases}
    holds = {
        device: DeviceHolds(
            pinned_bytes=sum(length for group, length in groups.items() if group & pinned & set(members)),
            leased_bytes=sum(length for group, length in groups.items() if group & leased & set(members)),
            evictable_bytes=sum(
                length for group, length in groups.items() if group & set(members) and not group & (pinned | leased)
            ),
        )
        for device, members in devices.items()
    }
    return SharingReport(holds, _pairs([info for info, _ in listed], groups, named))


def _pairs(
    infos: Sequence[CheckpointInfo], groups: Mapping[frozenset[int], int], named: Mapping[frozenset[int], set[str]]
) -> tuple[SharedPair, ...]:
    shared: dict[tuple[int, int], int] = defaultdict(int)
    parts: dict[tuple[int, int], set[str]] = defaultdict(set)
    for group, length in groups.items():
        for pair in combinations(sorted(group), 2):
            shared[pair] += length
            parts[pair] |= named[group]
    found = [
        SharedPair(
            infos[one].device, (_called(infos[one]), _called(infos[other])), length, tuple(sorted(parts[one, other]))
        )
        for (one, other), length in shared.items()
        if length
    ]
    return tuple(sorted(found, key=lambda pair: (-pair.shared_bytes, pair.device, pair.checkpoints)))


def _called(info: CheckpointInfo) -> str:
    return info.name or digest(info.content_digest)
