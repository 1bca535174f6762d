"""Absent devices: the settings, or weights that are kept, name them, and they cannot be served now.

Absent is not gone: what is kept of such a device stays kept, and the device is tried again until it can be served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightd.errors import DeviceAbsentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    KeptKinds = Mapping[str, str]
    """By UUID, the kind ("cuda_vmm", "cuda_ipc", "host") of each device of which the root record names a segment."""


@dataclass(frozen=True, slots=True)
class AbsentDevice:
    """A device that cannot be served now. `index` is the driver's number of it, None where the driver does not say.

    `kind` is how its segments are shared, None where nothing of it is kept and no transport was tried. `reason` is for
    people: what the driver said, and what to do about it where that is known.
    """

    uuid: str
    index: int | None
    kind: str | None
    reason: str

    @property
    def names(self) -> tuple[str, ...]:
        """What settings may call it, most telling first."""
        return self.uuid, *(() if self.index is None else (f"cuda:{self.index}",)), "cuda"

    def error(self, what: str = "") -> DeviceAbsentError:
        """The error for whoever needs the device, `what` for being what it is needed for."""
        what = f"{what}: " if what else ""
        return DeviceAbsentError(
            f"{what}device {self.uuid} is absent: {self.reason}; what is kept on it stays kept, "
            "and the daemon tries it again by itself",
            {"device": self.uuid},
        )
