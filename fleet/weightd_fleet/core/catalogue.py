"""The fleet's catalogue: which checkpoint is resident on which device, and what is missing where, by content.

It is soft state: agents report what their nodes hold, and a new catalogue is filled again by their reports. Manifests
are kept once a fleet, as numbers of blobs; a device is a set of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from weightd._sizes import size
from weightd.errors import InvalidReferenceError, NotFoundError

from .atoms import Atoms, find_atoms
from .books import SEGMENT_BYTES
from .columns import BlobColumns
from .digests import is_fleet_name

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from .atoms import Bytes, Ids, Table

MAX_CHECKPOINTS: Final = 100_000
MAX_DEVICES: Final = 100_000


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What an agent says of a device; sizes are bytes, checkpoints are names as `b3:…`.

    `epoch` names the agent's run, within which `revision` grows. `firm_bytes` cannot be evicted: they are pinned or
    leased, and the checkpoints in `firm` among them. The checkpoints in `evictable` are resident, too.
    """

    device: str
    node: str
    epoch: str
    revision: int
    budget_bytes: int
    used_bytes: int
    firm_bytes: int
    page_bytes: int
    firm: tuple[str, ...]
    evictable: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceTarget:
    """A device chosen for a checkpoint: `missing_bytes` of its `size_bytes` have to be brought there.

    `partner` is the resident checkpoint that has the most bytes in common with it, `partner_bytes`; "" if none has any.
    """

    device: str
    node: str
    size_bytes: int
    missing_bytes: int
    partner: str
    partner_bytes: int

    def explain(self) -> str:
        """Why this device, in a sentence."""
        if not self.missing_bytes:
            return f"{self.device}: has all of its {size(self.size_bytes)}"
        missing = f"{self.device}: {size(self.missing_bytes)} of {size(self.size_bytes)} missing"
        return f"{missing}; {size(self.partner_bytes)} are those of {self.partner}" if self.partner else missing


@dataclass(frozen=True, slots=True)
class PlacementDecision:
    """The devices for some replicas of a checkpoint, the best first, and why there are no more.

    `full_devices` have no room for it even after evictions.
    """

    targets: tuple[DeviceTarget, ...]
    replicas: int
    full_devices: int

    def explain(self) -> list[str]:
        """Why these devices, and why no more, a sentence each."""
        told = [target.explain() for target in self.targets]
        if len(self.targets) < self.replicas:
            told.append(
                f"{len(self.targets)} of {self.replicas} replicas placed: each node takes one, and {self.full_devices} "
                "devices have no room for it"
            )
        return told


