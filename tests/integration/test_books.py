"""The daemon's own books have a limit: tensors without bytes cost no device anything, and are paid for all the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from support.manager import Manager
from support.users import ALICE, needs_root, open_to_all, user_of
from support.worker import Worker
from weightd._sizes import size
from weightd_daemon.core.checkpoint import BYTES_OF_TENSOR

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
UNIT = 450
LEAST = UNIT * BYTES_OF_TENSOR
"""What that many tensors take at least: about 1 MiB."""


def empty(folder: Path, name: str, units: int = 1) -> Path:
    """A checkpoint of so many times 450 tensors without a byte, and one of four: who attaches holds something."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        f"{name}.{number}": ("F32", (0, 7), b"") for number in range(units * UNIT)
    }
    return checkpoints.write(folder / f"{name}.safetensors", {**tensors, "t": ("U8", (4,), name.ljust(4).encode()[:4])})


def load(daemon: Daemon, path: Path, **options: bool) -> None:
    """Load a checkpoint by a client that leaves, so that nothing waits to be attached."""
    with weightd.connect(daemon.socket, timeout=60) as client:
        client.load(path, name=path.stem, **options)  # type: ignore[arg-type]  # passed through
    eventually(lambda: not daemon.connect().leases())


def test_checkpoints_without_bytes_make_room_for_each_other(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(books="4MiB")
    client = daemon.connect()
    load(daemon, empty(tmp_path, "kept"), pin=True)
    for number in range(8):
        load(daemon, empty(tmp_path, f"m{number}"))
        stats = client.stats()
        assert stats.books is not None
        assert LEAST * stats.checkpoints <= stats.books.used_bytes <= stats.books.limit_bytes == 4 * MIB
    names = {name for checkpoint in client.checkpoints() for name in checkpoint.names}
    assert names == {"kept", "m6", "m7"}
    gone = [event.names[0] for event in client.events() if event.kind == "evicted"]
    assert gone == [f"m{number}" for number in range(6)]
    assert client.stats().devices[0].live_bytes == 3 * 4, "no device has anything of it"


def test_a_load_that_can_never_fit_is_refused_and_nobody_goes(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(books="3MiB")
    client = daemon.connect()
    load(daemon, empty(tmp_path, "m"))
    with pytest.raises(weightd.CapacityError, match="that is more than the whole limit; raise --books") as caught:
        client.load(empty(tmp_path, "large", 5))
    assert (caught.value.limit, caught.value.exit_code) == ("books", 5)
    assert [checkpoint.names for checkpoint in client.checkpoints()] == [("m",)]


def test_a_list_that_is_refused_does_not_come_at_all(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """What a daemon has taken in once it does not give back: Python keeps what lies between other things."""
    daemon = start_daemon(books="16MiB")
    client = daemon.connect()
    load(daemon, empty(tmp_path, "m"))
    before = daemon.rss()
    long = {f"{number:06}".ljust(300, "n"): ("F32", (0,), b"") for number in range(60_000)}
    with pytest.raises(weightd.CapacityError, match="the limit books is reached"):
        client.load(checkpoints.write(tmp_path / "long.safetensors", long))
    assert daemon.rss() < before + 10 * MIB


def test_what_is_attached_stays_and_the_next_load_is_refused(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(books="3MiB")
    client = daemon.connect()
    paths = [empty(tmp_path, name) for name in "ab"]
    for path in paths:
        load(daemon, path)
    with client.attach("a"), client.attach("b"):
        with pytest.raises(
            weightd.CapacityError,
            match=r"list of tensors needs (999 KiB|1\.\d\d MiB) of the daemon's own memory",
        ):
            client.load(empty(tmp_path, "c"))
        client.load(paths[0], name="again")  # what is resident needs nothing more
    eventually(lambda: not client.leases() or all(lease.waiting for lease in client.leases()))


def test_the_limit_can_change_and_outlives_a_restart(start_daemon: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "weightd.toml"
    file.write_text('books = "8MiB"\n')
    manager = Manager(tmp_path / "notify")
    daemon = start_daemon(config=file, manager=manager)
    for name in "abcd":
        load(daemon, empty(tmp_path, name))
    used = daemon.connect().stats().books
    assert used is not None
    daemon.kill()
    daemon.start()
    client = daemon.connect()
    assert client.stats().books == used
    file.write_text('books = "3MiB"\n')
    os.kill(daemon.pid, signal.SIGHUP)
    eventually(lambda: {name for c in client.checkpoints() for name in c.names} == {"c", "d"})
    client.close()


def test_stats_show_it(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(books="100MiB")
    load(daemon, empty(tmp_path, "m", 2))
    books = json.loads(daemon.command("stats", "--format", "json").stdout)["books"]
    assert books["limit_bytes"] == 100 * MIB
    assert 2 * LEAST < books["used_bytes"] < 3 * LEAST
    line = f"books {size(books['used_bytes'])} of 100 MiB: the daemon's own memory for lists of tensors"
    assert line in daemon.command("stats").stdout


def test_a_limit_is_there_by_itself(daemon: Daemon) -> None:
    books = daemon.connect().stats().books
    assert books is not None
    assert books.limit_bytes == 256 * MIB, "a tenth of the budget would be less"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read; pytest's own are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="weightd-books-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@needs_root
def test_they_count_in_what_a_user_may_have(
    start_daemon: StartDaemon, spawn: Callable[[Daemon], Worker], folder: Path
) -> None:
    daemon = open_to_all(start_daemon, max_user_bytes="3MiB")
    alice = user_of(spawn(daemon), ALICE)
    results = [
        alice.run("result = load(path, name=name)", path=str(empty(folder, name)), name=name)
        for name in ("a", "b", "c")
    ]
    assert results[:2] == [["a"], ["b"]]
    kind, message = results[2]
    assert (kind, message.startswith(f"the limit max_user_bytes is reached: uid {ALICE} has 2.")) == (
        "CapacityError", True
    ), message  # fmt: skip
