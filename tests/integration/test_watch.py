"""`Client.watch`: a name that moves, goes, comes, loses its content and has it again, also beyond a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.background import background
from support.daemon import Daemon
from support.manager import Manager
from weightd.types import NameInfo

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20


def load(daemon: Daemon, path: Path, name: str) -> str:
    """Load a file by a client that leaves at once, so that nothing is leased. Returns the digest."""
    with weightd.connect(daemon.socket, timeout=60) as client:
        return client.load(path, name=name).content_digest


class Watched:
    """What comes of a watch, one by one."""

    def __init__(self, changes: Iterator[NameInfo | None]) -> None:
        self._changes = changes

    def next(self) -> tuple[str, str] | None:
        """Digest and state of the next change; None where the name has gone. Waits for it, a minute at most."""
        now = background(next, self._changes).result(60)
        return None if now is None else (now.content_digest, now.state)


def test_a_name_moves_goes_and_comes(daemon: Daemon, tmp_path: Path) -> None:
    files = [checkpoints.write_random(tmp_path / f"{name}.safetensors", 2, MIB, seed=name) for name in "ab"]
    with daemon.connect() as client, daemon.connect() as watching:
        early = background(next, watching.watch("prod"))
        a = load(daemon, files[0], "prod")
        now = early.result(60)
        assert now is not None
        assert (now.name, now.content_digest, now.state) == ("prod", a, "resident")
        prod = Watched(watching.watch("prod"))
        assert prod.next() == (a, "resident"), "at once"
        load(daemon, files[0], "other")
        client.remove("other")  # of another name: nothing to tell
        b = load(daemon, files[1], "prod")
        assert prod.next() == (b, "resident")
        client.remove("prod")
        assert prod.next() is None
        load(daemon, files[0], "prod")
        assert prod.next() == (a, "resident")


def test_content_that_is_evicted_and_loaded_again(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(budget="8MiB", pool="0")
    small = checkpoints.write_random(tmp_path / "s.safetensors", 2, MIB, seed="s")
    large = checkpoints.write_random(tmp_path / "l.safetensors", 7, MIB, seed="l")
    with daemon.connect() as watching:
        load(daemon, small, "prod")
        prod = Watched(watching.watch("prod"))
        digest, state = prod.next() or ("", "")
        assert state == "resident"
        load(daemon, large, "large")
        assert prod.next() == (digest, "evicted")
        load(daemon, small, "prod")
        assert prod.next() == (digest, "resident")


def test_a_watch_goes_on_after_a_restart(start_daemon: StartDaemon, short_path: Path) -> None:
    manager = Manager(short_path / "notify")
    try:
        follow_beyond_a_restart(start_daemon(manager=manager), short_path)
    finally:
        manager.close()


def follow_beyond_a_restart(daemon: Daemon, short_path: Path) -> None:
    files = [checkpoints.write_random(short_path / f"{name}.safetensors", 2, MIB, seed=name) for name in "ab"]
    with daemon.connect() as client, daemon.connect() as watching:
        kept, moved = Watched(watching.watch("kept")), Watched(watching.watch("moved"))
        a = load(daemon, files[0], "kept")
        load(daemon, files[0], "moved")
        assert kept.next() == moved.next() == (a, "resident")
        daemon.kill()
        daemon.start()
        b = load(daemon, files[1], "moved")
        assert moved.next() == (b, "resident")
        client.remove("kept")
        assert kept.next() is None, "it was what it had been, and nothing was to be told until now"


def test_a_watch_ends_with_its_client_and_takes_no_name_that_cannot_be(daemon: Daemon) -> None:
    client = daemon.connect()
    with pytest.raises(weightd.InvalidReferenceError, match="at least one character"):
        client.watch("")
    waiting = background(next, client.watch("prod"))
    client.close()
    with pytest.raises(weightd.InvalidReferenceError, match="closed"):
        waiting.result(60)
    with pytest.raises(weightd.InvalidReferenceError, match="closed"):
        client.watch("prod")
