"""Books of a device that makes each segment in the step that asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weightd.errors import DeviceError
from weightd_daemon.core.creations import Creation
from weightd_daemon.core.memory import MemoryAccounting


class PromptMemory(MemoryAccounting):
    """`create(bytes)` makes a segment and returns its number; MemoryError, OSError and DeviceError are reported."""

    def __init__(self, *, create: Callable[[int], int], **more: Any) -> None:
        super().__init__(create=self._make, **more)
        self.create = create

    def _make(self, creation: Creation) -> None:
        try:
            segment = self.create(creation.size)
        except (MemoryError, OSError, DeviceError) as error:
            self.failed(creation, error)
        else:
            assert self.made(creation, segment)
