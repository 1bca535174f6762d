"""Selects the GPUs to serve and how to share the memory of each, from the settings and from a trial.

A driver's bad moment must not cost anything: each call is tried twice, a GPU of which something is kept never changes
the way in which its memory is shared, and a GPU that cannot be served now is absent, not gone (decision 0037).
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError, DeviceMismatchError, WeightdError
from weightd_daemon.config.notation import is_uuid, means, whole_uuid
from weightd_daemon.config.settings import ConfigError, TemporaryConfigError

from .absent import AbsentDevice
from .cuda_errors import NO_DEVICE, code_of, explained, is_unsupported
from .cuda_ipc import CudaIpcDevice
from .cuda_modes import tell_compute_mode, tell_mps
from .cuda_vmm import CudaVmmDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .absent import KeptKinds
    from .cuda_ipc import CudaHolderContext
    from .device import Device

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_FAILURES = (DeviceError, DeviceMismatchError)


class ServedGpu(NamedTuple):
    """A GPU that is served, and what settings may call it, most telling first."""

    device: Device
    names: tuple[str, ...]


class Choice(NamedTuple):
    """The GPUs that are served, and those that are kept or meant but cannot be served now."""

    served: list[ServedGpu]
    absent: list[AbsentDevice]


class _Shown(NamedTuple):
    """The GPUs that the driver shows, by ordinal: their UUIDs, and the errors of those that do not tell theirs."""

    uuids: dict[driver.Ordinal, str]
    failed: dict[driver.Ordinal, WeightdError]

    def __str__(self) -> str:
        """List the GPUs for people."""
        told = [f"cuda:{ordinal} ({uuid})" for ordinal, uuid in self.uuids.items()]
        untold = [f"cuda:{ordinal} ({explained(error)})" for ordinal, error in self.failed.items()]
        return ", ".join([*told, *untold]) or "no GPU"

    def named(self, said: str) -> list[driver.Ordinal]:
        """The GPUs that a name means, among those whose UUID is known."""
        return [at for at, uuid in self.uuids.items() if any(means(said, name) for name in _names(uuid, at))]

    def untold(self, said: Iterable[str]) -> dict[driver.Ordinal, WeightdError]:
        """The errors of the GPUs that one of these names may mean and whose UUID is not known."""
        return {
            at: error
            for at, error in self.failed.items()
            if any(name == "auto" or is_uuid(name) or name in _names("", at) for name in said)
        }


def choose_gpus(said: Sequence[str], transport: str, holding: CudaHolderContext, kept: KeptKinds) -> Choice:
    """Open the GPUs that the setting `device` means; the caller closes them, and logs those that are absent.

    `kept` is the kind of each device of which an earlier daemon's segments are kept. Such a GPU is served or absent. A
    GPU of which nothing is kept is absent if its UUID is known, it cannot be served, and the daemon has something else
    to serve; "auto" leaves out a GPU that supports neither transport. Errors: ConfigError (a name of no GPU, or of
    several; a package is missing); TemporaryConfigError (nothing that was named can be served now).
    """
    kept = {uuid: kind for uuid, kind in kept.items() if uuid != "host"}
    if not any(name != "host" for name in said):
        return Choice([], [AbsentDevice(uuid, None, kind, _unnamed(said), said=False) for uuid, kind in kept.items()])
    tell_mps()
    try:
        shown = _look()
    except _FAILURES as error:
        return _without_driver(said, kept, error)
    with contextlib.ExitStack() as undo:
        choice = Choice([], [])
        for ordinal, opened in _open_all(_meant(said, shown, kept), shown, transport, holding, kept).items():
            uuid = shown.uuids[ordinal]
            if isinstance(opened, ServedGpu):
                undo.callback(opened.device.close)
                choice.served.append(opened)
                tell_compute_mode(ordinal, uuid)
            elif uuid not in kept and "auto" in said and is_unsupported(opened):
                log.warning("device %s is not served: %s", uuid, opened)
            else:
                kind = kept.get(uuid) or (None if transport == "auto" else transport)
                choice.absent.append(AbsentDevice(uuid, ordinal, kind, explained(opened)))
        choice.absent.extend([*_untried(said, shown, kept, choice)])
        _check_any(said, shown, kept, choice)
        for ordinal, failure in shown.untold(said).items():
            log.warning("device cuda:%d is not served: %s", ordinal, explained(failure))
        undo.pop_all()
    return choice


def try_again(
    absent: AbsentDevice, said: Sequence[str], transport: str, holding: CudaHolderContext, kept: KeptKinds
) -> ServedGpu:
    """Open a GPU that was absent, whatever its ordinal is now; the caller closes it.

    Errors: DeviceError, DeviceMismatchError (it is absent still, and why).
    """
    if not any(name != "host" for name in said):
        raise DeviceError(_unnamed(said))
    try:
        shown = _look()
        ordinal = next((at for at, uuid in shown.uuids.items() if uuid == absent.uuid), None)
        if ordinal is None:
            raise DeviceError(_unseen(shown))
        if "auto" not in said and not any(ordinal in shown.named(name) for name in said):
            raise DeviceError(_unnamed(said))
        gpu = _open(ordinal, absent.uuid, transport, holding, kept.get(absent.uuid))
    except _FAILURES as error:
        raise type(error)(explained(error), error.metadata) from error
    tell_compute_mode(ordinal, absent.uuid)
    return gpu


# -- what the driver shows ---------------------------------------------------------------------------------------------


def _look() -> _Shown:
    """Ask the driver for its GPUs. Errors: DeviceMismatchError, DeviceError (it does not even say how many)."""
    shown = _Shown({}, {})
    for ordinal in range(_twice("the GPUs", driver.device_count)):
        try:
            shown.uuids[ordinal] = _twice(f"cuda:{ordinal}", partial(driver.uuid_of, ordinal))
        except _FAILURES as error:
            shown.failed[ordinal] = error
    return shown


_refusals: dict[str, str] = {}
"""What the driver said when it was last asked twice for a thing: an absent GPU is tried again for as long as it is."""


def _twice(what: str, step: Callable[[], _T]) -> _T:
    """Take a step, and once more if the driver refuses: what it says the first time may not be so.

    The log has that once, until the driver says something else of `what`.
    """
    try:
        taken = step()
    except _FAILURES as error:
        if not code_of(error):  # not the driver's word: a package is missing, or a holder did not answer in its minute
            raise
        if _refusals.get(what) != str(error):
            _refusals[what] = str(error)
            log.info("the driver is asked once more for %s: %s", what, error)
        return step()
    _refusals.pop(what, None)
    return taken


def _names(uuid: str, ordinal: driver.Ordinal) -> tuple[str, ...]:
    return uuid, f"cuda:{ordinal}", "cuda"


# -- what is meant -----------------------------------------------------------------------------------------------------


def _meant(said: Sequence[str], shown: _Shown, kept: KeptKinds) -> list[driver.Ordinal]:
    """The ordinals of the GPUs to open, each once. Errors: ConfigError."""
    if "auto" in said:
        return list(shown.uuids)
    unseen = kept.keys() - {*shown.uuids.values()}
    ordinals: list[driver.Ordinal] = []
    for name in said:
        found = shown.named(name)
        if not found and name != "host" and not _may_come(name, shown, unseen):
            raise ConfigError(f"device = {name!r}: is not there; the driver shows {shown}", "device")
        if len(found) > 1 and name != "cuda":
            raise ConfigError(f"device = {name!r}: means more than one of {shown}; say more of it", "device")
        if twice := [ordinal for ordinal in found if ordinal in ordinals]:
            raise ConfigError(
                f"device = {name!r}: is cuda:{twice[0]} ({shown.uuids[twice[0]]}), which is named already", "device"
            )
        ordinals += found
    return ordinals


def _may_come(said: str, shown: _Shown, unseen: Iterable[str]) -> bool:
    """Whether a name that means none of the GPUs shown may mean one that fails now, or one that has gone missing.

    A whole UUID is nobody's slip of the pen. The number of a GPU that is kept and not shown is not known, so it may be
    any.
    """
    if not shown.uuids or shown.untold([said]) or whole_uuid(said):
        return True
    return any(means(said, uuid) or said.startswith("cuda") for uuid in unseen)


def _check_any(said: Sequence[str], shown: _Shown, kept: KeptKinds, choice: Choice) -> None:
    """Whether the daemon can go on with what it has. Errors: TemporaryConfigError (nothing named can be served now).

    A GPU that is kept is worth a daemon that serves nothing else: without one, nobody could forget it. A GPU whose UUID
    is not known cannot be tried again later, so a service manager has to, by another start.
    """
    if "auto" in said or choice.served or kept or ("host" in said and choice.absent):
        return
    if choice.absent:
        first = choice.absent[0]
        raise TemporaryConfigError(f"device {first.uuid} cannot be served: {first.reason}", "device")
    failure = next(iter(shown.untold(said).values()), None)
    why = explained(failure) if failure else f"is not there; the driver shows {shown}"
    raise TemporaryConfigError(f"device = {','.join(said)!r}: {why}", "device")


def _untried(said: Sequence[str], shown: _Shown, kept: KeptKinds, choice: Choice) -> Iterator[AbsentDevice]:
    """The GPUs that are kept, or named by their whole UUID, and were not even tried.

    The driver does not show them, or the settings do not name them.
    """
    tried = {gpu.device.uuid for gpu in choice.served} | {device.uuid for device in choice.absent}
    ordinals = {uuid: ordinal for ordinal, uuid in shown.uuids.items()}
    for uuid in [uuid for uuid in {**kept, **_whole_uuids(said)} if uuid not in tried]:
        seen = uuid in ordinals
        names = [name for name in said if name != "host" and not seen]
        meant = any(name in ("auto", "cuda") or means(name, uuid) or not shown.named(name) for name in names)
        reason = _unnamed(said) if seen else _unseen(shown)
        yield AbsentDevice(uuid, ordinals.get(uuid), kept.get(uuid), reason, said=meant)


def _whole_uuids(said: Sequence[str]) -> dict[str, None]:
    """The UUIDs that the settings say in full, in order."""
    return dict.fromkeys(uuid for name in said if (uuid := whole_uuid(name)))


def _unnamed(said: Sequence[str]) -> str:
    return f"device = {','.join(said)!r} does not name it"


def _unseen(shown: _Shown) -> str:
    return f"the driver does not show it; it shows {shown}"


def _without_driver(said: Sequence[str], kept: KeptKinds, error: WeightdError) -> Choice:
    """What there is where the driver shows nothing. Errors: ConfigError, TemporaryConfigError."""
    reason = explained(error)
    absent = [AbsentDevice(uuid, None, kept.get(uuid), reason) for uuid in {**kept, **_whole_uuids(said)}]
    if kept or ("host" in said and absent):
        return Choice([], absent)
    if "auto" not in said:
        refusal = ConfigError if "package" in error.metadata else TemporaryConfigError
        raise refusal(f"device = {','.join(said)!r}: {reason}", "device") from error
    broken = code_of(error) not in ("", NO_DEVICE)
    log.log(logging.WARNING if broken else logging.INFO, "no GPU is served, only host memory: %s", reason)
    return Choice([], [])


# -- how a GPU is shared -----------------------------------------------------------------------------------------------


def _open_all(
    ordinals: Sequence[driver.Ordinal], shown: _Shown, transport: str, holding: CudaHolderContext, kept: KeptKinds
) -> dict[driver.Ordinal, ServedGpu | WeightdError]:
    """Open GPUs side by side: a holder takes seconds to start. Returns each, or why it cannot be served."""

    def attempt(ordinal: driver.Ordinal) -> ServedGpu | WeightdError:
        uuid = shown.uuids[ordinal]
        try:
            return _open(ordinal, uuid, transport, holding, kept.get(uuid))
        except _FAILURES as error:
            return error

    with ThreadPoolExecutor(max(1, len(ordinals))) as pool:
        attempts = {ordinal: pool.submit(attempt, ordinal) for ordinal in ordinals}
    if any(done.exception() for done in attempts.values()):  # a bug: it must not leave the others open
        for done in attempts.values():
            if not done.exception() and isinstance(opened := done.result(), ServedGpu):
                opened.device.close()
    return {ordinal: done.result() for ordinal, done in attempts.items()}


def _open(
    ordinal: driver.Ordinal, uuid: str, transport: str, holding: CudaHolderContext, kept: str | None
) -> ServedGpu:
    """A GPU by the transport that `kept` or the settings demand, else by the first that works.

    CUDA IPC takes the place of exportable memory only where the driver says twice that it does not support that.
    Errors: DeviceError, DeviceMismatchError.
    """
    if kept is not None and transport not in ("auto", kept):
        raise DeviceError(f"transport = {transport!r}, and what is kept on it is shared by {kept}")
    wanted = kept or transport
    names = _names(uuid, ordinal)
    by_ipc, by_vmm = f"{uuid} by CUDA IPC", f"{uuid} by CUDA VMM"
    if wanted == "cuda_ipc":
        return ServedGpu(_twice(by_ipc, lambda: _tried(CudaIpcDevice(ordinal, holding))), names)
    try:
        return ServedGpu(_twice(by_vmm, lambda: _tried(CudaVmmDevice(ordinal))), names)
    except DeviceError as error:
        if wanted == "cuda_vmm" or not is_unsupported(error):
            raise
        log.info("cuda:%d is shared by CUDA IPC, for want of exportable memory: %s", ordinal, error)
        try:
            return ServedGpu(_twice(by_ipc, lambda: _tried(CudaIpcDevice(ordinal, holding))), names)
        except DeviceError as other:
            raise DeviceError(f"neither transport works: {error.message}; {other.message}", other.metadata) from other


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
