"""Limits how often actions of peers are logged: one line at once, then a count."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 10.0


class HandleLogRate:
    """Limits log lines about handle-socket peers to one in `SECONDS`; `on_more` gets the number left out, if any."""

    def __init__(self, on_more: Callable[[int], None]) -> None:
        self._on_more = on_more
        self._more = 0
        self._until: asyncio.TimerHandle | None = None

    def may_log(self) -> bool:
        """Whether to log a line now; if not, it is counted. On the loop's thread."""
        if self._until is not None:
            self._more += 1
            return False
        self._until = asyncio.get_running_loop().call_later(SECONDS, self._end)
        return True

    def _end(self) -> None:
        more, self._more, self._until = self._more, 0, None
        if more:
            self._on_more(more)
