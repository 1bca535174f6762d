"""A process on the fake driver, for tests of the driver itself."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import fakecuda
from support.worker import Worker


class Program(Worker):
    """A process on the fake driver. Descriptors go to and from it over `link`."""

    def __init__(self, library: Path, **knobs: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(f"{folder}/link")
            listener.listen()
            listener.settimeout(60)
            super().__init__(
                Path("/nonexistent"),
                {**fakecuda.environment(library, **knobs), "FAKECUDA_TEST_LINK": f"{folder}/link"},
            )
            try:
                self.run("from fakecuda.driving import *; link()")
                self.link, _ = listener.accept()
            except BaseException:
                super().close()
                raise

    def given(self) -> int:
        """The descriptor that the program has given."""
        self.link.settimeout(60)
        return socket.recv_fds(self.link, 1, 1)[1][0]

    def give(self, descriptor: int) -> None:
        """Send a descriptor; the program has to `take` it. It is closed here."""
        socket.send_fds(self.link, [b"."], [descriptor])
        os.close(descriptor)

    def export(self) -> int:
        """The descriptor of the program's `block`."""
        self.run("give(int(ok('cuMemExportToShareableHandle', block, DESCRIPTOR, 0)))")
        return self.given()

    def close(self) -> None:
        self.link.close()
        super().close()


StartProgram = Callable[..., Program]
_machines = itertools.count(1)


def new_machine() -> str:
    """A FAKECUDA_MACHINE whose GPUs nobody else has."""
    return str(os.getpid() + (next(_machines) << 22))
