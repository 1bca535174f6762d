"""The holder process: owns the memory of one GPU that only CUDA IPC can share, and dies with the daemon.

Memory of cuMemAlloc belongs to the process that allocated it, and needs a context; so it is not the daemon that
allocates. It asks over a SOCK_SEQPACKET pair, one message a request: ALLOCATE (answered) or FREE (not answered;
requests are done in order). Run as `python -m weightd_daemon.devices.cuda_holder CHANNEL PARENT UUID`.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import sys
from typing import Any

from weightd import _failpoints
from weightd._mapping import cuda_driver as driver
from weightd.errors import DeviceError, WeightdError
from weightd_daemon.libc import die_with

from .cuda_errors import OUT_OF_MEMORY

REQUEST = struct.Struct("<cQQ")
"""What to do, the number that the daemon gives the allocation, and its bytes."""
ALLOCATE, FREE = b"a", b"f"

MESSAGE_BYTES = 4096
OK, FAILED = b"k", b"x"
"""First byte of an answer: after OK comes the handle; after FAILED the driver's code, the call and the message."""


def main(arguments: list[str]) -> int:
    """Serve until the daemon hangs up or dies. Returns the exit code."""
    descriptor, parent, uuid = int(arguments[0]), int(arguments[1]), arguments[2]
    if not die_with(parent):  # also by kill -9
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C or `systemctl stop`: it is the daemon's to end this process
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as channel, contextlib.ExitStack() as stack:
        try:
            stack.enter_context(driver.on_device(driver.ordinal_of(uuid)))
        except WeightdError as error:
            channel.send(_failure(error))
            return 1
        channel.send(OK)
        try:
            _serve(channel)
        except DeviceError as error:
            sys.stderr.write(f"{error}\n")  # which is the daemon's log
            return 1
    return 0


def _serve(channel: socket.socket) -> None:
    addresses: dict[int, Any] = {}
    while request := channel.recv(MESSAGE_BYTES):
        what, number, size = REQUEST.unpack(request)
        if what == FREE:
            _failpoints.reach("holder.free")
            driver.call("cuMemFree", addresses.pop(number))  # where it fails, this context is at its end, and we too
            continue
        try:
            _failpoints.reach("holder.allocate")
            addresses[number] = driver.call("cuMemAlloc", size)
            handle = _prepared(addresses[number], size)
        except DeviceError as error:
            channel.send(_failure(error))
            if error.code != OUT_OF_MEMORY:
                raise  # it may stick to this context, and what was allocated goes with this process
            if number in addresses:
                driver.call("cuMemFree", addresses.pop(number))
        else:
            channel.send(OK + handle)


def _prepared(address: Any, size: int) -> bytes:
    """The handle of memory that now reads as zero: what was there may be another user's. Errors: DeviceError."""
    driver.call("cuMemsetD8", address, 0, size)
    driver.call("cuCtxSynchronize")
    return driver.ipc_handle(address)


def _failure(error: WeightdError) -> bytes:
    parts = (error.metadata.get("code", ""), error.metadata.get("call", ""), error.message)
    return FAILED + "\0".join(parts).encode()[: MESSAGE_BYTES - 1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
