"""Selects the GPUs to serve and how to share the memory of each, from the settings and from a trial."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError, DeviceMismatchError, WeightdError
from weightd_daemon.config.notation import means
from weightd_daemon.config.settings import ConfigError, TemporaryConfigError

from .cuda_ipc import CudaIpcDevice
from .cuda_vmm import CudaVmmDevice

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .cuda_ipc import CudaHolderContext
    from .device import Device

log = logging.getLogger(__name__)


class _Gpu(NamedTuple):
    """A GPU that is served, and what settings may call it, most telling first."""

    device: Device
    names: tuple[str, ...]


def open_gpus(said: Sequence[str], transport: str, holding: CudaHolderContext) -> Iterator[_Gpu]:
    """Open the GPUs that the setting `device` says; the caller closes each.

    Errors: ConfigError; TemporaryConfigError (a driver or GPU that is not there, or does not work, now).

    With "auto", one that cannot be used is left out, and the log says why; any other that is said must work.
    """
    optional = "auto" in said
    wanted = [name for name in said if name != "host"]
    if not wanted:
        return
    try:
        visible = _visible(leave_out=optional)
    except (DeviceMismatchError, DeviceError) as error:
        if not optional:
            kind = ConfigError if "package" in error.metadata else TemporaryConfigError
            raise kind(f"device = {','.join(said)!r}: {error}", "device") from error
        broken = isinstance(error, DeviceError)
        log.log(logging.WARNING if broken else logging.INFO, "no GPU is served, only host memory: %s", error)
        return
    for ordinal in visible if optional else _chosen(wanted, visible):
        uuid = visible[ordinal]
        try:
            device = _open(ordinal, transport, holding)
        except WeightdError as error:
            if not optional:
                raise TemporaryConfigError(f"device {uuid} cannot be served: {error}", "device") from error
            log.warning("device %s is not served: %s", uuid, error)
        else:
            yield _Gpu(device, (uuid, f"cuda:{ordinal}", "cuda"))


def _visible(*, leave_out: bool) -> dict[driver.Ordinal, str]:
    """The UUIDs of the GPUs, by ordinal. Errors: DeviceMismatchError; DeviceError, where none may be left out."""
    found: dict[driver.Ordinal, str] = {}
    for ordinal in range(driver.device_count()):
        try:
            found[ordinal] = driver.uuid_of(ordinal)
        except DeviceError as error:
            if not leave_out:
                raise
            log.warning("device cuda:%d is not served: %s", ordinal, error)
    return found


def _chosen(wanted: Sequence[str], visible: Mapping[driver.Ordinal, str]) -> list[driver.Ordinal]:
    """The ordinals of GPUs by name, each once. Errors: ConfigError."""
    ordinals: list[driver.Ordinal] = []
    for said in wanted:
        found = [
            ordinal
            for ordinal, uuid in visible.items()
            if any(means(said, name) for name in (uuid, f"cuda:{ordinal}", "cuda"))
        ]
        if not found:
            raise TemporaryConfigError(
                f"device = {said!r}: is not there; the driver shows {_listed(visible)}", "device"
            )
        if len(found) > 1 and said != "cuda":
            raise ConfigError(f"device = {said!r}: means more than one of {_listed(visible)}; say more of it", "device")
        if twice := [ordinal for ordinal in found if ordinal in ordinals]:
            raise ConfigError(
                f"device = {said!r}: is cuda:{twice[0]} ({visible[twice[0]]}), which is named already", "device"
            )
        ordinals += found
    return ordinals


def _listed(visible: Mapping[driver.Ordinal, str]) -> str:
    return ", ".join(f"cuda:{ordinal} ({uuid})" for ordinal, uuid in visible.items()) or "no GPU"


def _open(ordinal: driver.Ordinal, transport: str, holding: CudaHolderContext) -> Device:
    """A GPU by the first transport that works when tried. Errors: DeviceError, DeviceMismatchError."""
    if transport == "cuda_ipc":
        return _tried(CudaIpcDevice(ordinal, holding))
    try:
        return _tried(CudaVmmDevice(ordinal))
    except DeviceError as error:
        if transport == "cuda_vmm":
            raise
        log.info("cuda:%d is shared by CUDA IPC, for want of exportable memory: %s", ordinal, error)
        try:
            return _tried(CudaIpcDevice(ordinal, holding))
        except DeviceError as other:
            raise DeviceError(f"neither transport works: {error.message}; {other.message}") from other


def _tried(device: Device) -> Device:
    """A device that has made a segment. What the driver says that it can do is not always so (WSL, gVisor)."""
    try:
        device.release(device.create(device.page))
    except MemoryError:
        log.warning("device %s has no memory left for now", device.uuid)  # which says nothing against the transport
    except BaseException:
        device.close()
        raise
    return device
