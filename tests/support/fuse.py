"""A file whose reads are never answered from some byte on, as those of a dead NFS or FUSE server.

It is a FUSE file system with one file, spoken by hand: a process that waits for it must hang for as long as the test
wants, and no longer. So the mount lies in a mount namespace of the server's own. It is gone with the server, which is
leashed to the test. Clients look there through `nsenter`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.daemon import PATIENCE, environment
from support.leash import leashed

_HEADER = struct.Struct("<IIQQIIII")
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH = 1, 2, 3, 14, 15, 18, 25
_INIT, _INTERRUPT, _BATCH_FORGET, _STATFS = 26, 36, 42, 17
_DIRECT_IO = 1
_NEWNS, _MS_PRIVATE, _MS_REC = 0x20000, 1 << 18, 1 << 14
_FOLDER, _FILE = 1, 2
NAME = "f.safetensors"


class HangingFile:
    """The file, at `path` as those see it that `command` runs. The server ends with `abort`, and so do all reads."""

    def __init__(self, folder: Path, content: Path, hangs_at: int, *, cached: bool) -> None:
        self.path = folder / NAME
        self._reads = folder.with_name(folder.name + "-reads")
        self._server = subprocess.Popen(
            leashed([
                sys.executable, "-m", "support.fuse", str(folder), str(content), str(hangs_at), str(self._reads),
                str(int(cached)),
            ]),
            stdout=subprocess.PIPE, bufsize=0, env=environment(),
        )  # fmt: skip
        line = self._said()
        if line != "up":
            self.abort()
            pytest.skip(f"NOT TESTED: FUSE cannot be used here: {line or 'its server ended'}")

    def wait_until_it_hangs(self) -> None:
        """Wait for a read that is not answered. One that is may take a while, and looks the same from outside."""
        assert self._server.stdout is not None
        assert select.select([self._server.stdout], [], [], PATIENCE)[0], "nobody reads so far"
        assert self._said() == "hangs"

    def _said(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().decode(errors="replace").strip()

    def command(self, argv: Sequence[str]) -> list[str]:
        """What runs a command so that it sees the file."""
        return ["nsenter", f"--mount=/proc/{self._server.pid}/ns/mnt", "--", *argv]

    def reads(self) -> list[tuple[int, int]]:
        """(offset, size) of the reads that the server was asked for, in their order."""
        lines = [line.split() for line in self._reads.read_text().splitlines()]
        return [(int(offset), int(size)) for offset, size in lines]

    def abort(self) -> None:
        """End the server. The kernel answers all that it has not: who waits for it can end."""
        self._server.send_signal(signal.SIGKILL)
        self._server.wait(60)
        assert self._server.stdout is not None
        self._server.stdout.close()


@contextmanager
def hanging_file(folder: Path, content: Path, hangs_at: int, *, cached: bool = False) -> Iterator[HangingFile]:
    """A file with the bytes of `content`, of which those from `hangs_at` on are never answered. Skips without FUSE.

    Reads go past the page cache unless it is `cached`.
    """
    for reason, missing in (
        ("only root can mount", os.geteuid() != 0),
        ("there is no /dev/fuse", not Path("/dev/fuse").exists()),
        ("nsenter is missing", shutil.which("nsenter") is None),
    ):
        if missing:
            pytest.skip(f"NOT TESTED: FUSE cannot be used here: {reason}")
    folder.mkdir()
    file = HangingFile(folder, content, hangs_at, cached=cached)
    try:
        yield file
    finally:
        file.abort()


def main() -> None:
    """Mount, say so, and serve until killed."""
    folder, content, hangs_at = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3])
    reads, cached = os.open(sys.argv[4], os.O_WRONLY | os.O_CREAT, 0o600), bool(int(sys.argv[5]))
    libc = ctypes.CDLL(None, use_errno=True)

    def call(code: int, what: str) -> None:
        if code:
            sys.exit(print(f"{what}: {os.strerror(ctypes.get_errno())}", flush=True))

    call(libc.unshare(_NEWNS), "unshare")
    call(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "private mounts")
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40755,user_id=0,group_id=0,allow_other".encode()
    call(libc.mount(b"weightd-test", os.fsencode(folder), b"fuse", 0, options), "mount")
    print("up", flush=True)
    while True:
        request = os.read(device, 1 << 20)
        _, code, unique, node, *_ = _HEADER.unpack_from(request)
        body = request[_HEADER.size :]
        if code == _READ:
            os.write(reads, "{} {}\n".format(*struct.unpack_from("<QI", body, 8)).encode())
        answer = _answer(code, node, body, content, hangs_at)
        if code == _OPEN and cached:
            answer = 0, struct.pack("<QII", 1, 0, 0)
        if answer is not None:
            number, body = answer
            os.write(device, struct.pack("<IiQ", 16 + len(body), -number, unique) + body)
        elif code == _READ:
            print("hangs", flush=True)


def _answer(code: int, node: int, body: bytes, content: bytes, hangs_at: int) -> tuple[int, bytes] | None:
    """The error number and body of an answer; None if there is none."""
    if code == _INIT:
        return 0, struct.pack("<IIIIHHIIHHI", 7, 31, 1 << 16, 0, 12, 10, 1 << 16, 1, 16, 0, 0) + bytes(28)
    if code == _LOOKUP:
        if body.rstrip(b"\0") != NAME.encode():
            return errno.ENOENT, b""
        return 0, struct.pack("<QQQQII", _FILE, 1, 1000, 1000, 0, 0) + _attributes(_FILE, len(content))
    if code == _GETATTR:
        return 0, struct.pack("<QII", 1000, 0, 0) + _attributes(node, len(content))
    if code == _OPEN:  # past the page cache: who waits there for a read can be killed
        return 0, struct.pack("<QII", 1, _DIRECT_IO, 0)
    if code == _READ:
        _, offset, size = struct.unpack_from("<QQI", body)
        return None if offset + size > hangs_at else (0, content[offset : offset + size])
    if code == _STATFS:  # the kernel adds which kind of filesystem it is
        return 0, bytes(80)
    if code in (_FORGET, _INTERRUPT, _BATCH_FORGET):
        return None
    return (0, b"") if code in (_RELEASE, _FLUSH) else (errno.ENOSYS, b"")


def _attributes(node: int, size: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == _FOLDER else stat.S_IFREG | 0o444
    length = 0 if node == _FOLDER else size
    return struct.pack(
        "<QQQQQQIIIIIIIIII", node, length, -(-length // 512), 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
    )


if __name__ == "__main__":
    main()
