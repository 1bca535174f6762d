"""Preloading: what the settings list is loaded as the daemon starts, in the name of its own user.

A preload is a load like a client's: the daemon finds and opens the files below `model_roots`, on a thread, and feeds
them to a loader through an intake. All begin at once, and take turns as loads do.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from itertools import count
from typing import TYPE_CHECKING

from weightd._handles import feed
from weightd._wire import source_to
from weightd.errors import DrainingError, ServerError, WeightdError
from weightd.resolve import reference_name
from weightd_daemon.config_file import ConfigError
from weightd_daemon.core.lease import Holder
from weightd_daemon.loader.request import LoadRequest

from .attaching import shown, sources_from
from .model_roots import on_thread, open_below

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from weightd_daemon.core.catalog import Catalog, Who
    from weightd_daemon.loader.loads import Loads
    from weightd_daemon.preloads import Preload

    from .model_roots import Opened

log = logging.getLogger(__name__)

FEED_SECONDS = 30.0
_SIGN_SECONDS = 10.0
"""How often a service manager is told that the start goes on, and needs three times that."""


class Preloader:
    """Loads each entry once; one that failed is tried again when `begin` is called again.

    `place(device)` says where a load goes, or raises ValueError; `tell` speaks to the service manager. What is below
    `roots` may be opened.
    """

    def __init__(
        self,
        *,
        loads: Loads,
        catalog: Catalog,
        who: Who,
        place: Callable[[str], str],
        tell: Callable[..., None],
        roots: Sequence[str],
    ) -> None:
        self.roots = roots
        self._loads = loads
        self._catalog = catalog
        self._who = who
        self._place = place
        self._tell = tell
        self._numbers = count(1)
        self._closing = False
        self._tasks: dict[Preload, asyncio.Task[WeightdError | None]] = {}

    def check(self, entries: Iterable[Preload]) -> None:
        """Errors: ConfigError for a device that is not served, or that has to be said."""
        for entry in entries:
            try:
                self._place(entry.device)
            except ValueError as error:
                raise ConfigError(f"{entry.where}: preload {entry.ref!r}: {error}") from None

    def begin(self, entries: Iterable[Preload]) -> None:
        """Load what is not loaded or under way."""
        for entry in entries:
            before = self._tasks.get(entry)
            if before is None or (before.done() and before.result() is not None):
                self._tasks[entry] = asyncio.get_running_loop().create_task(self._try(entry))

    async def awaited(self, stop: asyncio.Event) -> None:
        """Wait for those that the daemon is not ready without, or until it stops. Errors: ConfigError (one failed)."""
        stopped = asyncio.get_running_loop().create_task(stop.wait())
        try:
            for entry, task in self._tasks.items():
                while entry.wait and not task.done() and not stop.is_set():
                    with contextlib.suppress(OSError):  # a manager that does not listen holds nothing up
                        self._tell(f"STATUS=Preloading {entry.ref}")
                    await asyncio.wait([task, stopped], timeout=_SIGN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not entry.wait or stop.is_set() or (error := task.result()) is None:
                    continue
                if not isinstance(error, DrainingError):  # else somebody wants it empty, and that is no failure
                    raise ConfigError(f"{entry.where}: preload {entry.ref!r}: {error}")
        finally:
            stopped.cancel()

    async def close(self) -> None:
        """The daemon stops: wait for nothing any more."""
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _try(self, entry: Preload) -> WeightdError | None:
        """Load an entry; its error is for who waits, and for the log."""
        try:
            await self._load(entry)
        except WeightdError as error:
            if entry.wait and await self._is_there(entry):
                log.warning("preload of %s failed: %s; what is resident under its name stays", entry.ref, error)
                return None
            log.warning("preload of %s failed: %s", entry.ref, error)
            return error
        except Exception:  # a bug must not end the daemon, and be told to who waits
            log.exception("preload of %s failed by a bug", entry.ref)
            return ServerError("it failed by a bug in the daemon; its log has the details")
        log.info("preloaded %s", entry.ref)
        return None

    async def _load(self, entry: Preload) -> None:
        opened = await on_thread(functools.partial(open_below, entry.ref, tuple(self.roots)))
        try:
            await self._bring(entry, opened)
        finally:
            if not self._closing:  # else they go with the process: a thread may be sending them
                await on_thread(opened.files.close)

    async def _bring(self, entry: Preload, opened: Opened) -> None:
        """Make files resident: they are already, a load of them is under way, or one begins."""
        wish = LoadRequest(
            who=self._who,
            # A connection each, for how much one may have under way is limited; those of clients are positive.
            holder=Holder(-next(self._numbers), os.getpid(), self._who.uid, "preload"),
            sources=sources_from([source_to(source) for source in opened.files.sources]),
            device=self._place(entry.device),
            name=entry.name or opened.name,
            name_is_default=not entry.name,
            pin=entry.pin,
            detached=True,
            reference=shown(opened.name),
        )
        if entry.name:
            self._catalog.check(self._who, entry.name)
        resident = self._loads.find_resident(wish)
        if resident is not None:
            self._loads.settle(wish, resident)
            return
        ours, loaders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, loaders:
            begins = False
            while not begins:
                load, waiter, begins = self._loads.start(wish, loaders.fileno())
                try:
                    if begins:
                        loaders.detach()  # it is the load's now
                        if await load.has_loader():
                            await on_thread(functools.partial(feed, ours, opened.files.fds, FEED_SECONDS))
                    elif not await load.has_files():
                        continue  # the client that began it left before its files had come
                    await asyncio.wait([load.done])
                    load.done.result()
                    return
                finally:
                    self._loads.leave(load, waiter)

    async def _is_there(self, entry: Preload) -> bool:
        """Whether something is resident under the name of an entry."""
        try:
            name = entry.name or await on_thread(functools.partial(reference_name, entry.ref))
            self._catalog.find(self._who, name, self._place(entry.device))
        except WeightdError:
            return False
        return True
