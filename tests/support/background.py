"""Calls that a test makes beside its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def background(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
    """Start a call on a thread of its own; its result or error is in the future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments, **options))
        except BaseException as error:  # noqa: BLE001  # carried to the test
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
