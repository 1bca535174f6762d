"""Selects the GPUs to serve, from the settings, from what is kept, and from what the driver shows.

A driver's bad moment must not cost anything: each call is tried twice, a GPU of which something is kept never changes
the way in which its memory is shared, and a GPU that cannot be served now is absent, not gone (decision 0037). A driver
that hangs is one that fails: what calls it runs in steps that can be left behind (devices/opening_thread.py).
"""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError, WeightdError
from weightd_daemon.config.notation import is_uuid, means, whole_uuid
from weightd_daemon.config.settings import ConfigError, TemporaryConfigError

from . import opening_thread
from .absent import AbsentDevice
from .cuda_errors import NO_DEVICE, code_of, explained, is_unsupported
from .cuda_modes import tell_mps
from .cuda_opening import FAILURES, ServedGpu, begin, names_of, open_all, twice
from .opening_thread import next_call

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .absent import KeptKinds
    from .cuda_ipc import CudaHolderContext

log = logging.getLogger(__name__)


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
        return [at for at, uuid in self.uuids.items() if any(means(said, name) for name in names_of(uuid, at))]

    def untold(self, said: Iterable[str]) -> dict[driver.Ordinal, WeightdError]:
        """The errors of the GPUs that one of these names may mean and whose UUID is not known."""
        return {
            at: error
            for at, error in self.failed.items()
            if any(name == "auto" or is_uuid(name) or name in names_of("", at) for name in said)
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
    except FAILURES as error:
        return _without_driver(said, kept, error)
    with contextlib.ExitStack() as undo:
        choice = Choice([], [])
        meant = {ordinal: shown.uuids[ordinal] for ordinal in _meant(said, shown, kept)}
        for ordinal, opened in open_all(meant, transport, holding, kept).items():
            uuid = shown.uuids[ordinal]
            if isinstance(opened, ServedGpu):
                undo.callback(opened.device.close)
                choice.served.append(opened)
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
        return begin(ordinal, absent.uuid, transport, holding, kept.get(absent.uuid)).result()
    except FAILURES as error:
        raise type(error)(explained(error), error.metadata) from error


# -- what the driver shows ---------------------------------------------------------------------------------------------


def _look() -> _Shown:
    """What GPUs the driver shows. Errors: DeviceMismatchError, DeviceError (it does not say how many, or hangs)."""
    return opening_thread.begin("the driver", "the driver", _ask, undo=lambda _: None).result()


def _ask() -> _Shown:
    """Ask the driver for its GPUs, in a step. Errors: DeviceMismatchError, DeviceError."""
    shown = _Shown({}, {})
    next_call("cuInit", opening_thread.START_SECONDS)
    twice("the driver", driver.initialise)
    next_call("cuDeviceGetCount")
    for ordinal in range(twice("the GPUs", driver.device_count)):
        next_call("cuDeviceGetUuid")
        try:
            shown.uuids[ordinal] = twice(f"cuda:{ordinal}", partial(driver.uuid_of, ordinal))
        except FAILURES as error:
            shown.failed[ordinal] = error
    return shown


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
    broken = code_of(error) != NO_DEVICE and not error.metadata.keys().isdisjoint(("call", "code"))
    log.log(logging.WARNING if broken else logging.INFO, "no GPU is served, only host memory: %s", reason)
    return Choice([], [])
