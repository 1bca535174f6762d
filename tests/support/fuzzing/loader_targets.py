"""The channel between the daemon and a loader, on either end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from types import SimpleNamespace
from typing import Any, cast

from weightd.errors import ResourceLimitError, ServerError
from weightd_daemon.loader.channel import MAX_MESSAGE, LoaderChannel, LoaderChannelClosedError
from weightd_daemon.loads.loader_process import LoadProcess, LoadProcessDiedError

from .scripts import frames_of
from .target import HungUpError, Target

_MOST_DESCRIPTORS = 253
_MOST_MESSAGES = 64


def hear_daemon(data: bytes) -> int:
    """What a loader makes of a script: messages, and the descriptors that come with each.

    Returns how many segments it has then. Errors: ServerError, ResourceLimitError, HungUpError (the script ends).
    """
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    descriptors, lent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = LoaderChannel(control, descriptors)
    with control, descriptors, channel._reader:
        with theirs, lent, open("/dev/null", "rb") as null:
            theirs.setblocking(False)
            lent.setblocking(False)
            for frame in frames_of(data):
                try:
                    theirs.send(frame.data)
                    if frame.descriptors:
                        socket.send_fds(lent, [b"d"], [null.fileno()] * min(frame.descriptors, _MOST_DESCRIPTORS))
                except BlockingIOError:
                    break
        try:
            for _ in range(_MOST_MESSAGES):
                message = channel.receive()
                if message.WhichOneof("body") == "load":
                    os.close(channel.receive_descriptor())
            return len(channel.segments)
        except LoaderChannelClosedError:
            raise HungUpError("the daemon hung up") from None
        finally:
            channel.forget_segments()


def hear_loader(data: bytes) -> int:
    """What the daemon makes of a loader's bytes. Returns how many messages came. Errors: HungUpError (it is killed)."""
    return asyncio.run(_hear_loader(data))


async def _hear_loader(data: bytes) -> int:
    killed: list[bool] = []
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    loader: Any = LoadProcess.__new__(LoadProcess)
    loader._reader, loader._process = reader, SimpleNamespace(pid=1)
    loader.kill = lambda: killed.append(True)
    heard = 0
    logging.disable(logging.CRITICAL)
    try:
        while True:
            await cast("LoadProcess", loader).receive()
            heard += 1
    except LoadProcessDiedError:
        if killed:
            raise HungUpError("what came is no message") from None
        return heard
    finally:
        logging.disable(logging.NOTSET)


LOADER_HEARS = Target(
    hear_daemon,
    (ServerError, ResourceLimitError, HungUpError),
    ("weightd_daemon.loader.channel",),
    peak_bytes=MAX_MESSAGE + (1 << 20),  # the loader makes room for what its own daemon announces
)
LOADER_SAYS = Target(hear_loader, (HungUpError,), ("weightd_daemon.loads.loader_process",))
