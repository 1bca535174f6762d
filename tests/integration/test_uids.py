"""Users whose numbers need all 32 bits, as those of containers with subordinate uids do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import checkpoints
from support.daemon import Daemon, eventually
from support.users import ALICE, needs_root, open_to_all
from support.worker import Worker

pytestmark = needs_root

StartDaemon = Callable[..., Daemon]
User = Callable[[Daemon, int], Worker]
HIGH = 3_000_000_000


@pytest.fixture
def folder(short_path: Path) -> Path:
    """A folder that every user can read; pytest's own are closed to others."""
    short_path.chmod(0o755)
    return short_path


def test_a_user_of_a_high_number_does_all_that_others_do(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon)
    paths = [checkpoints.write_random(folder / f"{name}.safetensors", 2, 1 << 16, seed=name) for name in ("a", "b")]
    daemon.command("load", paths[0], "--name", "a")
    high, other = user(daemon, HIGH), user(daemon, ALICE)
    assert high.run("result = load(path, name='mine')", path=str(paths[0])) == ["a", "mine"]  # it is resident
    assert high.run("result = load(path, name='b')", path=str(paths[1])) == ["b"]  # it is read
    assert high.run("held = client.attach('b'); client.pin('b'); result = len(held.tensors)") == 2
    assert other.run("result = attempt(client.unpin, 'b')")[0] == "PermissionDeniedError"
    assert other.run("result = attempt(client.remove, 'mine')")[0] == "PermissionDeniedError"
    for worker in (high, other):
        owners = {info.names[0]: info.owner_uid for info in daemon.connect().checkpoints()}
        assert owners["b"] == HIGH
        assert worker.run("result = [lease.uid for lease in client.leases() if not lease.waiting]") == [HIGH]
    assert HIGH in {event.uid for event in daemon.connect().events()}
    for command in ("ls", "ps", "stats"):
        daemon.command(command)
    assert f"uid {HIGH}" in daemon.command("inspect", "b").stdout
    high.run("held.close()")
    client = daemon.connect()
    eventually(lambda: all(lease.waiting for lease in client.leases()))
    high.run("client.unpin('b'); client.remove('b')")


def test_a_name_of_such_a_user_is_listed_like_any_other(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon)
    path = checkpoints.write_random(folder / "a.safetensors", 1, 1 << 16)
    daemon.command("load", path, "--name", "z")
    assert user(daemon, HIGH).run("result = load(path, name='a')", path=str(path)) == ["a", "z"]
    assert {"a", "z"} <= set(daemon.command("inspect", "z").stdout.replace(",", " ").split())
    for command in (["ls"], ["pin", "z"], ["unpin", "z"], ["rm", "a"]):
        daemon.command(*command)


def test_such_a_user_can_be_an_admin(start_daemon: StartDaemon, user: User, folder: Path) -> None:
    daemon = open_to_all(start_daemon, admins=str(HIGH))
    path = checkpoints.write_random(folder / "a.safetensors", 1, 1 << 16)
    daemon.command("load", path, "--name", "a")
    user(daemon, HIGH).run("client.remove('a')")
