"""A checkpoint file as the loader sees it: opened by another process, and untrusted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time

from weightd import _failpoints
from weightd._references.index import MAX_JSON_BYTES, weight_map
from weightd.errors import FormatError, InvalidReferenceError
from weightd.types import FileIdentity, FileLayout
from weightd_daemon.formats import registry
from weightd_daemon.libc import filesystem_type

_LOCAL_FILESYSTEMS = {
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # xfs
    0x9123683E,  # btrfs
    0x01021994,  # tmpfs
    0xF2F52010,  # f2fs
    0x2FC12FC1,  # zfs
}
"""f_type of filesystems whose inode, size and times this kernel itself keeps."""

_CACHING_FILESYSTEMS = _LOCAL_FILESYSTEMS | {
    0x6969,  # NFS
    0x794C7630,  # overlayfs, which passes the advice on to what lies below
    0x73717368,  # squashfs
    0xE0F5E1E2,  # erofs
}
"""f_type of filesystems whose reads all go through the page cache, where bytes that were asked for ahead wait.

Others, such as FUSE, SMB and 9p, may read past it, as they or the mount say: bytes read ahead would be read twice.
"""

_ADVICE = 512 << 10
"""Bytes of one piece of advice: the kernel cuts longer ones at the disk's largest request or its own read-ahead."""

RESTED_SECONDS = 2
"""A file that is changed within this of its last change may get the same timestamps again, where ticks are long."""


def _identity(status: os.stat_result) -> FileIdentity:
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def rested(identity: FileIdentity, now_ns: int) -> bool:
    """Whether a change that is made now shows in the identity: its ctime would be another (decision 0019).

    The kernel sets ctime with each change, from the clock that `now_ns` is read from, and nobody else can. So this says
    nothing of how long ago the last change was, and a ctime of the future is as good as one of the past. mtime anybody
    can set to anything; what changes it changes ctime.
    """
    return abs(now_ns - identity.ctime_ns) >= RESTED_SECONDS * 1_000_000_000


class LoaderSource:
    """Source file opened by the loader. Every read is checked: a file that shrinks or changes meanwhile is an error.

    One of at most `hold` bytes is read whole as it is made: it is `held`, and needs its descriptor no longer.
    """

    def __init__(self, name: str, descriptor: int, *, hold: int | None = None) -> None:
        self.name = name
        self.descriptor = descriptor
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
            raise InvalidReferenceError(f"{name}: its descriptor is not open for reading")
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidReferenceError(f"{name}: is not a regular file")
        self.identity = _identity(status)
        self._links = status.st_nlink
        filesystem = filesystem_type(descriptor)
        self.trusted = filesystem in _LOCAL_FILESYSTEMS and rested(self.identity, time.time_ns())
        """Whether the identity stands for the content from now on (design: the digest index)."""
        self._caches = filesystem in _CACHING_FILESYSTEMS and not flags & os.O_DIRECT
        self._layout: FileLayout | None = None
        self._held: bytes | None = None
        if hold is not None and self.identity.size <= hold:
            content = self._read(0, self.identity.size)
            self.check_unchanged()
            self._held, self.descriptor = content, -1

    @property
    def held(self) -> bool:
        return self._held is not None

    def layout(self) -> FileLayout:
        """The checked tensor directory; the file's first bytes say its format. Errors: FormatError."""
        if self._layout is None:
            self._layout = registry.read_layout(self.name, self.identity.size, self._read)
        return self._layout

    def weight_map(self) -> dict[str, str]:
        """The file of each tensor, where this one is an index. Errors: FormatError, InvalidReferenceError."""
        return weight_map(self.name, self._read(0, MAX_JSON_BYTES + 1))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on. Errors: FormatError (it shrank, or cannot be read)."""
        if self._held is not None:
            buffer[:] = self._held[offset : offset + len(buffer)]
            return
        done = 0
        while done < len(buffer):
            try:
                _failpoints.reach("loader.read")
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise FormatError(f"{self.name}: cannot be read at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                raise FormatError(f"{self.name}: shrank while it was read (no byte at {offset + done}); load it again")
            done += count

    def read_cached(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on, as far as no read waits for a disk. Returns how many bytes that are.

        No byte may mean that the filesystem does not know without waiting, or that the file cannot be read there.
        """
        if self._held is not None:
            self.read_into(buffer, offset)
            return len(buffer)
        done = 0
        with contextlib.suppress(OSError):  # a read that may wait says what is wrong
            while done < len(buffer) and (
                count := os.preadv(self.descriptor, [buffer[done:]], offset + done, os.RWF_NOWAIT)
            ):
                done += count
        return done

    def will_need(self, offset: int, length: int) -> None:
        """Ask the kernel to read a range into the page cache without waiting for it; nothing is lost if it does not."""
        if self._caches and self._held is None:
            with contextlib.suppress(OSError):
                for start in range(offset, offset + length, _ADVICE):
                    os.posix_fadvise(
                        self.descriptor, start, min(_ADVICE, offset + length - start), os.POSIX_FADV_WILLNEED
                    )

    def check_unchanged(self) -> None:
        """Errors: FormatError when the file was changed since it was opened, or while it was read if it is held.

        A file that has lost a name meanwhile, because it was removed or another was renamed over it, has another ctime
        and the content that it had.
        """
        if self._held is not None:
            return
        status = os.fstat(self.descriptor)
        now = _identity(status)
        if status.st_nlink < self._links:
            now = now._replace(ctime_ns=self.identity.ctime_ns)
        if now != self.identity:
            raise FormatError(f"{self.name}: changed while it was read; load it again")

    def _read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(max(0, min(length, self.identity.size - offset)))
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)
