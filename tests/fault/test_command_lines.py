"""Peers whose command lines are what they like: gigabytes, or never to be read. It is theirs to say how long one is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import checkpoints
from support.daemon import Daemon, eventually
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20
HUGE = 256 * MIB

# Says where the kernel finds the command line (PR_SET_MM_MAP, which needs no privilege): memory that is never written,
# so it costs nothing.
_HUGE = """
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
_CONNECT = """
from support.wire import Peer
import weightd
peers = [Peer(path) for _ in range(times)]
"""


def test_a_huge_one_costs_nothing(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    """A read of all of it took 5 s of the loop and 2.3 GB; the watch of the loop is looked at in the end."""
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "m.safetensors", 1, 1000), name="m")
    worker = spawn(daemon)
    if refused := worker.run(_HUGE, size=HUGE):
        pytest.skip(f"no process can choose its command line here: {refused}")
    assert len(Path(f"/proc/{worker.pid}/cmdline").read_bytes()) == HUGE
    before = daemon.rss()
    worker.run(_CONNECT, path=str(daemon.socket), times=20)
    worker.run("client = weightd.connect(path, timeout=60.0); attachment = client.attach('m')", path=str(daemon.socket))
    leases = [lease for lease in client.leases() if lease.pid == worker.pid]
    assert [lease.command for lease in leases] == [Path(f"/proc/{worker.pid}/comm").read_text().strip()]
    grown = daemon.rss() - before
    assert grown < 20 * MIB, f"{grown / MIB:.1f} MiB"
    worker.run("attachment.close()")
    eventually(lambda: not [lease for lease in client.leases() if lease.pid == worker.pid])
