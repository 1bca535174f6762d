"""The handle socket, spoken by hand: to say what our client never would."""

from __future__ import annotations

import array
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from weightd._proto.v1 import handles_pb2
from weightd._references.files import OpenedReference
from weightd.types import FileIdentity, SourceFile


class Peer:
    """One connection on a daemon's handle socket. Descriptors that arrive are kept in `descriptors` until the end."""

    def __init__(self, control: str | Path, *, hello: bool = True, read_only: bool = False) -> None:
        self.descriptors: list[int] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(60)
        self.socket.connect(f"{control}.handles")
        greeting = handles_pb2.HelloRequest(protocol=1, read_only=read_only)
        self.token = self.ask(hello=greeting).hello.token if hello else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up and close what arrived."""
        self.socket.close()
        while self.descriptors:
            os.close(self.descriptors.pop())

    def send(self, **body: object) -> None:
        """Send a request."""
        self.socket.send(handles_pb2.HandleRequest(**body).SerializeToString())  # type: ignore[arg-type]  # any field

    def receive(self) -> handles_pb2.HandleReply:
        """The next reply. Errors: ConnectionError when the daemon has hung up."""
        data, received, flags, _ = socket.recv_fds(self.socket, 65536, 253)
        self.descriptors += received
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        if not data:
            raise ConnectionResetError("the daemon hung up")
        return handles_pb2.HandleReply.FromString(data)

    def ask(self, **body: object) -> handles_pb2.HandleReply:
        """Send a request and return its reply."""
        self.send(**body)
        return self.receive()

    def is_closed(self) -> bool:
        """Whether the daemon hangs up (waits a while for it)."""
        try:
            while True:
                self.receive()
        except ConnectionError:
            return True
        except TimeoutError:
            return False


def send_with(sock: socket.socket, data: bytes, descriptors: list[int]) -> None:
    """Send a message with descriptors."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))])


def opened_as(descriptor: int, source: SourceFile) -> OpenedReference:
    """A descriptor as the file that somebody says that it is."""
    opened = OpenedReference(())
    opened.fds, opened.sources, opened._paths = (descriptor,), (source,), (Path(source.file),)
    return opened


def source_of(descriptor: int, file: str = "m.safetensors") -> SourceFile:
    """What a client announces of an open descriptor, whatever it is."""
    seen = os.fstat(descriptor)
    identity = FileIdentity(seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
    return SourceFile("", file, identity)
