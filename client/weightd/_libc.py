"""Calls of libc, and access to raw memory: the library's only use of ctypes, except for CUDA handles.

Python's own mmap would keep a descriptor for each mapping, and unmaps when it likes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any, Final

_MAP_FIXED: Final = 0x10
_PROT_NONE: Final = 0
_MAP_NORESERVE: Final = 0x4000
_MADV_POPULATE_READ: Final = 22
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

unmap: Final[Callable[[int, int], int]] = _libc.munmap
"""Unmap `size` bytes at an address. Needs no other name of this module, so that it works at the interpreter's end."""


def reserve(size: int, alignment: int) -> int:
    """Reserve addresses for `map_private`: `size` bytes from a multiple of `alignment` on, both whole pages.

    They are given back by `unmap`. Errors: OSError.
    """
    most = size + alignment - mmap.PAGESIZE
    found = _map(None, most, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    address = -(-found // alignment) * alignment
    for start, stop in ((found, address), (address + size, found + most)):
        if start < stop:
            unmap(start, stop - start)
    return address


def map_private(descriptor: int, size: int, *, writable: bool, at: int | None = None) -> int:
    """Map `size` bytes of a file copy-on-write, without reserving memory for copies. Returns the address.

    `at` is an address in what `reserve` gave. Errors: OSError.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE | (0 if at is None else _MAP_FIXED)
    return _map(at, size, protection, flags, descriptor)


def _map(at: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    # ctypes would pass on the lowest bits, and fewer bytes would be reserved than are mapped then.
    if size > sys.maxsize:
        raise OSError(errno.ENOMEM, f"mapping {size} bytes failed: {os.strerror(errno.ENOMEM)}")
    address = _libc.mmap(at, size, protection, flags, descriptor, 0)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"mapping {size} bytes failed: {os.strerror(code)}")
    return int(address)


def populate_read(address: int, size: int) -> None:
    """Read-fault every page of a mapped range that begins with a page, in one call. Errors: OSError."""
    if _libc.madvise(address, size, _MADV_POPULATE_READ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def view_at(address: int, size: int, keeps: object = None) -> memoryview:
    """Return a view of the `size` bytes at an address. It, and every slice of it, keeps `keeps`."""
    array: Any = (ctypes.c_ubyte * size).from_address(address)
    array.keeps = keeps
    return memoryview(array).cast("B")


def address_of(buffer: bytearray | memoryview | mmap.mmap) -> int:
    """Return the address of a writable buffer's first byte. The caller keeps the buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
