"""SIGHUP: rereads the settings, applies those that can change at run time, and logs the names of the others."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import fields
from typing import TYPE_CHECKING

from weightd_daemon.config.toml_file import ConfigError

from .model_roots import on_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from weightd_daemon.config.settings import LoadedSettings, Settings, SettingsInForce

    Check = Callable[[Settings], None]
    Change = Callable[[Settings], Iterable[None] | None]

log = logging.getLogger(__name__)


class ReloadOperation:
    """Reloads the daemon's settings on request, one time after the other.

    `checks` raise ConfigError for what the daemon cannot have, before anything is changed. `changes` are what takes up
    a setting, by its name, and may return steps to go through; a setting that is not among them needs a restart.
    `again` comes last, whatever has changed.
    `announced` lasts while they are read.
    """

    def __init__(
        self,
        in_force: SettingsInForce,
        read: Callable[[], LoadedSettings],
        checks: Sequence[Check],
        changes: Mapping[str, Change],
        again: Change,
        announced: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._in_force = in_force
        self._read = read
        self._checks = checks
        self._changes = changes
        self._again = again
        self._announced = announced

    async def serve(self, told: asyncio.Event) -> None:
        """Read again whenever `told` is set."""
        while True:
            await told.wait()
            told.clear()
            with self._announced():
                try:
                    await self._reload()
                except Exception:  # a bug: the settings of before may be changed in part, and the daemon serves on
                    log.exception("settings were not read again by a bug")

    async def _reload(self) -> None:
        origins: Mapping[str, str] = {}
        try:
            # On a thread: a file may lie where reading hangs, and so may the database of users.
            read = await on_thread(self._read)
            settings, origins = read.settings, read.origins
            for check in self._checks:
                check(settings)
        except ConfigError as error:
            where = f"{origins[error.key]}: " if error.key else ""
            log.error("settings are not taken up, those of before stay: %s%s", where, error)  # noqa: TRY400  # not a bug
            return
        before = self._in_force.loaded.settings
        changed = [f.name for f in fields(settings) if getattr(settings, f.name) != getattr(before, f.name)]
        changes = {self._changes[name]: None for name in changed if name in self._changes}  # each once, in order
        for change in [*changes, self._again]:
            for _ in change(settings) or ():
                await asyncio.sleep(0)  # others have their turn on the loop
        taken = [name for name in changed if name in self._changes]
        left = [name for name in changed if name not in self._changes]
        # What was left is still what was set at the start, so that the next time names it again.
        self._in_force.take(read, left)
        log.info("settings read again; changed: %s", ", ".join(taken) or "nothing")
        if left:
            log.warning("needs a restart: %s", ", ".join(left))
