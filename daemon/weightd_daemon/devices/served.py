"""The devices of a daemon: those that serve, and stand-ins for those that are absent or have yet to take over."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from .absent import AbsentDevice, KeptKinds, StandInDevice
from .budgets import budget_of, check_names
from .cuda_choice import choose_gpus, try_again
from .cuda_node import missing_uvm
from .host import HostDevice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weightd_daemon.config.settings import Settings

    from .cuda_ipc import CudaHolderContext
    from .cuda_opening import ServedGpu
    from .device import Device

log = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0
"""How long the end of the daemon waits for all drivers; the service manager kills it after 30 s."""


class Devices:
    """The devices, by UUID, and what settings may call each. All of a daemon shares these dictionaries.

    A GPU of which anything is kept begins as a stand-in, and is `arriving` until it has taken over. Of one that is
    `absent`, `budgets` says nothing.
    """

    def __init__(self, settings: Settings, holding: CudaHolderContext) -> None:
        self._settings = settings
        self._holding = holding
        self.devices: dict[str, Device] = {}
        self.names: dict[str, Sequence[str]] = {}
        self.budgets: dict[str, int] = {}
        """Bytes that each may use at the start."""
        self.absent: dict[str, AbsentDevice] = {}
        self.arriving: dict[str, ServedGpu] = {}

    def open(self, kept: KeptKinds) -> None:
        """Open what is to be served, and stand in for what is kept of others. Errors: ConfigError.

        Whatever comes of it, `close` is due.
        """
        settings = self._settings
        self._open_host(kept)
        if {*settings.devices} - {"host"} and (hint := missing_uvm()):
            log.warning(hint)
        choice = choose_gpus(settings.devices, settings.transport, self._holding, kept)
        serving = [gpu.device for gpu in choice.served if self._enter(gpu, kept.get(gpu.device.uuid))]
        for absent in choice.absent:
            self._stand_in(absent, kept.get(absent.uuid))
        for uuid in sorted(kept.keys() - self.devices.keys()):  # the choice should name each; nothing hangs on that
            self._stand_in(AbsentDevice(uuid, None, kept[uuid], "it cannot be served", said=False), kept[uuid])
        check_names(settings, self.names.values())
        for device in serving:
            self.budgets[device.uuid] = budget_of(settings, device, self.names[device.uuid])

    def open_again(self, absent: AbsentDevice, kept: KeptKinds) -> ServedGpu:
        """Open a GPU that was absent; the caller closes it. Errors: DeviceError, DeviceMismatchError (it still is)."""
        return try_again(absent, self._settings.devices, self._settings.transport, self._holding, kept)

    @property
    def default(self) -> str:
        """Where a load goes that says nothing: the only GPU, or the only device; "" where it has to say.

        An absent device stays what it is, if the settings name it: nothing goes elsewhere without a word.
        """
        said = [uuid for uuid in self.devices if uuid not in self.absent or self.absent[uuid].said]
        candidates = [uuid for uuid in said if self.devices[uuid].kind != "host"] or said
        return candidates[0] if len(candidates) == 1 else ""

    def available(self, uuid: str) -> int | None:
        """Bytes free on a device, as Device.available says."""
        return self.devices[uuid].available()

    def close(self) -> None:
        """Close every device, and wait for them a while: what a GPU does not give up by then ends with the process."""
        devices = [*self.devices.values(), *(gpu.device for gpu in self.arriving.values())]
        for device in devices:
            device.close()
        end = time.monotonic() + CLOSE_SECONDS
        for device in devices:
            left = 0.0 if device.calls.problem else end - time.monotonic()
            if not device.calls.join(max(0.0, left)):
                log.warning("device %s does not answer at the end", device.uuid)

    def _open_host(self, kept: KeptKinds) -> None:
        host = HostDevice()
        said = bool({host.uuid, "auto"} & {*self._settings.devices})
        if said or host.uuid in kept:
            self.devices[host.uuid], self.names[host.uuid] = host, (host.uuid,)
        if said:  # before the driver is called: what is said of host memory is wrong or not whatever that answers
            self.budgets[host.uuid] = budget_of(self._settings, host, (host.uuid,))
        if not said and host.uuid in kept:
            reason = (
                f"device = {self._settings.device!r} does not name it; name it, or `weightd drain --forget {host.uuid}`"
            )
            self.absent[host.uuid] = AbsentDevice(host.uuid, None, host.kind, reason, said=False)

    def _enter(self, gpu: ServedGpu, kept: str | None) -> bool:
        """Have a GPU that was opened, of which something of a kind may be kept. Whether it is to serve."""
        device = gpu.device
        if kept is None:
            self.devices[device.uuid], self.names[device.uuid] = device, gpu.names
            return True
        if kept != device.kind:
            device.close()
            reason = f"its memory is shared as {device.kind} now, and what is kept on it as {kept}"
            self._stand_in(AbsentDevice(device.uuid, None, kept, reason), kept)
            return False
        self.arriving[device.uuid] = gpu
        self._stand_in(AbsentDevice(device.uuid, None, kept, "it is being taken up"), kept)
        self.names[device.uuid] = gpu.names
        return True

    def _stand_in(self, absent: AbsentDevice, kept: str | None) -> None:
        self.absent[absent.uuid] = absent
        self.devices[absent.uuid] = StandInDevice(absent.uuid, kept or absent.kind or "")
        self.names[absent.uuid] = absent.names
