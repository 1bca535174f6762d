"""Constants of the handle socket, and how to receive frames with descriptors, for both ends. See docs/protocol.md."""

from __future__ import annotations

import socket
from array import array
from typing import Final

PROTOCOL: Final = 1
"""The version that `hello` names."""

MAX_FRAME: Final = 64 << 10
"""Bytes of one frame."""

MAX_DESCRIPTORS: Final = 253
"""Descriptors in one message: the kernel takes no more."""

MAX_MANIFEST_BYTES: Final = 1 << 30
"""Longest manifest that either end reads."""

IPC_HANDLE_BYTES: Final = 64
"""Length of a CUDA IPC handle."""


def receive_fds(source: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
    """Receive up to `size` bytes and `most` descriptors, which no exec inherits. Returns both, and the flags.

    With `most` 0 the kernel drops descriptors, and nobody has to close them. `socket.recv_fds` does not do: before
    Python 3.14 it drops MSG_CMSG_CLOEXEC. Errors: those of recvmsg.
    """
    found = array("i")
    room = socket.CMSG_LEN(most * found.itemsize) if most else 0
    data, ancillary, flags, _ = source.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(body[: len(body) - len(body) % found.itemsize])
    return data, found.tolist(), flags