class FleetCatalogue:
    """Checkpoints and devices of a fleet. Not thread-safe."""

    def __init__(self) -> None:
        self._blobs = BlobColumns()
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._rows: list[Ids] = []
        self._atoms: Atoms | None = None
        self._reports: list[DeviceReport] = []
        self._places: dict[str, int] = {}
        self._unknown: dict[str, set[str]] = {}
        """By a checkpoint that is reported and not added yet, the devices that have it."""
        self._resident: Table = np.zeros((0, 0), np.bool_)
        self._firm: Table = np.zeros((0, 0), np.bool_)

    @property
    def nbytes(self) -> int:
        """Bytes of the columns and tables, with the atoms once they are found."""
        atoms = self._atoms
        sparse = 0 if atoms is None else atoms.members.nbytes + atoms.holders.nbytes + atoms.weights.nbytes
        rows = sum(row.nbytes for row in self._rows)
        return self._blobs.nbytes + rows + self._resident.nbytes + self._firm.nbytes + sparse

    def __contains__(self, checkpoint: str) -> bool:
        return checkpoint in self._numbers

    def add(self, checkpoint: str, blobs: Sequence[tuple[bytes, int]]) -> None:
        """Enter a checkpoint: the BLAKE3 digest and the length of each of its tensors. A known one stays as it is.

        Whoever calls has checked that the manifest has this name. Errors: InvalidReferenceError (no name in the fleet,
        or too many checkpoints), FormatError (impossible blobs).
        """
        if checkpoint in self._numbers:
            return
        if not is_fleet_name(checkpoint):
            raise InvalidReferenceError(
                f"{checkpoint[:80]!r} is not a checkpoint's name in a fleet, b3: and 64 hex digits"
            )
        if len(self._names) >= MAX_CHECKPOINTS:
            raise InvalidReferenceError(f"the catalogue has {MAX_CHECKPOINTS} checkpoints, which is its limit")
        self._rows.append(self._blobs.number(blobs))
        self._numbers[checkpoint] = len(self._names)
        self._names.append(checkpoint)
        self._atoms = None
        self._make_room()
        for device in self._unknown.pop(checkpoint, ()):
            self._enter(self._reports[self._places[device]])

    def report(self, report: DeviceReport) -> tuple[str, ...]:
        """Take what an agent says of a device. Returns the checkpoints in it that have to be added.

        A report of the same epoch that is older than the last one is ignored. Errors: InvalidReferenceError (too many
        devices).
        """
        place = self._places.get(report.device)
        if place is None:
            if len(self._reports) >= MAX_DEVICES:
                raise InvalidReferenceError(f"the catalogue has {MAX_DEVICES} devices, which is its limit")
            self._places[report.device] = len(self._reports)
            self._reports.append(report)
            self._make_room()
        elif self._reports[place].epoch == report.epoch and report.revision < self._reports[place].revision:
            return ()
        else:
            self._forget_unknown(self._reports[place])
            self._reports[place] = report
        return self._enter(report)

    def remove(self, device: str) -> None:
        """Forget a device, whose node has left the fleet. Errors: NotFoundError."""
        place = self._place(device)
        self._forget_unknown(self._reports[place])
        last = len(self._reports) - 1
        for table in (self._resident, self._firm):
            table[place], table[last] = table[last].copy(), False
        self._reports[place] = self._reports[last]
        self._places[self._reports[place].device] = place
        self._reports.pop()
        del self._places[device]

    def devices(self) -> tuple[DeviceReport, ...]:
        """The last report of each device, by the devices' names."""
        return tuple(sorted(self._reports, key=lambda report: report.device))

    def checkpoints(self) -> tuple[str, ...]:
        """The checkpoints in the order in which they were added, which is the one of the atoms' rows."""
        return tuple(self._names)

    def sources(self, checkpoint: str) -> tuple[str, ...]:
        """The devices on which a checkpoint is resident, by name. Errors: NotFoundError."""
        column = self._resident[: len(self._reports), self._number(checkpoint)]
        return tuple(sorted(self._reports[place].device for place in np.flatnonzero(column)))

    def missing(self, device: str, checkpoint: str) -> int:
        """The bytes of a checkpoint's tensors that are not resident on a device. Errors: NotFoundError."""
        return int(self._absent(self._resident, self._number(checkpoint))[self._place(device)])

    def atoms(self) -> Atoms:
        """The atoms of all checkpoints, in the order in which they were added."""
        if self._atoms is None:
            self._atoms = find_atoms(self._rows, self._blobs.lengths)
        return self._atoms

    def choose(self, checkpoint: str, replicas: int, near: Collection[str] = ()) -> PlacementDecision:
        """The devices for replicas of a checkpoint: the fewest missing bytes first, then the most free memory.

        Where equally many are missing, nodes in `near` come first. Each node gets one. Devices that have the checkpoint
        count as replicas, and come first, for nothing is missing there. On each other one, what is not evictable leaves
        room for it. Errors: NotFoundError.
        """
        number = self._number(checkpoint)
        missing = self._absent(self._resident, number)
        budgets, used, firm, pages = self._sizes()
        segments = 1 + int(self.atoms().sizes[number]) // SEGMENT_BYTES
        needed = self._absent(self._firm, number) + (pages - 1) * segments
        fits = (firm + needed <= budgets) | self._resident[: len(self._reports), number]
        targets: list[DeviceTarget] = []
        nodes: set[str] = set()
        far = np.array([report.node not in near for report in self._reports], np.bool_)
        sharing, common = self.atoms().common(number)
        for place in np.lexsort((used - budgets, far, missing)).tolist():
            report = self._reports[place]
            if len(targets) == replicas:
                break
            if fits[place] and report.node not in nodes:
                nodes.add(report.node)
                held = common * (self._resident[place, sharing] & (sharing != number))
                targets.append(self._target(report, number, int(missing[place]), sharing, held))
        return PlacementDecision(tuple(targets), replicas, int((~fits).sum()))

    # -- rows and tables ---------------------------------------------------------------------------------------------

    def _number(self, checkpoint: str) -> int:
        try:
            return self._numbers[checkpoint]
        except KeyError:
            raise NotFoundError(f"{checkpoint[:80]}: not in the fleet's catalogue; publish it") from None

    def _place(self, device: str) -> int:
        try:
            return self._places[device]
        except KeyError:
            raise NotFoundError(f"device {device[:80]}: not in the fleet's catalogue; is its agent running?") from None

    def _enter(self, report: DeviceReport) -> tuple[str, ...]:
        place = self._places[report.device]
        reported = set(report.firm) | set(report.evictable)
        unknown = tuple(sorted(reported - self._numbers.keys()))
        for checkpoint in unknown:
            self._unknown.setdefault(checkpoint, set()).add(report.device)
        for table, names in ((self._resident, reported), (self._firm, set(report.firm))):
            table[place] = False
            table[place, [self._numbers[name] for name in names & self._numbers.keys()]] = True
        return unknown

    def _forget_unknown(self, report: DeviceReport) -> None:
        for checkpoint in (*report.firm, *report.evictable):
            waiting = self._unknown.get(checkpoint, set())
            waiting.discard(report.device)
            if not waiting:
                self._unknown.pop(checkpoint, None)

    def _make_room(self) -> None:
        """Have a row of each table for each device, and a column for each checkpoint."""
        devices, checkpoints = self._resident.shape
        if len(self._reports) > devices or len(self._names) > checkpoints:
            wanted = (max(devices, len(self._reports) * 5 // 4 + 8), max(checkpoints, len(self._names) * 5 // 4 + 8))
            for name in ("_resident", "_firm"):
                grown = np.zeros(wanted, np.bool_)
                grown[:devices, :checkpoints] = getattr(self, name)
                setattr(self, name, grown)

    def _sizes(self) -> NDArray[np.int64]:
        """Budget, used bytes, firm bytes and page of each device: four rows."""
        rows = [(r.budget_bytes, r.used_bytes, r.firm_bytes, r.page_bytes) for r in self._reports]
        return np.array(rows, np.int64).reshape(-1, 4).T

    def _absent(self, table: Table, number: int) -> Bytes:
        """The bytes of a checkpoint that no checkpoint has that the table shows, for each device."""
        return self.atoms().absent(table[: len(self._reports)], number)

    def _target(self, report: DeviceReport, number: int, missing: int, sharing: Ids, common: Bytes) -> DeviceTarget:
        """A device; `common` are the bytes that each checkpoint in `sharing` has in common, if it is resident there."""
        best = int(np.argmax(common)) if common.any() else None
        return DeviceTarget(
            device=report.device,
            node=report.node,
            size_bytes=int(self.atoms().sizes[number]),
            missing_bytes=missing,
            partner="" if best is None else self._names[sharing[best]],
            partner_bytes=0 if best is None else int(common[best]),
        )
