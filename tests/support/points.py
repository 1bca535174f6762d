"""Named points at which a daemon kills itself: the one that a file names, when it is next reached."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.devices.reclaimer import DeviceReclaimer
from weightd_daemon.persistence import root_record
from weightd_daemon.persistence.descriptor_store import PersistentDescriptorStore
from weightd_daemon.persistence.service_manager import ServiceManagerStore

POINTS = ("reserve", "copy", "segment", "manifest", "barrier", "torn", "flip", "evict", "return", "release")
"""In the order of a seal, then of an eviction; "torn" is in the middle of writing the root record."""


def install(armed: Path) -> None:
    """Exchange the functions at these points by ones that look into the file `armed`."""

    def reached(point: str) -> None:
        try:
            if armed.read_text() != point:
                return
            armed.unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def after(owner: Any, name: str, point: str, when: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            if when(result, *arguments):
                reached(point)
            return result

        setattr(owner, name, wrapped)

    def before(owner: Any, name: str, point: str, when: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if when(*arguments):
                reached(point)
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    after(StoreTransaction, "grant", "reserve", lambda extent, *_: extent is not None)
    after(StoreTransaction, "settle", "copy")
    after(ServiceManagerStore, "store", "segment", lambda _, __, name, *___: name.startswith("seg."))
    after(ServiceManagerStore, "store", "manifest", lambda _, __, name, *___: name.startswith("man."))
    before(StoreTransaction, "seal", "barrier")
    after(root_record.PersistentRootRecord, "append", "flip")
    before(PersistentDescriptorStore, "drop", "evict", lambda _, name: name.startswith("man."))
    before(DeviceReclaimer, "_carry_out", "return")
    before(PersistentDescriptorStore, "drop", "release", lambda _, name: name.startswith("seg."))
    write = root_record._write

    def torn(descriptor: int, data: bytes, offset: int) -> None:
        write(descriptor, data[: len(data) // 2], offset)
        reached("torn")
        write(descriptor, data, offset)

    root_record._write = torn
