"""Look at a daemon: maps, sharing, tensors, loads under way, settings. No call here changes anything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ._devices import device_name
from ._name_changes import name_changes
from ._transport.convert import check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._transport.rpc import RpcClient
    from .inspection import BooksFigure, DeviceMap, LoadInfo, SettingInfo, SharedPair, StoredTensor
    from .resolve import Reference
    from .types import NameInfo

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

    def sharing(
        self, reference: Reference | None = None, device: str | None = None, *, most: int | None = None
    ) -> list[SharedPair]:
        """The pairs of resident checkpoints that have bytes in common, those with most first: all, or those of one.

        Where `reference` is given, it is `one` of each pair. `device` None is every device. `most`, above 0, is how
        many pairs to ask for; None is all. Errors: NotFoundError, InvalidReferenceError, DeviceError (it was lost).
        """
        inspection = self._rpc().inspection
        if reference is None:
            return inspection.sharing("", device_name(device), most)
        return self._known(partial(inspection.sharing, most=most), reference, device)

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

    def check_books(self) -> list[BooksFigure]:
        """The daemon's books against what the kernel and the devices say, for admins; `BooksFigure.agrees` says if.

        It takes some seconds where they do not agree at once. Errors: PermissionDeniedError.
        """
        return self._rpc().inspection.check_books()

    def watch(self, name: str) -> Iterator[NameInfo | None]:
        """Yield what a name means, at once if there is such a name and whenever that changes, without end.

        It changes when the name moves to other content, and when its content comes or goes: a name that was chosen
        outlives an eviction with the state "evicted". None says that the name has gone. Changes that follow each other
        fast may come as one.
        When the daemon is restarted, this waits until it is back, and yields what has changed meanwhile. Errors:
        InvalidReferenceError (no name can be like that), InUseError (too many readers of events), and what keeps
        this from connecting at first.
        """
        check_name(name)
        return name_changes(self._rpc, name)

    @abstractmethod
    def _rpc(self) -> RpcClient:
        """The gRPC client, connected anew where the daemon has gone. Errors: ForkedError, InvalidReferenceError."""

    @abstractmethod
    def _known(self, call: Callable[[str, str], T], reference: Reference, device: str | None) -> T:
        """Call with the name or digest, and the device, that a reference stands for."""
