"""Preloading: loads the checkpoints in the settings when the daemon starts, as the daemon's own user.

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

from weightd._transport.convert import source_to
from weightd._transport.handle_socket import feed
from weightd.errors import DeviceAbsentError, DrainingError, InvalidReferenceError, ServerError, WeightdError
from weightd.resolve import reference_name
from weightd_daemon.config.toml_file import ConfigError, TemporaryConfigError
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.handles.attach import shown, sources_from
from weightd_daemon.loads.request import LoadRequest

from .model_roots import on_thread, open_below

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from weightd_daemon.config.preload_entry import PreloadConfig
    from weightd_daemon.core.catalog import Catalog
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.loads.loads import Loads

    from .model_roots import PreloadFiles

log = logging.getLogger(__name__)

FEED_SECONDS = 30.0
_SIGN_SECONDS = 10.0
"""How often a service manager is told that the start goes on, and needs three times that."""


class PreloadOperation:
    """Loads what the setting `preload` lists, at start and on reload. `begin` again retries what failed or has gone.

    `place(device)` says where a load goes, or raises ConfigError or DeviceAbsentError; `notify` speaks to the service
    manager. What is below `roots` may be opened.
    """

    def __init__(
        self,
        *,
        loads: Loads,
        catalog: Catalog,
        who: Principal,
        place: Callable[[str], str],
        notify: Callable[..., None],
        roots: Sequence[str],
        listed: Sequence[PreloadConfig],
    ) -> None:
        self.roots = roots
        self.listed = listed
        self._loads = loads
        self._catalog = catalog
        self._who = who
        self._place = place
        self._notify = notify
        self._numbers = count(1)
        self._closing = False
        self._tasks: dict[PreloadConfig, asyncio.Task[Exception | None]] = {}

    def check(self, entries: Iterable[PreloadConfig]) -> None:
        """Errors: ConfigError for a name that cannot be, or a device that has to be said or is not served."""
        for entry in entries:
            where = f"{entry.where}: preload {entry.ref!r}"
            try:
                with contextlib.suppress(DeviceAbsentError):  # the load will say so, and is tried again when it is back
                    self._place(entry.device)
                if entry.name:
                    self._catalog.check(self._who, entry.name)
            except ConfigError as error:
                raise type(error)(f"{where}: {error}") from None
            except InvalidReferenceError as error:
                raise ConfigError(f"{where}: {error}") from None
            except WeightdError:
                pass  # whose a name is changes while the daemon runs: the load will say so

    def begin(self, *, only_awaited: bool = False) -> None:
        """Load what is listed and neither resident under its name nor under way."""
        for entry in self.listed if not self._closing else ():
            if entry.wait or not only_awaited:
                before = self._tasks.get(entry)
                task = self._try(entry) if before is None else self._again(entry, before)
                self._tasks[entry] = asyncio.get_running_loop().create_task(task)

    async def awaited(self, stop: asyncio.Event) -> None:
        """Wait for those that the daemon is not ready without, or until it stops.

        Errors: TemporaryConfigError (one failed). Files, mounts, memory and descriptors come and go; the settings were
        checked before.
        """
        stopped = asyncio.get_running_loop().create_task(stop.wait())
        try:
            for entry in [entry for entry in self._tasks if entry.wait]:
                while not (task := self._tasks[entry]).done() and not stop.is_set():
                    with contextlib.suppress(OSError):  # a manager that does not listen holds nothing up
                        self._notify(f"STATUS=Preloading {entry.ref}")
                    await asyncio.wait([task, stopped], timeout=_SIGN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if stop.is_set() or (error := task.result()) is None:
                    continue
                if not isinstance(error, DrainingError):  # else somebody wants it empty, and that is no failure
                    raise TemporaryConfigError(f"{entry.where}: preload {entry.ref!r}: {error}")
        finally:
            stopped.cancel()

    async def close(self) -> None:
        """The daemon stops: wait for nothing any more."""
        self._closing = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _again(self, entry: PreloadConfig, before: asyncio.Task[Exception | None]) -> Exception | None:
        """Load an entry unless the time before has brought it, and it is still there."""
        error = await before  # which is cancelled with this
        return None if error is None and await self._is_there(entry) else await self._try(entry)

    async def _try(self, entry: PreloadConfig) -> Exception | None:
        """Load an entry; its error is for who waits, and for the log."""
        try:
            await self._load(entry)
        except (WeightdError, ConfigError) as error:  # a number may mean no GPU once the absent ones are back
            if entry.wait and await self._is_there(entry):
                log.warning("preload of %s failed: %s; what is resident under its name stays", entry.ref, error)
                return None
            log.warning("preload of %s failed: %s", entry.ref, error)
            return error
        except OSError as error:  # out of descriptors or memory
            log.warning("preload of %s failed: %s", entry.ref, error)
            return ServerError(f"the daemon could not do it: {error}")
        except Exception:  # a bug must not end the daemon, and be told to who waits
            log.exception("preload of %s failed by a bug", entry.ref)
            return ServerError("it failed by a bug in the daemon; its log has the details")
        log.info("preloaded %s", entry.ref)
        return None

    async def _load(self, entry: PreloadConfig) -> None:
        opened = await on_thread(functools.partial(open_below, entry.ref, tuple(self.roots)))
        try:
            await self._bring(entry, opened)
        finally:
            if not self._closing:  # else they go with the process: a thread may be sending them
                await on_thread(opened.files.close)

    async def _bring(self, entry: PreloadConfig, opened: PreloadFiles) -> None:
        """Make files resident: they are already, a load of them is under way, or one begins."""
        wish = LoadRequest(
            who=self._who,
            # A connection each, for how much one may have under way is limited; those of clients are positive.
            peer=LeasePeer(-next(self._numbers), os.getpid(), self._who.uid, "preload"),
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
            self._loads.answer(wish, resident)
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

    async def _is_there(self, entry: PreloadConfig) -> bool:
        """Whether something is resident under the name of an entry."""
        try:
            name = entry.name or await on_thread(functools.partial(reference_name, entry.ref))
            self._catalog.find(self._who, name, self._place(entry.device))
        except (WeightdError, ConfigError):
            return False
        return True
