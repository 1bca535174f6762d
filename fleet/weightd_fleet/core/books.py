"""The books of a placement: which checkpoints lie on which devices, and how many bytes that takes.

A blob counts once a device, as in the daemon's books; a checkpoint also costs the part of a page that its load leaves
unused, once a segment that the load begins. So a device never takes more than the books say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .atoms import Atoms, Bytes

SEGMENT_BYTES: Final = 1 << 30
"""Most bytes of a segment that a load fills; only a larger tensor has a larger one."""


@dataclass(frozen=True, slots=True)
class FleetDevice:
    """Memory of one node with a budget of its own. Sizes are bytes, checkpoints are numbers.

    `held` are the checkpoints that stay, since they are pinned or leased; `evictable` are resident, and go when memory
    is needed. `other_bytes` are held by what the plan does not know.
    """

    name: str
    node: str
    budget_bytes: int
    page_bytes: int = 1
    other_bytes: int = 0
    held: tuple[int, ...] = ()
    evictable: tuple[int, ...] = ()


class PlacementBooks:
    """Which checkpoints are placed on which devices. Devices and checkpoints go by number, sizes are bytes."""

    def __init__(self, atoms: Atoms, devices: Sequence[FleetDevice]) -> None:
        self.atoms = atoms
        self.devices = devices
        self.used: Bytes = np.array([device.other_bytes for device in devices], np.int64)
        self.budgets: Bytes = np.array([device.budget_bytes for device in devices], np.int64)
        self.on_device: list[set[int]] = [set() for _ in devices]
        self.of_checkpoint: list[set[int]] = [set() for _ in range(len(atoms.members))]
        self._pages: Bytes = np.array([device.page_bytes for device in devices], np.int64) - 1
        self._segments = 1 + atoms.sizes // SEGMENT_BYTES
        self._counts = np.zeros((len(devices), len(atoms.weights)), np.uint16)  # pages that nobody writes cost nothing
        numbers = {name: number for number, name in enumerate(dict.fromkeys(device.node for device in devices))}
        self._nodes = np.array([numbers[device.node] for device in devices], np.int64)
        self._resident = np.zeros((len(devices), len(atoms.members)), np.bool_)
        self._missing: list[Bytes | None] = [None] * len(atoms.members)
        self._neighbours: list[NDArray[np.int32] | None] = [None] * len(atoms.members)
        for number, device in enumerate(devices):
            self._resident[number, [*device.held, *device.evictable]] = True
            for checkpoint in sorted(set(device.held)):
                self.put(checkpoint, number)

    @property
    def total(self) -> int:
        """Bytes on all devices."""
        return int(self.used.sum())

    def fresh(self, checkpoint: int) -> Bytes:
        """The bytes that a checkpoint would add to each device that does not have it."""
        segments = int(self._segments[checkpoint])
        found = int(self.atoms.sizes[checkpoint]) + self._pages * segments
        if sharing := self._sharing(checkpoint):
            rows = np.array(sharing, np.int64)
            mine = self.atoms.members[checkpoint]
            absent = self._counts[np.ix_(rows, mine)] == 0
            found[rows] = absent @ self.atoms.weights[mine] + self._pages[rows] * segments
        return found

    def allowed(self, checkpoint: int) -> NDArray[np.bool_]:
        """The devices on whose node there is no replica of a checkpoint."""
        taken = self._nodes[list(self.of_checkpoint[checkpoint])]
        return ~np.isin(self._nodes, taken)

    def fits(self, fresh: Bytes) -> NDArray[np.bool_]:
        """The devices whose budgets have room for these bytes, one number a device."""
        return self.used + fresh <= self.budgets

    def cheapest(self, checkpoint: int, fresh: Bytes, but: int | None = None) -> int | None:
        """The device where a checkpoint may go and adds the fewest bytes; None if none fits.

        `fresh` are the bytes that it adds to each device, and `but` is a device that does not count. Of several devices
        it is the one where the fewest bytes are missing now, and of these the emptiest.
        """
        possible = self.allowed(checkpoint) & self.fits(fresh)
        if but is not None:
            possible[but] = False
        found = np.flatnonzero(possible)
        if not len(found):
            return None
        return int(found[np.lexsort((self.used[found], self.missing(checkpoint)[found], fresh[found]))[0]])

    def put(self, checkpoint: int, device: int) -> None:
        """Place a checkpoint, whether it fits or not. Errors: ValueError (it is there)."""
        if checkpoint in self.on_device[device]:
            raise ValueError(f"checkpoint {checkpoint} is on device {device} already")
        mine = self.atoms.members[checkpoint]
        counts = self._counts[device]
        self.used[device] += self.atoms.weights[mine[counts[mine] == 0]].sum() + self._waste(checkpoint, device)
        counts[mine] += 1
        self.on_device[device].add(checkpoint)
        self.of_checkpoint[checkpoint].add(device)

    def take(self, checkpoint: int, device: int) -> None:
        """Undo `put`."""
        mine = self.atoms.members[checkpoint]
        counts = self._counts[device]
        counts[mine] -= 1
        self.used[device] -= self.atoms.weights[mine[counts[mine] == 0]].sum() + self._waste(checkpoint, device)
        self.on_device[device].remove(checkpoint)
        self.of_checkpoint[checkpoint].remove(device)

    def alone(self, checkpoint: int, device: int) -> int:
        """Bytes of a placed checkpoint that no other one on its device has."""
        mine = self.atoms.members[checkpoint]
        return int(self.atoms.weights[mine[self._counts[device][mine] == 1]].sum())

    def missing(self, checkpoint: int) -> Bytes:
        """The bytes of a checkpoint that are not resident on each device before anything is placed."""
        known = self._missing[checkpoint]
        if known is None:
            known = self._missing[checkpoint] = self.atoms.absent(self._resident, checkpoint)
        return known

    def neighbours(self, checkpoint: int) -> NDArray[np.int32]:
        """The checkpoints that share bytes with a checkpoint; kept, since a search asks again and again."""
        known = self._neighbours[checkpoint]
        if known is None:
            known = self._neighbours[checkpoint] = self.atoms.neighbours(checkpoint)
        return known

    def _sharing(self, checkpoint: int) -> list[int]:
        """The devices that hold bytes of a checkpoint."""
        return sorted(set().union(*(self.of_checkpoint[other] for other in self.neighbours(checkpoint).tolist())))

    def _waste(self, checkpoint: int, device: int) -> int:
        return int(self._pages[device] * self._segments[checkpoint])
