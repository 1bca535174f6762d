"""`weightd verify --books`: what it compares, and that it finds memory and locks that the books do not know."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.users import needs_root, user_of
from support.worker import Worker
from weightd.inspection import BooksFigure

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]
MIB = 1 << 20
_PUNCH_HOLE = 0x3  # FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE


def figures(client: weightd.Client) -> dict[str, BooksFigure]:
    return {figure.what: figure for figure in client.check_books()}


def descriptors(daemon: Daemon, name: str) -> list[Path]:
    """The daemon's descriptors of memfds with such a name."""
    found = Path(f"/proc/{daemon.pid}/fd").iterdir()
    return [path for path in found if re.match(rf"/memfd:{name}\b", os.readlink(path))]


@pytest.mark.backends("host", "cuda_vmm", "cuda_ipc")
def test_books_agree_while_something_is_held_and_after_it_went(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a.safetensors", 3, MIB), name="a")
    with client.attach("a"), client.attach("a"):
        found = figures(client)
        assert all(figure.agrees for figure in found.values()), found
        assert (found["leases"].books, found["leases"].found) == (2, 2)
        assert (found["manifests"].books, found["manifests"].found) == (1, 1)
        assert found["memory"].books >= 3 * MIB
        assert found["memory"].found is None or found["memory"].found >= found["memory"].books
    client.remove("a")
    found = figures(client)
    assert all(figure.agrees for figure in found.values()), found
    assert (found["leases"].found, found["manifests"].found) == (0, 0)


def test_the_command_prints_them_and_exits_with_0(daemon: Daemon) -> None:
    done = daemon.command("verify", "--books")
    assert re.search(r"^daemon +leases +0 +0 +yes +kernel locks$", done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.rstrip().endswith("figures agree")
    rows = json.loads(daemon.command("verify", "--books", "--format=json").stdout)
    assert {row["what"] for row in rows} == {"segments", "memory", "manifests", "leases"}
    assert json.loads(daemon.command("verify", "--format=json").stdout) == {"blobs": 0, "bytes": 0}
    refused = daemon.command("verify", "base", "--books", check=False)
    assert (refused.returncode, "leave REF" in refused.stderr) == (2, True), refused.stderr


@needs_root
def test_memory_that_is_gone_is_found(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a.safetensors", 2, MIB), name="a")
    (path, *_) = descriptors(daemon, r"weightd-\d+")
    with path.open("r+b", buffering=0) as file:
        assert not ctypes.CDLL(None, use_errno=True).fallocate(
            file.fileno(), _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(MIB)
        )
    found = figures(client)["memory"]
    assert not found.agrees
    assert (found.books, found.found) == (found.books, found.books - MIB)
    done = daemon.command("verify", "--books", check=False)
    assert done.returncode == 1
    assert re.search(r"^host +memory .* NO +memfds", done.stdout, re.MULTILINE), done.stdout
    assert "1 of 4 figures do not agree" in done.stdout


@needs_root
def test_a_lock_that_no_lease_is_for_is_found(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a.safetensors", 2, MIB), name="a")
    with client.attach("a"):
        (path, *_) = descriptors(daemon, "weightd-lease")
        with path.open("rb", buffering=0) as file:
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 123_456, 1, 0)
            fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, lock)
            found = figures(client)["leases"]
            assert (found.books, found.found, found.agrees) == (1, 2, False)
        eventually(lambda: figures(client)["leases"].agrees, what="the lock has gone")


@needs_root
def test_other_users_may_not_ask(start_daemon: StartDaemon, spawn: Spawn) -> None:
    daemon = start_daemon(socket_mode="0666")
    daemon.folder.chmod(0o755)
    worker = spawn(daemon)
    user_of(worker, 54321)
    with pytest.raises(AssertionError, match="only admins may check the books"):
        worker.run("client.check_books()")
