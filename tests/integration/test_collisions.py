"""Two contents with one digest: the hash function sees two bytes only, and every byte must be right all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.backends import EVERY
from support.background import background
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.loader import STOP, resume, wait_stopped

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
SIZES = {"small": 5000, "at the limit": 64 << 10, "large": 3 * MIB}

pytestmark = pytest.mark.backends(*EVERY, swept="cuda_ipc")


def data(seed: object, size: int) -> bytes:
    """Bytes that all have one weak digest."""
    return b"xx" + checkpoints.random_bytes(seed, size - 2)


def make(folder: Path, name: str, seeds: list[object], size: int) -> Path:
    """A checkpoint of tensors t0, t1, … with one weak digest."""
    tensors = {f"t{i}": ("U8", (size,), data(seed, size)) for i, seed in enumerate(seeds)}
    return checkpoints.write(folder / f"{name}.safetensors", tensors)


def check(client: weightd.Client, name: str, seeds: list[object], size: int) -> None:
    with client.attach(name) as attachment:
        for i, seed in enumerate(seeds):
            assert content(attachment, f"t{i}") == data(seed, size), (name, i)


@pytest.fixture
def weak(start_daemon: StartDaemon) -> Daemon:
    """A daemon for which all of these collide."""
    return start_daemon(argv=launcher(loader="weak"))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_within_and_across_checkpoints(weak: Daemon, tmp_path: Path, size: int) -> None:
    client = weak.connect()
    first: list[object] = ["a", "b", "c", "a", "b"]
    second: list[object] = ["c", "d", "b", "e", "c"]
    client.load(make(tmp_path, "first", first, size), name="first")
    assert client.stats().digest_collisions > 0
    check(client, "first", first, size)
    client.load(make(tmp_path, "second", second, size), name="second")
    check(client, "first", first, size)
    check(client, "second", second, size)
    stats = client.stats()
    # Five contents. Those that occur twice in one checkpoint are stored twice where they are small.
    distinct = 5 + (3 if size < 64 << 10 else 0)
    assert (stats.blobs, stats.resident_bytes) == (distinct, distinct * size)
    collisions = stats.digest_collisions
    report = client.load_report(make(tmp_path, "again", second, size), name="again")
    assert report is not None
    assert report.unique_bytes == 0
    assert report.content_digest == client.inspect("second").checkpoint.content_digest
    assert client.stats().digest_collisions == collisions
    client.verify()


def test_variants_survive_what_came_before_them(weak: Daemon, tmp_path: Path) -> None:
    """The first of two contents goes; the other keeps its own, also against the first's return."""
    client = weak.connect()
    for name, seed in (("one", "a"), ("two", "b")):
        with weightd.connect(weak.socket, timeout=60) as other:
            other.load(make(tmp_path, name, [seed], MIB), name=name)
    eventually(lambda: client.leases() == [])
    client.remove("one")
    client.load(make(tmp_path, "three", ["c", "b"], MIB), name="three")
    client.load(tmp_path / "one.safetensors", name="one")
    for name, seeds in (("one", ["a"]), ("two", ["b"]), ("three", ["c", "b"])):
        check(client, name, list(seeds), MIB)
    assert client.stats().resident_bytes == 3 * MIB


def test_where_everything_is_hashed_first(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """The whole does not fit, so digests are known before bytes are; they must not be believed then either."""
    daemon = start_daemon(argv=launcher(loader="weak"), budget="12MiB", pool=0)
    client = daemon.connect()
    first: list[object] = ["a", "b", "c", "d", "e"]
    second: list[object] = ["e", "f", "a", "g", "b", "c", "d"]
    client.load(make(tmp_path, "first", first, MIB), name="first")
    with client.attach("first") as held:
        client.load(make(tmp_path, "second", second, MIB), name="second")
        check(client, "second", second, MIB)
        assert content(held, "t4") == data("e", MIB)
    assert client.stats().resident_bytes == 7 * MIB


@pytest.mark.parametrize("size", [5000, MIB])
def test_loads_side_by_side(start_daemon: StartDaemon, tmp_path: Path, size: int) -> None:
    """Each has placed its bytes before the other is sealed: equal ones and colliding ones, all with one digest."""
    daemon = start_daemon(argv=launcher(loader="weak,stopping"), reader_threads=1)
    client = daemon.connect()
    seeds: dict[str, list[object]] = {"one": ["a", "b", "c"], "two": ["b", "d", "a", "e"]}
    futures, loaders = [], []
    for count, (name, own) in enumerate(seeds.items(), start=1):
        tensors = {f"t{i}": ("U8", (size,), data(seed, size)) for i, seed in enumerate(own)}
        tensors["stop"] = ("U8", (MIB,), STOP.ljust(MIB, name[:1].encode()))
        path = checkpoints.write(tmp_path / f"{name}.safetensors", tensors)
        futures.append(background(daemon.connect().load_report, path, name=name))
        loaders = wait_stopped(daemon, count)
    resume(*loaders)
    for future in futures:
        future.result(60)
    for name, own in seeds.items():
        check(client, name, own, size)
    stats = client.stats()
    assert stats.digest_collisions > 0
    assert stats.resident_bytes == 5 * size + 2 * MIB
