"""Devices that are closed at the end of a block, also on their threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

D = TypeVar("D")


@contextlib.contextmanager
def closed_after(device: D) -> Iterator[D]:
    """A device; when the block is over, it has given everything up."""
    try:
        yield device
    finally:
        close(device)


def close(device: Any) -> None:
    """Close a device, and wait until it has given everything up."""
    device.close()
    assert device.calls.join(60)
