"""Read the daemon once a second, while a page looks, and keep the answers in sections with version numbers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from weightd.errors import DaemonUnreachableError, WeightdError
from weightd.types import Stats

from .answers import encoded, map_columns, pair_rows

if TYPE_CHECKING:
    from weightd.client import Client

_PERIOD = 1.0
_IDLE = 30.0
"""Seconds after the last request of a page until the daemon is left alone."""
_SHARE = 10
"""A costly question is asked no sooner than after so many times the seconds that its last answer took."""
_ATTEMPTS = 3
"""How often the lists are read that change while they are read."""
MOST_EVENTS = 50
MOST_PAIRS = 2_000
"""A thousand checkpoints can be half a million pairs; those with most in common come first."""


class Section(NamedTuple):
    """An answer as JSON; its version differs from those of all earlier answers of this section."""

    version: int
    content: bytes


class _Costly:
    """When to ask a question again whose answer may take long."""

    def __init__(self) -> None:
        self._asked_for: object = None
        self._not_before = 0.0

    def is_due(self, state: object) -> bool:
        """Return whether to ask now, if the answer depends on `state`. State None is never the same."""
        return (state is None or state != self._asked_for) and time.monotonic() >= self._not_before

    def answered(self, state: object, seconds: float) -> None:
        self._asked_for = state
        self._not_before = time.monotonic() + _SHARE * seconds


class SectionReader:
    """The sections of the page: daemon, stats, checkpoints, leases, loads, events, pairs, and a map for each device.

    A thread reads; `changed` is called from it when a section has changed. `sections` is replaced, never changed, so
    any thread may read it. Where an answer is missing, its section is `{"missing": WHY}`.
    """

    def __init__(self, client: Client, changed: Callable[[], None]) -> None:
        self.client = client
        self.sections: dict[str, Section] = {}
        self._changed = changed
        self._versions = 0
        self._costs: dict[str, _Costly] = {}
        self._read_state: object = None
        self._looked_at = 0.0
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weightd-web-reader", daemon=True)

    def start(self) -> None:
        """Begin to read, as soon as a page looks."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for the question that it may be asking."""
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def look(self) -> None:
        """Note that a page looks now."""
        self._looked_at = time.monotonic()
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.clear()  # before it is asked whether to wait: what comes afterwards ends the wait
            if self._stop.is_set():
                return
            if time.monotonic() - self._looked_at > _IDLE:
                self._wake.wait()
                continue
            before = self.sections
            self.read()
            if self.sections is not before:
                self._changed()
            self._stop.wait(_PERIOD)

    def read(self) -> None:
        """Read once what may have changed."""
        try:
            found = self._read_lists()
        except WeightdError as error:
            self._read_state = None
            self._keep({"daemon": {"reachable": False, "message": str(error), "socket": str(self.client.socket)}})
            return
        self._keep(found)

    def _read_lists(self) -> dict[str, Any]:
        """Return what has to be kept, by section: of one moment, unless the daemon is too busy for that."""
        client = self.client
        version = client.version()
        stats = client.stats()
        found: dict[str, Any] = {"loads": self._optional(lambda: [asdict(load) for load in client.loads()])}
        state = _state_of(version.pid, stats)
        for _ in range(_ATTEMPTS):
            if state is None or state != self._read_state:
                found["checkpoints"] = [asdict(checkpoint) for checkpoint in client.checkpoints()]
                found["leases"] = [asdict(lease) for lease in client.leases()]
                found["events"] = [asdict(event) for event in deque(client.events(), MOST_EVENTS)]
            found |= self._read_maps(stats, state) | self._costly("pairs", state, self._read_pairs)
            self._read_state = state
            stats = client.stats()
            after = _state_of(version.pid, stats)
            if after is None or after == state:
                break
            state = after
        found["daemon"] = {
            "reachable": True,
            "socket": str(client.socket),
            "version": version.version,
            "pid": version.pid,
            "state": stats.state,
        }
        found["stats"] = asdict(stats)
        return found

    def _read_maps(self, stats: Stats, state: object) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for device in stats.devices:
            ask = partial(self._read_map, device.uuid)
            found |= self._costly(f"map {device.uuid}", state, ask)
        return found

    def _read_map(self, uuid: str) -> dict[str, Any]:
        return map_columns(self.client.device_map(uuid))

    def _read_pairs(self) -> dict[str, Any]:
        pairs = self.client.sharing(most=MOST_PAIRS + 1)
        return {"pairs": pair_rows(pairs[:MOST_PAIRS]), "more": len(pairs) > MOST_PAIRS}

    def _costly(self, section: str, state: object, ask: Callable[[], Any]) -> dict[str, Any]:
        """Return the section, or nothing if it need not or should not be asked for now."""
        cost = self._costs.setdefault(section, _Costly())
        if not cost.is_due(state):
            return {}
        begin = time.monotonic()
        answer = self._optional(ask)
        cost.answered(state, time.monotonic() - begin)
        return {section: answer}

    def _optional(self, ask: Callable[[], Any]) -> Any:
        """Return an answer, or why there is none: the daemon may be too old, or a device absent."""
        try:
            return ask()
        except DaemonUnreachableError:
            raise
        except WeightdError as error:
            return {"missing": str(error)}

    def _keep(self, found: dict[str, Any]) -> None:
        kept = dict(self.sections)
        for name, value in found.items():
            content = encoded(value)
            if name not in kept or kept[name].content != content:
                self._versions += 1
                kept[name] = Section(self._versions, content)
        if any(kept[name] is not self.sections.get(name) for name in kept):
            self.sections = kept


def _state_of(pid: int, stats: Stats) -> object:
    """What the lists depend on, in this daemon; None where it does not count its changes."""
    if not stats.revision:
        return None
    return pid, stats.revision, stats.state, tuple((device.uuid, device.absence) for device in stats.devices)
