"""Look at a daemon: maps, sharing, tensors, loads under way, settings. No call here changes anything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

from ._devices import device_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._transport.rpc import RpcClient
    from .inspection import DeviceMap, LoadInfo, SettingInfo, SharedPair, StoredTensor
    from .resolve import Reference

T = TypeVar("T")


class InspectionOperations(ABC):
    """The part of a client that only looks.

    Each call raises ProtocolMismatchError where the daemon is too old to know it.
    """

    def device_map(self, device: str | None = None) -> DeviceMap:
        """What lies where on a device (None: the daemon's default), asked for page by page.

        One that changes meanwhile is asked for anew, at most twice; then `revision` is None. Errors: NotFoundError.
        """
        return self._rpc().inspection.device_map(device_name(device))

    def sharing(self, reference: Reference | None = None, device: str | None = None) -> list[SharedPair]:
        """The pairs of resident checkpoints that have bytes in common, those with most first: all, or those of one.

        Where `reference` is given, it is `one` of each pair. `device` None is every device. Errors: NotFoundError,
        InvalidReferenceError, DeviceError (it was lost).
        """
        inspection = self._rpc().inspection
        if reference is None:
            return inspection.sharing("", device_name(device))
        return self._known(inspection.sharing, reference, device)

    def tensors(self, reference: Reference, device: str | None = None) -> list[StoredTensor]:
        """The tensors of a resident checkpoint, and which checkpoints use their bytes.

        Errors: NotFoundError (also if it is evicted between two pages), InvalidReferenceError, DeviceError (it was
        lost).
        """
        return self._known(self._rpc().inspection.tensors, reference, device)

    def loads(self) -> list[LoadInfo]:
        """Loads under way, the oldest first."""
        return self._rpc().inspection.loads()

    def settings(self) -> list[SettingInfo]:
        """The settings that are in force in the daemon, in the order of the documentation."""
        return self._rpc().inspection.settings()[0]

    def settings_file(self) -> str:
        """The settings file that the daemon has read; empty where there was none."""
        return self._rpc().inspection.settings()[1]

    @abstractmethod
    def _rpc(self) -> RpcClient:
        """The gRPC client, connected anew where the daemon has gone. Errors: ForkedError, InvalidReferenceError."""

    @abstractmethod
    def _known(self, call: Callable[[str, str], T], reference: Reference, device: str | None) -> T:
        """Call with the name or digest, and the device, that a reference stands for."""
