"""A daemon whose loaders stop in the middle of a load until the test opens the gate: a file that it makes."""

from __future__ import annotations

import sys
from pathlib import Path

_LOADER = """
import sys, time
from pathlib import Path
from weightd_daemon.core import digest
from weightd_daemon.loader.job import main

class Gated:
    def __init__(self):
        self._hasher = digest.new_hasher()

    def update(self, data):
        while not Path({gate!r}).exists():
            time.sleep(0.01)
        self._hasher.update(data)

    def digest(self):
        return self._hasher.digest()

sys.exit(main(sys.argv[1:], new_hasher=Gated))
"""
_DAEMON = """
import sys
from support.launch import tell_waiters
from weightd_daemon.__main__ import main

tell_waiters()
sys.exit(main(loader_argv=(sys.executable, "-c", {!r})))
"""


def gated_argv(gate: Path) -> list[str]:
    """The `argv` of a Daemon whose loaders have read, and wait to hash, until `gate` exists."""
    return [sys.executable, "-c", _DAEMON.format(_LOADER.format(gate=str(gate)))]


_STALLING = """
import sys, threading
from weightd_daemon.loader.job import main
from weightd_daemon.loader.copying import LoaderCopier

settled = threading.Event()
copy, settle = LoaderCopier.copy, LoaderCopier._settle

def stalling_copy(self, unit):
    if any(tensor.spec.name == {stalled!r} for tensor in unit.tensors):
        settled.wait({limit})
    copy(self, unit)

def telling_settle(self, found):
    settle(self, found)
    if any(tensor.spec.name == {awaited!r} for tensor, _, _ in found):
        settled.set()

LoaderCopier.copy, LoaderCopier._settle = stalling_copy, telling_settle
sys.exit(main(sys.argv[1:]))
"""


def stalling_argv(stalled: str, awaited: str, limit: float = 5.0) -> list[str]:
    """The `argv` of a Daemon whose loaders keep one tensor back until another has its blob, `limit` seconds at most."""
    loader = _STALLING.format(stalled=stalled, awaited=awaited, limit=limit)
    return [sys.executable, "-c", _DAEMON.format(loader)]
