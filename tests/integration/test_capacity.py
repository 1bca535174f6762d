"""What fits and what goes: the budget, sharing beyond it, eviction in order, refusals with numbers, the pool."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.background import background
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.loader import STOP, resume, wait_stopped
from weightd.types import DeviceStats

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20

everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")


def make(folder: Path, name: str, count: int, shared: Mapping[int, object] | None = None) -> Path:
    """A checkpoint of `count` tensors of 1 MiB."""
    return checkpoints.write_random(folder / f"{name}.safetensors", count, MIB, seed=name, shared=shared)


def load(daemon: Daemon, path: Path, **options: bool) -> weightd.LoadResult:
    """Load, and leave: nothing keeps it but its name."""
    with weightd.connect(daemon.socket, timeout=20) as client:
        report = client.load_report(path, name=path.stem, **options)
    assert report is not None
    eventually(lambda: not any(lease.waiting for lease in daemon.connect().leases()))
    return report


def names(client: weightd.Client) -> list[str]:
    return sorted(checkpoint.name for checkpoint in client.checkpoints())


def books(client: weightd.Client) -> DeviceStats:
    (device,) = client.stats().devices
    return device


@everywhere
def test_exceeds_the_budget_but_its_new_bytes_fit(start_daemon: StartDaemon, backend: Backend, tmp_path: Path) -> None:
    daemon = start_daemon(budget="24MiB", pool=0)
    client = daemon.connect()
    base = load(daemon, make(tmp_path, "base", 20))
    with client.attach("base") as held:  # so that it cannot make room
        tuned = load(daemon, make(tmp_path, "tuned", 22, shared={i: ("base", i) for i in range(1, 20)}))
        assert (base.unique_bytes, tuned.total_bytes, tuned.unique_bytes) == (20 * MIB, 22 * MIB, 3 * MIB)
        assert books(client).used_bytes <= 23 * MIB + backend.page
        assert daemon.allocates(0, 23 * MIB * 1.02 + backend.page)
        with client.attach("tuned") as attachment:
            for i in range(22):
                seed = "base" if 1 <= i < 20 else "tuned"
                assert content(attachment, f"t{i}") == checkpoints.random_bytes((seed, i), MIB)
                if i < 20:
                    assert content(held, f"t{i}") == checkpoints.random_bytes(("base", i), MIB)
    assert client.stats().evictions == 0


@everywhere
def test_eviction_takes_the_least_recently_used_that_nobody_keeps(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(budget="20MiB", pool=0)
    client = daemon.connect()
    for name in ("pinned", "leased", "first", "second", "third"):
        load(daemon, make(tmp_path, name, 4), pin=name == "pinned")
    attachment = client.attach("leased")
    client.attach("first").close()  # used last, though loaded first
    eventually(lambda: [lease.checkpoint for lease in client.leases()] == ["leased"])
    load(daemon, make(tmp_path, "fourth", 4))
    assert names(client) == ["first", "fourth", "leased", "pinned", "third"]
    load(daemon, make(tmp_path, "fifth", 6))
    assert names(client) == ["fifth", "fourth", "leased", "pinned"]
    assert client.stats().evictions == 3
    with client.attach("pinned") as pinned:
        for i in range(4):
            assert content(attachment, f"t{i}") == checkpoints.random_bytes(("leased", i), MIB)
            assert content(pinned, f"t{i}") == checkpoints.random_bytes(("pinned", i), MIB)
    attachment.close()


def test_looking_changes_nothing_of_who_goes_first(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(budget="12MiB", pool=0)
    client = daemon.connect()
    files = [make(tmp_path, name, 4) for name in ("first", "second", "third")]
    checkpoints.rest(*files)  # or the daemon would not know them by their files
    for file in files:
        load(daemon, file)
    for look in (["inspect", "first"], ["inspect", "first", "--tensors"], ["inspect", files[0]],
                 ["ls"], ["ps"], ["stats"], ["verify"], ["plan", files[0]]):  # fmt: skip
        daemon.command(*look)
    client.attach("first", manifest_only=True).close()
    eventually(lambda: client.leases() == [])
    load(daemon, make(tmp_path, "fourth", 4))
    assert names(client) == ["fourth", "second", "third"]


def test_looking_at_what_was_loaded_does_not_let_it_go(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """What a client has loaded waits for its first attach; a look at the manifest is none."""
    daemon = start_daemon(budget="8MiB", pool=0)
    client = daemon.connect()
    client.load(make(tmp_path, "mine", 6), name="mine")
    client.attach("mine", manifest_only=True).close()
    with weightd.connect(daemon.socket) as other, pytest.raises(weightd.CapacityError):
        other.load(make(tmp_path, "other", 6))
    client.attach("mine").close()


@everywhere
def test_refusal_has_numbers_and_evicts_nothing(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(budget="16MiB", pool=0)
    client = daemon.connect()
    load(daemon, make(tmp_path, "pinned", 2), pin=True)
    load(daemon, make(tmp_path, "leased", 4))
    load(daemon, make(tmp_path, "plain", 6))
    large = make(tmp_path, "large", 12)
    with client.attach("leased"):
        with pytest.raises(
            weightd.CapacityError, match=r"free, .* evictable, .* pinned, .* leased, of a budget of .*; remove or unpin"
        ) as caught:
            client.load(large)
        error = caught.value
        assert 12 * MIB <= error.requested_bytes <= 12 * MIB + 8192
        assert (error.free_bytes, error.evictable_bytes) == (4 * MIB, 6 * MIB)
        assert (error.pinned_bytes, error.leased_bytes) == (2 * MIB, 4 * MIB)
        failed = daemon.command("load", large, check=False)
        assert (failed.returncode, failed.stdout) == (5, "")
        assert names(client) == ["leased", "pinned", "plain"]
        assert client.stats().evictions == 0
        client.unpin("pinned")
    eventually(lambda: client.leases() == [])
    load(daemon, large)
    assert "large" in names(client)


def marked(folder: Path, lengths: list[int]) -> Path:
    """A checkpoint whose first tensor stops a loader that reads it."""
    tensors = {
        f"t{i}": ("U8", (length,), (STOP if i == 0 else b"").ljust(length, b"%d" % i))
        for i, length in enumerate(lengths)
    }
    return checkpoints.write(folder / "marked.safetensors", tensors)


@everywhere
def test_refused_before_reading_what_no_sharing_can_save(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Nothing that is resident has these lengths. The loader would stop at the first byte of data that it reads."""
    daemon = start_daemon(argv=launcher(loader="stopping"), budget="8MiB", pool=0)
    client = daemon.connect()
    load(daemon, make(tmp_path, "resident", 2))
    with pytest.raises(weightd.CapacityError):
        client.load(marked(tmp_path, [5 * MIB, 4 * MIB]))
    # What might be shared is read: the lengths are those of resident tensors.
    future = background(client.load_report, marked(tmp_path, [MIB] * 10))
    resume(*wait_stopped(daemon))
    with pytest.raises(weightd.CapacityError) as caught:
        future.result(60)
    assert caught.value.requested_bytes == 10 * MIB  # after hashing it is known that all ten are new
    assert names(client) == ["resident"]


