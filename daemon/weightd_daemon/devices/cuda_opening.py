"""Opens GPUs, and finds how the memory of each can be shared: by the transport that is wanted, by a trial.

Each is opened in a step that can be left behind if its driver hangs (opening_thread.py).
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from weightd.errors import DeviceError, DeviceMismatchError

from . import opening_thread
from .cuda_errors import code_of, is_unsupported
from .cuda_ipc import CudaIpcDevice
from .cuda_modes import tell_compute_mode
from .cuda_vmm import CudaVmmDevice
from .opening_thread import OpeningStep, next_call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from weightd._mapping.cuda_driver import Ordinal
    from weightd.errors import WeightdError

    from .absent import KeptKinds
    from .cuda_ipc import CudaHolderContext
    from .device import Device

log = logging.getLogger(__name__)

FAILURES = (DeviceError, DeviceMismatchError)
"""What is raised where the driver fails, does not answer, or is not there."""

T = TypeVar("T")


class ServedGpu(NamedTuple):
    """A GPU that is served, and what settings may call it, most telling first."""

    device: Device
    names: tuple[str, ...]


def names_of(uuid: str, ordinal: Ordinal) -> tuple[str, ...]:
    """What settings may call a GPU, most telling first."""
    return uuid, f"cuda:{ordinal}", "cuda"


_refusals: dict[str, str] = {}
"""What the driver said when it was last asked twice for a thing: an absent GPU is tried again for as long as it is."""


def twice(what: str, step: Callable[[], T]) -> T:
    """Take a step, and once more if the driver refuses: what it says the first time may not be so.

    The log has that once, until the driver says something else of `what`.
    """
    try:
        taken = step()
    except FAILURES as error:
        if not code_of(error):  # not the driver's word: a package is missing, or a holder did not answer in its minute
            raise
        if _refusals.get(what) != str(error):
            _refusals[what] = str(error)
            log.info("the driver is asked once more for %s: %s", what, error)
        next_call()
        return step()
    _refusals.pop(what, None)
    return taken


def open_all(
    uuids: Mapping[Ordinal, str], transport: str, holding: CudaHolderContext, kept: KeptKinds
) -> dict[Ordinal, ServedGpu | WeightdError]:
    """Open GPUs side by side: a holder takes seconds to start. Returns each, or why it cannot be served."""
    begun: dict[Ordinal, OpeningStep[ServedGpu]] = {}
    ended: dict[Ordinal, ServedGpu | WeightdError] = {}
    with contextlib.ExitStack() as undo:
        for ordinal, uuid in uuids.items():
            try:
                begun[ordinal] = begin(ordinal, uuid, transport, holding, kept.get(uuid))
            except FAILURES as error:
                ended[ordinal] = error
        bugs: list[BaseException] = []
        for ordinal, step in begun.items():
            try:
                ended[ordinal] = gpu = step.result()
                undo.callback(gpu.device.close)
            except FAILURES as error:
                ended[ordinal] = error
            except BaseException as error:  # noqa: BLE001  # raised when all have ended: none must be left open
                bugs.append(error)
        for bug in bugs:
            raise bug
        undo.pop_all()
    return {ordinal: ended[ordinal] for ordinal in uuids}


def begin(
    ordinal: Ordinal, uuid: str, transport: str, holding: CudaHolderContext, kept: str | None
) -> OpeningStep[ServedGpu]:
    """Begin to open a GPU. Errors: DeviceError (it hangs in an earlier try)."""

    def step() -> ServedGpu:
        gpu = _open(ordinal, uuid, transport, holding, kept)
        next_call("cuDeviceGetAttribute")
        tell_compute_mode(ordinal, uuid)
        return gpu

    return opening_thread.begin(f"device {uuid}", "it", step, undo=lambda gpu: gpu.device.close())


def _open(ordinal: Ordinal, uuid: str, transport: str, holding: CudaHolderContext, kept: str | None) -> ServedGpu:
    """A GPU by the transport that `kept` or the settings demand, else by the first that works.

    CUDA IPC takes the place of exportable memory only where the driver says twice that it does not support that.
    Errors: DeviceError, DeviceMismatchError.
    """
    if kept is not None and transport not in ("auto", kept):
        raise DeviceError(f"transport = {transport!r}, and what is kept on it is shared by {kept}")
    wanted = kept or transport
    names = names_of(uuid, ordinal)
    by_ipc, by_vmm = f"{uuid} by CUDA IPC", f"{uuid} by CUDA VMM"
    if wanted == "cuda_ipc":
        return ServedGpu(twice(by_ipc, lambda: _tried(CudaIpcDevice(ordinal, holding))), names)
    try:
        return ServedGpu(twice(by_vmm, lambda: _tried(CudaVmmDevice(ordinal))), names)
    except DeviceError as error:
        if wanted == "cuda_vmm" or not is_unsupported(error):
            raise
        log.info("cuda:%d is shared by CUDA IPC, for want of exportable memory: %s", ordinal, error)
        try:
            return ServedGpu(twice(by_ipc, lambda: _tried(CudaIpcDevice(ordinal, holding))), names)
        except DeviceError as other:
            raise DeviceError(f"neither transport works: {error.message}; {other.message}", other.metadata) from other


def _tried(device: Device) -> Device:
    """A device that has made a segment. What the driver says that it can do is not always so (WSL, gVisor)."""
    try:
        next_call(device.creates_by)
        segment = device.create(device.page)
        next_call(device.releases_by)
        device.release(segment)
    except MemoryError:
        log.warning("device %s has no memory left for now", device.uuid)  # which says nothing against the transport
    except BaseException:
        device.close()
        raise
    return device
