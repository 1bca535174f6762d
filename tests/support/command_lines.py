"""What a process has to execute to have a command line of gigabytes, and to connect with it."""

from __future__ import annotations

HUGE = 256 << 20

# Says where the kernel finds the command line (PR_SET_MM_MAP, which needs no privilege): memory that is never written,
# so it costs nothing.
HUGE_LINE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
names = "start_code end_code start_data end_data start_brk brk start_stack arg_start arg_end env_start env_end auxv"

class Map(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in names.split()]
    _fields_ += [("auxv_size", ctypes.c_uint32), ("exe_fd", ctypes.c_uint32)]

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
start = libc.mmap(None, size, 1, 0x4022, -1, 0)  # to read; private, anonymous, not reserved
fields = open("/proc/self/stat").read().rpartition(")")[2].split()
of = lambda number: int(fields[number - 3])
places = Map(*map(of, (26, 27, 45, 46, 47, 47, 28)), start, start + size, of(50), of(51), 0, 0, 0xFFFFFFFF)
failed = libc.prctl(35, 14, ctypes.byref(places), ctypes.sizeof(places), 0)
result = os.strerror(ctypes.get_errno()) if failed else ""
"""
CONNECT = """
from support.wire import Peer
import weightd
peers = [Peer(path) for _ in range(times)]
"""
