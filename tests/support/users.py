"""Client processes of other users, which only root can have."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from support.daemon import Daemon
from support.worker import Worker

ALICE, BOB, ADMIN = 54321, 54322, 54323
"""Numbers that nobody has here; weightd needs no entry in the passwd file."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")

# Everything is imported before the step down: others may perhaps not read this interpreter or these sources.
_BECOME = """
import os
from support import leash
import grpc, weightd, weightd._transport.rpc
grpc.insecure_channel("unix:/nowhere").close()  # imports what a first channel needs
os.setgroups([]); os.setgid(uid); os.setuid(uid)
leash.hold()
client = weightd.connect(timeout=60.0)

def attempt(call, *arguments, **options):
    '''The result as something that JSON has, or the name and message of the error.'''
    try:
        return call(*arguments, **options)
    except weightd.WeightdError as error:
        return [type(error).__name__, str(error)]

def load(path, **options):
    return attempt(lambda: sorted(client.load(path, **options).names))
"""


def user_of(worker: Worker, uid: int) -> Worker:
    """Make a client process one of a user; it has `client`, `load` and `attempt` then."""
    worker.run(_BECOME, uid=uid)
    return worker


def open_to_all(start_daemon: Callable[..., Daemon], **settings: Any) -> Daemon:
    """A daemon whose sockets every user can reach."""
    daemon = start_daemon(socket_mode="0666", **settings)
    daemon.folder.chmod(0o755)
    return daemon