@everywhere
def test_budget_is_never_exceeded(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(budget="20MiB", pool="8MiB")
    client = daemon.connect()
    paths = [make(tmp_path, f"c{n}", 4 + n, shared={0: "common", 1: ("c0", 1)}) for n in range(6)]
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append((books(client).used_bytes, daemon.allocated() or 0))
            time.sleep(0.002)

    def load_all(order: list[Path]) -> None:
        for path in order:
            with weightd.connect(daemon.socket, timeout=20) as one:
                try:
                    one.load(path, name=path.stem)
                except weightd.CapacityError:
                    pass  # while two others keep what they have just loaded
                else:
                    with one.attach(path.stem) as attachment:
                        last = len(attachment.tensors) - 1
                        assert content(attachment, f"t{last}") == checkpoints.random_bytes((path.stem, last), MIB)

    watcher = background(watch)
    for future in [background(load_all, paths[n:] + paths[:n]) for n in (0, 2, 4)]:
        future.result(60)
    done.set()
    watcher.result(60)
    assert seen
    assert max(used for used, _ in seen) <= 20 * MIB
    assert max(allocated for _, allocated in seen) <= 20 * MIB
    assert client.stats().evictions > 0


def test_next_load_takes_its_memory_from_the_pool(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(pool="64MiB")
    client = daemon.connect()
    load(daemon, make(tmp_path, "one", 20))
    client.remove("one")
    eventually(lambda: books(client).live_bytes == 0, what="its loader has put it down")
    device = books(client)
    assert (device.used_bytes, device.reusable_bytes) == (20 * MIB, 20 * MIB)
    assert device.segments == 1
    assert daemon.allocates(20 * MIB, 20 * MIB)
    load(daemon, make(tmp_path, "two", 20))
    device = books(client)
    assert (device.used_bytes, device.live_bytes, device.reusable_bytes) == (20 * MIB, 20 * MIB, 0)
    assert device.segments == 1
    assert daemon.allocates(20 * MIB, 20 * MIB)
    with client.attach("two") as attachment:
        assert attachment.buffer("t19") == checkpoints.random_bytes(("two", 19), MIB)


@pytest.mark.parametrize(("pool", "kept"), [("0", 0), ("8MiB", 6 * MIB)])
def test_pool_is_bounded(start_daemon: StartDaemon, tmp_path: Path, pool: str, kept: int) -> None:
    daemon = start_daemon(pool=pool)
    client = daemon.connect()
    for name in ("a", "b", "c"):
        load(daemon, make(tmp_path, name, 6))
    for name in ("a", "b", "c"):
        client.remove(name)
    eventually(lambda: books(client).used_bytes == kept, what=f"{kept} bytes are kept")
    eventually(lambda: daemon.allocates(kept, kept), what=f"{kept} bytes are kept")
    assert books(client).reusable_bytes == kept


def test_pool_gives_way_to_a_load(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Freed memory that is kept counts as free."""
    daemon = start_daemon(budget="16MiB", pool="16MiB")
    client = daemon.connect()
    for name in ("a", "b"):
        load(daemon, make(tmp_path, name, 7))
    for name in ("a", "b"):
        client.remove(name)
    eventually(lambda: books(client).reusable_bytes == 14 * MIB, what="the pool")
    whole = {"t": ("U8", (12 * MIB,), checkpoints.random_bytes("whole", 12 * MIB))}  # in neither of the two segments
    load(daemon, checkpoints.write(tmp_path / "whole.safetensors", whole))
    with client.attach("whole") as attachment:
        assert attachment.buffer("t") == whole["t"][2]
    assert books(client).used_bytes <= 16 * MIB
