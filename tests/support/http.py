"""A monitor that speaks HTTP by hand, over a Unix socket or a port: to say what no library would."""

from __future__ import annotations

import re
import socket
from pathlib import Path

Address = Path | tuple[str, int]


def dial(address: Address) -> socket.socket:
    """A connection."""
    if isinstance(address, Path):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(60)
        try:
            connection.connect(str(address))
        except OSError:
            connection.close()
            raise
        return connection
    return socket.create_connection(address, timeout=60)


def everything(connection: socket.socket) -> bytes:
    """What comes until the end; b"" where the other side has hung up on us."""
    received = bytearray()
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionError:
        return b""
    return bytes(received)


def ask(address: Address, request: bytes) -> tuple[int, dict[str, str], str]:
    """Send bytes; status, headers (names in lower case) and body of the answer."""
    with dial(address) as connection:
        connection.sendall(request)
        head, _, body = everything(connection).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    found = re.fullmatch(r"HTTP/1\.1 (\d{3}) .+", first)
    assert found, first
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert int(headers["content-length"]) == len(body)
    return int(found[1]), headers, body.decode()


def get(address: Address, path: str) -> tuple[int, str]:
    """Status and body of a page."""
    status, _, body = ask(address, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return status, body


def samples(text: str) -> dict[str, float]:
    """The samples of a metrics page, by name with labels as they stand there."""
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}
