"""Delivers events to listeners. An event reports a completed change: no listener can undo or stop it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from weightd_daemon.core.events import Event

log = logging.getLogger(__name__)


class _EventListener(Protocol):
    """One who wants to know."""

    def on_event(self, event: Event) -> None:
        """Something has happened."""

    def cut_off(self) -> None:
        """It failed, and hears nothing more: whoever asks it is told so from now on, instead of what is out of date."""


class EventListeners:
    """The observers of events: log, metrics and event stream, told in the order in which they were added."""

    def __init__(self) -> None:
        self._listeners: list[_EventListener] = []

    def add(self, listener: _EventListener) -> None:
        """Tell it of everything from now on."""
        self._listeners.append(listener)

    def publish(self, event: Event) -> None:
        """Tell each. Whoever raises is cut off: events come from the midst of changes to the books, which go on."""
        for listener in list(self._listeners):
            try:
                listener.on_event(event)
            except Exception:  # whatever it is, it is the listener's fault, and no reason to fail the load or the lease
                self._listeners.remove(listener)
                log.exception(
                    "%s failed at %s, and hears nothing more until the daemon is restarted",
                    type(listener).__name__, type(event).__name__,
                )  # fmt: skip
                listener.cut_off()
