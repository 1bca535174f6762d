"""HTTP/2 spoken by hand: a client that lets the server send no byte of an answer, which no gRPC library does."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE = 4


class Unreading:
    """A connection to a control socket with a flow-control window of `window` bytes for each answer."""

    def __init__(self, path: Path, window: int = 0) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        self._streams = iter(range(1, 1 << 30, 2))
        self._received = b""
        window_setting = struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, 0, window_setting))
        while self._next()[0] != _SETTINGS:
            pass
        self.socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def call(self, method: str, message: bytes, token: str = "") -> int:
        """Begin a call of "/weightd.v1.Service/Method". Returns the number of its stream."""
        stream = next(self._streams)
        pairs = {
            ":method": "POST", ":scheme": "http", ":path": method, ":authority": "x", "te": "trailers",
            "content-type": "application/grpc", **({"weightd-token": token} if token else {}),
        }  # fmt: skip
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs.items())
        body = b"\0" + struct.pack(">I", len(message)) + message
        self.socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, block) + _frame(_DATA, _END_STREAM, stream, body))
        return stream

    def read(self, stream: int) -> bytes:
        """Let answers come from now on. Returns the headers at the end of a stream, as they are on the wire."""
        self.socket.sendall(_frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, 1 << 20)))
        while True:
            kind, flags, number, body = self._next()
            if (kind, number) == (_HEADERS, stream) and flags & _END_STREAM:
                return body

    def _next(self) -> tuple[int, int, int, bytes]:
        """The next frame: type, flags, stream, body. Errors: ConnectionError, TimeoutError."""
        head = self._take(9)
        return head[3], head[4], int.from_bytes(head[5:]) & 0x7FFFFFFF, self._take(int.from_bytes(head[:3]))

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the server has hung up")
            self._received += data
        taken, self._received = self._received[:size], self._received[size:]
        return taken


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + body


def _text(text: str) -> bytes:
    """A string literal of HPACK, without Huffman's code."""
    assert len(text) < 127
    return bytes((len(text),)) + text.encode()
