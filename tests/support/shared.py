"""Daemons that the tests of one module share: one for each backend, started when a test first needs it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import weightd
from support.backends import Backend
from support.daemon import Daemon


class SharedDaemons:
    """For a fixture of scope "module"; see `on`."""

    def __init__(self) -> None:
        self._daemons: dict[str, Daemon] = {}

    @contextlib.contextmanager
    def on(self, backend: Backend) -> Iterator[Daemon]:
        """The daemon of a backend; it holds nothing, and is emptied again at the end.

        So must it be on a GPU, where a test of another daemon counts the bytes of all.
        """
        if backend.name not in self._daemons:
            self._daemons[backend.name] = Daemon(backend)
        daemon = self._daemons[backend.name]
        yield daemon
        with weightd.connect(daemon.socket, timeout=60.0) as client:
            for checkpoint in client.checkpoints():
                client.remove(checkpoint.content_digest)

    def close(self) -> None:
        """Hang up what `weightd.torch` has of them in this process, stop them, and look for leaks."""
        shared = getattr(sys.modules.get("weightd.torch"), "_shared", {})  # few modules import it
        while shared:
            shared.popitem()[1].close()
        with contextlib.ExitStack() as stack:
            for daemon in self._daemons.values():
                stack.callback(daemon.close, check=True)
