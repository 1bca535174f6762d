"""Plan where wanted checkpoints go together on the devices of a catalogue, by what these hold now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .books import FleetDevice
from .placing import LeftOverReplicas, place

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .atoms import Atoms
    from .catalogue import DeviceReport, FleetCatalogue


@dataclass(frozen=True, slots=True)
class JointReplica:
    """A replica of a wanted checkpoint on a device. Sizes are bytes; `missing_bytes` are not resident there now.

    `partner` is the checkpoint there that has the most bytes in common with it, which are `partner_bytes`; "" if none.
    """

    checkpoint: str
    device: str
    size_bytes: int
    missing_bytes: int
    partner: str
    partner_bytes: int


@dataclass(frozen=True, slots=True)
class JointPlan:
    """The replicas of wanted checkpoints by device, what is left over by checkpoint, and the memory used then."""

    replicas: tuple[JointReplica, ...]
    left_over: tuple[tuple[str, LeftOverReplicas], ...]
    used_bytes: int


def plan_together(catalogue: FleetCatalogue, wanted: Mapping[str, int]) -> JointPlan:
    """Plan so many replicas of each wanted checkpoint. Where one is resident already it stays, and counts.

    What is pinned or leased stays, too; the rest may be evicted. Errors: NotFoundError (one is not in the catalogue).
    """
    for checkpoint in wanted:
        catalogue.sources(checkpoint)
    names = catalogue.checkpoints()
    numbers = {name: number for number, name in enumerate(names)}
    atoms, reports = catalogue.atoms(), catalogue.devices()
    devices = [_device(report, numbers, atoms, wanted) for report in reports]
    found = place(atoms, [wanted.get(name, 0) for name in names], devices)
    replicas = [
        JointReplica(
            checkpoint=names[placed.checkpoint],
            device=reports[placed.device].device,
            size_bytes=placed.size_bytes,
            missing_bytes=placed.missing_bytes,
            partner="" if placed.partner is None else names[placed.partner],
            partner_bytes=placed.partner_bytes,
        )
        for placed in found.placements
        if names[placed.checkpoint] in wanted
    ]
    left_over = tuple((names[left.checkpoint], left) for left in found.left_over)
    return JointPlan(tuple(replicas), left_over, found.placed_bytes)


def _device(report: DeviceReport, numbers: Mapping[str, int], atoms: Atoms, wanted: Mapping[str, int]) -> FleetDevice:
    firm = [numbers[name] for name in report.firm if name in numbers]
    kept = [numbers[name] for name in report.evictable if name in numbers and name in wanted]
    evictable = [numbers[name] for name in report.evictable if name in numbers and name not in wanted]
    known = int(atoms.weights[atoms.members.union(np.array(firm, np.int32))].sum())
    return FleetDevice(
        name=report.device,
        node=report.node,
        budget_bytes=report.budget_bytes,
        page_bytes=report.page_bytes,
        other_bytes=max(0, report.firm_bytes - known),
        held=(*firm, *kept),
        evictable=tuple(evictable),
    )
