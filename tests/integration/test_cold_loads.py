"""Cold loads: each byte comes from the storage once, and what was read is what is attached."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import checkpoints
from support.backends import Backend
from support.content import content
from support.daemon import PATIENCE, Daemon, environment, eventually
from support.fuse import hanging_file
from support.leash import leashed
from support.shared import SharedDaemons

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
EVER = 1 << 62


def written(folder: Path, files: list[list[int]]) -> tuple[Path, list[Path]]:
    """A checkpoint of tensors of these lengths, in so many files: what names it, and its files."""
    names = [f"model-{number + 1:05}-of-{len(files):05}.safetensors" for number in range(len(files))]
    owners: dict[str, str] = {}
    paths = []
    for number, (name, lengths) in enumerate(zip(names, files, strict=True)):
        tensors = {
            f"{number}.{at}": ("U8", (length,), checkpoints.random_bytes((folder.name, number, at), length))
            for at, length in enumerate(lengths)
        }
        paths.append(checkpoints.write(folder / name, tensors))
        owners |= dict.fromkeys(tensors, name)
    if len(files) == 1:
        return paths[0], paths
    checkpoints.index(folder, owners)
    return folder, paths


def make_cold(paths: list[Path]) -> None:
    """Drop files from the page cache. Skips where they stay, as those of a tmpfs do."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            os.fsync(file.fileno())
            deadline = time.monotonic() + 5
            while is_cached(file.fileno()):  # pages that the kernel has in hand stay at first
                if time.monotonic() > deadline:
                    pytest.skip("NOT TESTED: files of the temporary folder cannot be dropped from the page cache")
                time.sleep(0.02)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what the look may have brought


def is_cached(descriptor: int) -> bool:
    """Drop a file from the page cache, and see whether it is still there."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], os.fstat(descriptor).st_size // 2, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError as error:
        pytest.skip(f"NOT TESTED: whether files are cached cannot be asked: {error.strerror}")


def read_from_storage(*pids: int) -> int:
    """Bytes that processes have caused to be read from storage so far."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/io").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


KINDS = {
    "one file of many sizes": [[20 * MIB, 4096, 3 * MIB + 512, 8192, 9 * MIB, *[70_000] * 40, 25 * MIB]],
    "shards": [[5 * MIB, 700_000, 1024, 6 * MIB]] * 5,
    "small files": [[200_000, 64]] * 60,
}


@pytest.fixture
def shared(shared_daemons: SharedDaemons, backend: Backend) -> Iterator[Daemon]:
    """A daemon that holds nothing."""
    with shared_daemons.on(backend) as daemon:
        yield daemon


def load_cold(daemon: Daemon, files: list[list[int]], folder: Path) -> None:
    """Load such files when nothing has them cached; they are read once, and are what is attached then."""
    folder.mkdir()
    reference, paths = written(folder, files)
    total = sum(path.stat().st_size for path in paths)
    processes = *daemon.loaders(), os.getpid()  # the client reads headers
    assert len(processes) == 2, "a loader that serves this load has to be there"
    make_cold(paths)
    before = read_from_storage(*processes)
    with daemon.connect() as client:
        result = client.load_report(reference, name="m")
    read = read_from_storage(*processes) - before
    assert result is not None
    assert result.read_bytes == sum(map(sum, files))
    pages = (len(paths) + 1) * 8192  # where each file ends, and where the filesystem says that it lies
    assert total - pages <= read <= total + pages
    with daemon.connect() as client, client.attach("m") as attachment:
        for number, lengths in enumerate(files):
            for at, length in enumerate(lengths):
                expected = checkpoints.random_bytes((folder.name, number, at), length)
                assert content(attachment, f"{number}.{at}") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_reads_each_byte_from_storage_once(kind: str, shared: Daemon, tmp_path: Path) -> None:
    with shared.connect() as client:
        client.load(checkpoints.write_random(tmp_path / "first.safetensors", 1, 4096))  # starts a loader
    load_cold(shared, KINDS[kind], tmp_path / "m")


def test_a_load_that_is_hashed_first_reads_each_byte_from_storage_once(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    size = sum(map(sum, KINDS["shards"]))
    daemon = start_daemon(budget=str(size * 5 // 4), pool="0")
    with daemon.connect() as loading:
        loading.load(checkpoints.write_random(tmp_path / "first.safetensors", 1, size // 2))
    client = daemon.connect()
    eventually(lambda: not client.leases(), what="it can be evicted for the next load")
    load_cold(daemon, KINDS["shards"], tmp_path / "m")


@pytest.mark.parametrize("cached", [False, True])
def test_a_load_asks_the_server_of_a_file_for_each_byte_once(cached: bool, shared: Daemon, tmp_path: Path) -> None:
    """Past the page cache, too, where bytes that were read ahead would be read again."""
    path = checkpoints.write_random(tmp_path / "m.safetensors", 6, 3 * MIB + 4096)
    with hanging_file(tmp_path / "mount", path, EVER, cached=cached) as file:
        command = file.command([sys.executable, "-m", "weightd", "load", str(file.path)])
        subprocess.run(leashed(command), env=environment(shared.socket), check=True, timeout=PATIENCE)
        size = path.stat().st_size
        asked = sum(max(0, min(count, size - offset)) for offset, count in file.reads())
    assert size <= asked <= size + 4096  # the header may end in a page that is read with it
