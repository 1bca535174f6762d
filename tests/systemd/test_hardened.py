"""The daemon, its loader and its holder live with the restrictions of weightd.service that the kernel alone keeps.

What systemd itself sets up (folders, devices, users, networks) is not tried here; see support/hardened.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import StartDaemon
from support import checkpoints, gguf_files
from support.backends import EVERY, Backend
from support.daemon import ROOT, WATCHED, environment
from support.hardened import CANNOT

HARDENED = [sys.executable, "-m", "support.hardened", str(ROOT / "systemd" / "weightd.service")]
MIB = 1 << 20
FORBIDDEN = """
import ctypes, mmap, os, socket
for attempt in (
    lambda: socket.socket(socket.AF_INET),
    lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC),
    lambda: os.chroot("/"),
):
    try:
        attempt()
    except OSError as error:
        print(type(error).__name__)
socket.socket(socket.AF_UNIX)
"""


@pytest.fixture(autouse=True, scope="module")
def able() -> None:
    done = subprocess.run(
        [*HARDENED, "true"], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode == CANNOT:
        pytest.skip(
            f"needs systemd-analyze, libseccomp (Debian: apt install systemd) and Linux 6.3: {done.stderr.strip()}"
        )
    assert done.returncode == 0, done.stderr


def test_the_restrictions_bite() -> None:
    command = [*HARDENED, sys.executable, "-c", FORBIDDEN]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["OSError", "PermissionError", "PermissionError"], done.stderr


@pytest.mark.backends(*EVERY, double_only=True)
def test_everything_works_under_them(start_daemon: StartDaemon, backend: Backend, tmp_path: Path) -> None:
    daemon = start_daemon(argv=[*HARDENED, *WATCHED])
    client = daemon.connect()
    path = checkpoints.write_random(tmp_path / "m.safetensors", 3, MIB)
    client.load(path, name="mine")
    assert client.verify().done_blobs == 3
    with client.attach("mine"):
        (lease,) = client.leases()
        assert lease.command, "it must see who its clients are"
    assert client.load(gguf_files.smollm2()).total_bytes > MIB  # with numpy in the loader
