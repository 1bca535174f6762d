"""Lookups on threads, for sources that may hang for ever: the memory of a peer, and a name service.

A thread that hangs stays behind and counts. When all hang, nothing more is asked, and the callers go on with what they
had instead of an answer. The threads are daemon threads: none of them holds up the end of the process.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)

_WAITING = 512
_WAITING_OF_ONE = 64


class Lookups:
    """At most `threads` questions are under way, and one of one asker; a bounded number waits. Any thread may ask."""

    def __init__(self, what: str, threads: int) -> None:
        self._what = what
        self._most = threads
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._waiting: list[tuple[Hashable, Callable[[], None]]] = []
        self._waiting_of: Counter[Hashable] = Counter()
        self._asking: set[Hashable] = set()
        self._changed = threading.Condition()

    @property
    def under_way(self) -> int:
        """Questions that are asked at the moment; those that hang are among them."""
        with self._changed:
            return len(self._asking)

    def ask(self, asker: Hashable, question: Callable[[], None]) -> bool:
        """Call `question`, which stores its answer itself, on a thread. Returns False if too many wait already."""
        with self._changed:
            if len(self._waiting) >= _WAITING or self._waiting_of[asker] >= _WAITING_OF_ONE:
                return False
            self._waiting.append((asker, question))
            self._waiting_of[asker] += 1
            if len(self._waiting) > self._idle and len(self._threads) < self._most:
                thread = threading.Thread(target=self._work, name=f"weightd-{self._what}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while (taken := self._next()) is None:
                    self._changed.wait()
                self._idle -= 1
                asker, question = taken
                self._asking.add(asker)
            try:
                question()
            except Exception:
                log.exception("%s: a lookup failed by a bug", self._what)
            with self._changed:
                self._asking.discard(asker)

    def _next(self) -> tuple[Hashable, Callable[[], None]] | None:
        """The first question whose asker has none under way."""
        for place, (asker, question) in enumerate(self._waiting):
            if asker not in self._asking:
                del self._waiting[place]
                self._waiting_of[asker] -= 1
                self._waiting_of += Counter()  # drops those who have none
                return asker, question
        return None
