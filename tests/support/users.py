"""Clients that are other users; only root can become them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from support.daemon import Daemon

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users")

# Everything is imported before the step down: others may perhaps not read this interpreter or these sources.
BECOME = """
import os
import weightd, weightd._rpc
os.setgroups([]); os.setgid(uid); os.setuid(uid)
client = weightd.connect(timeout=20.0)

def attempt(call, *arguments, **options):
    '''The result as something that JSON has, or the name and message of the error.'''
    try:
        return call(*arguments, **options)
    except weightd.WeightdError as error:
        return [type(error).__name__, str(error)]

def load(path, **options):
    return attempt(lambda: sorted(client.load(path, **options).names))
"""


def open_to_all(start_daemon: Callable[..., Daemon], **settings: Any) -> Daemon:
    """A daemon whose sockets every user can reach."""
    daemon = start_daemon(socket_mode="0666", **settings)
    daemon.folder.chmod(0o755)
    return daemon
