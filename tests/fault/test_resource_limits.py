"""Too few descriptors, addresses, mappings or processes: who is short says so, and serves again when there are more."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints
from support.daemon import Daemon, environment, eventually
from support.limits import room_for
from support.worker import Worker
from weightd import _limits, errors
from weightd._limits import DAEMON, LOADER, THIS_PROCESS, limit_error
from weightd_daemon.loader.schedule import LoaderUnit, on_threads, rows

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]


def shards(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder with a checkpoint in many short files."""
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        checkpoints.write(folder / name, {f"t{number}": ("U8", (3000,), bytes([number % 256, seed]) * 1500)})
    weights = ",".join(f'"t{n}":"model-{n + 1:05}-of-{count:05}.safetensors"' for n in range(count))
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map":{{{weights}}}}}')
    return folder


def parts(folder: Path, count: int, seed: int = 0) -> Path:
    """A folder with a pipeline of many components, each of which gets a segment of its own."""
    for number in range(count):
        path = folder / f"part{number:03}" / "model.safetensors"
        checkpoints.write(path, {f"t{number}": ("U8", (3000,), bytes([number % 256, seed]) * 1500)})
    checkpoints.describe_pipeline(folder)
    return folder


def short_daemon(start_daemon: StartDaemon, descriptors: int) -> Daemon:
    """A daemon that cannot raise its limit, and so its loaders cannot either."""
    script = f'ulimit -n {descriptors}; exec "{sys.executable}" -m weightd_daemon "$@"'
    return start_daemon(argv=["bash", "-c", script, "weightd"], pool=0)


# -- the client --------------------------------------------------------------------------------------------------------

ATTACH = """
import os, weightd
from support.limits import room_for
client = weightd.connect()
client.version()  # gRPC has started
with room_for(os.getpid(), room):
    try:
        with client.attach(path) as attachment:
            result = [len(attachment.tensors), bytes(attachment.buffer("t99"))[0]]
    except weightd.ResourceLimitError as error:
        result = [error.limit, error.errno, str(error)]
with client.attach(path) as attachment:
    result.append(len(attachment.tensors))
client.close()
"""


def test_a_client_needs_no_descriptors_for_files_and_segments_at_once(
    daemon: Daemon, spawn: Spawn, tmp_path: Path
) -> None:
    assert spawn(daemon).run(ATTACH, path=str(shards(tmp_path, 100)), room=130) == [100, 99, 100]


@pytest.mark.parametrize("room", [0, 40, 99])
def test_a_client_without_descriptors_for_files(room: int, daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    limit, code, text, after = spawn(daemon).run(ATTACH, path=str(shards(tmp_path, 100)), room=room)
    assert (limit, code, after) == ("RLIMIT_NOFILE", errno.EMFILE, 100)
    assert f"opening {tmp_path}" in text
    assert "this process has all the descriptors" in text
    assert "`ulimit -n`" in text


def test_a_client_without_descriptors_for_segments_says_so_and_goes_on(
    daemon: Daemon, spawn: Spawn, tmp_path: Path
) -> None:
    with weightd.connect(daemon.socket, timeout=20) as client:
        client.load(parts(tmp_path, 100), name="many", pin=True)
    limit, code, text, after = spawn(daemon).run(ATTACH, path="many", room=40)
    assert (limit, code, after) == ("RLIMIT_NOFILE", errno.EMFILE, 100)
    assert "receiving descriptors" in text
    assert "this process has all the descriptors" in text


def test_a_client_without_descriptors_for_a_connection_or_for_grpc(daemon: Daemon, spawn: Spawn) -> None:
    """gRPC ends the process where it gets none; we ask first."""
    limits = spawn(daemon).run(
        """
import os, weightd, weightd.client
from support.limits import room_for
result = []
first = weightd.connect()
for room, call in ((0, weightd.connect), (0, first.version), (3, first.version)):
    with room_for(os.getpid(), room):
        try:
            call()
        except weightd.ResourceLimitError as error:
            result.append(error.limit)
result.append(first.version().pid)
first.close()
"""
    )
    assert limits == ["RLIMIT_NOFILE"] * 3 + [daemon.pid]


def test_a_client_without_address_space(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": ("U8", (64 << 20,), bytes(64 << 20))})
    found = spawn(daemon).run(
        """
import resource, weightd
client = weightd.connect()
client.load(path, name="big")
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (48 << 20), resource.RLIM_INFINITY))
try:
    client.attach("big")
except weightd.ResourceLimitError as error:
    result = [error.limit, isinstance(error, OSError), str(error)]
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
with client.attach("big") as attachment:
    result.append(len(attachment.buffer("a")))
client.close()
""",
        path=str(path),
    )
    assert [*found[:2], found[3]] == ["RLIMIT_AS", True, 64 << 20]
    assert "bytes: this process has too little address space left (RLIMIT_AS is " in found[2]
    assert "`ulimit -v`" in found[2]


MANY_MAPPINGS = """
import os
from weightd._mapping.host import HostMapping
from weightd.errors import ResourceLimitError
file = os.memfd_create("m")
os.ftruncate(file, 4096)
made = []
try:
    while True:
        made.append(HostMapping(file, 4096, writable=False))
except ResourceLimitError as error:
    made.clear()
    print(error.limit, error, sep="|")
"""


def test_a_process_without_mappings() -> None:
    """As with a checkpoint that has more equal tensors than a process may have mappings."""
    if int(Path("/proc/sys/vm/max_map_count").read_text()) > 300_000:
        pytest.skip("this machine allows so many that it takes minutes")
    done = subprocess.run(
        [sys.executable, "-c", MANY_MAPPINGS], env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    limit, text = done.stdout.strip().split("|")
    assert limit == "vm.max_map_count"
    assert "mappings (vm.max_map_count is " in text
    assert "raise `sysctl vm.max_map_count`" in text


# -- the loader --------------------------------------------------------------------------------------------------------


def test_short_files_need_descriptors_one_after_the_other(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """300 shards share their segments, and a loader that may not have them all open reads them as they come."""
    client = short_daemon(start_daemon, 128).connect()
    client.load(shards(tmp_path, 300), name="many")
    assert client.inspect("many").segments == 1
    with client.attach("many") as attachment:
        assert [bytes(attachment.buffer(f"t{n}")) for n in range(300)] == [
            bytes([n % 256, 0]) * 1500 for n in range(300)
        ]


def long_files(folder: Path, count: int) -> Path:
    """As many files of more than 1 MiB, which take no room on the disk."""
    for number in range(count):
        path = folder / f"model-{number + 1:05}-of-{count:05}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        header = f'{{"t{number}":{{"dtype":"U8","shape":[{1 << 20}],"data_offsets":[0,{1 << 20}]}}}}'.encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + (1 << 20))
    return folder


@pytest.mark.parametrize(
    ("make", "files", "descriptors", "what"),
    [(long_files, 200, 128, "receiving 200 files"), (parts, 85, 150, "receiving segments")],
)
def test_a_loader_without_descriptors_says_so_and_nobody_else_is_blamed(
    make: Callable[[Path, int], Path],
    files: int,
    descriptors: int,
    what: str,
    start_daemon: StartDaemon,
    tmp_path: Path,
) -> None:
    daemon = short_daemon(start_daemon, descriptors)
    client = daemon.connect()
    with pytest.raises(weightd.ResourceLimitError) as caught:
        client.load(make(tmp_path / "many", files))
    assert caught.value.limit == "RLIMIT_NOFILE"
    expected = f"{what}: {LOADER} has all the descriptors that it may have (RLIMIT_NOFILE is {descriptors}); "
    assert str(caught.value).startswith(expected)
    assert "LimitNOFILE=" in str(caught.value)
    eventually(lambda: client.stats().devices[0].used_bytes == 0, what="what the failed load held is back")
    client.load(shards(tmp_path / "few", 10))
    assert len(client.checkpoints()) == 1


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_threads_that_cannot_be_had_leave_their_work_to_others(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    left = allowed

    def limited(thread: threading.Thread) -> None:
        nonlocal left
        if not left:
            raise RuntimeError("can't start new thread")
        left -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    units = [LoaderUnit(number, ()) for number in range(20)]
    done: list[int] = []
    on_threads(rows([[unit] for unit in units], 4), lambda unit: done.append(unit.file))
    assert sorted(done) == list(range(20))


# -- the daemon --------------------------------------------------------------------------------------------------------


def test_however_far_a_daemon_gets_without_descriptors_a_load_says_why(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """For an intake, the loader's sockets and process, segments, the manifest. Its log is looked through for bugs."""
    daemon = start_daemon(pool=0)
    client = daemon.connect()
    failures: list[weightd.ResourceLimitError] = []
    steps = {"answering offer", "starting a loader process", "making a segment", "loading"}  # last the manifest
    said: set[str] = set()
    # A daemon that has yet to close what it had of a killed loader has more room then, and a step may be left out.
    for number in range(36):
        path = parts(tmp_path / f"{number}", 3, number)
        for loader in daemon.loaders():
            os.kill(loader, signal.SIGKILL)
        eventually(lambda: not daemon.loaders())
        with room_for(daemon.pid, number % 12):
            try:
                client.load(path)
            except weightd.ResourceLimitError as error:
                failures.append(error)
                said.add(str(error).partition(":")[0])
        client.load(path)
        assert len(client.checkpoints()) == number + 1
        if number >= 11 and said >= steps:
            break
    assert {error.limit for error in failures} == {"RLIMIT_NOFILE"}
    assert all(f": {DAEMON} has all the descriptors" in str(error) for error in failures)
    assert said == steps


def test_a_daemon_that_may_make_no_file_of_that_size(start_daemon: StartDaemon, tmp_path: Path) -> None:
    script = f'ulimit -f 1024; exec "{sys.executable}" -m weightd_daemon "$@"'
    client = start_daemon(argv=["bash", "-c", script, "weightd"], pool=0).connect()
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": ("U8", (2 << 20,), bytes(2 << 20))})
    with pytest.raises(weightd.ResourceLimitError, match="RLIMIT_FSIZE is 1048576 bytes") as caught:
        client.load(path)
    assert caught.value.limit == "RLIMIT_FSIZE"
    client.load(checkpoints.write(tmp_path / "s.safetensors", {"a": ("U8", (1000,), bytes(1000))}))


# -- the words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "limit", "words"),
    [
        (errno.EMFILE, "RLIMIT_NOFILE", "ulimit -n"),
        (errno.ENFILE, "fs.file-max", "sysctl fs.file-max"),
        (errno.ETOOMANYREFS, "RLIMIT_NOFILE", "one at a time"),
        (errno.EAGAIN, "RLIMIT_NPROC", "pids.max"),
        (errno.ENOMEM, "memory", "overcommit"),
        (errno.EFBIG, "RLIMIT_FSIZE", "ulimit -f"),
    ],
)
@pytest.mark.parametrize("who", [THIS_PROCESS, DAEMON, LOADER])
def test_each_limit_has_a_name_and_an_advice(code: int, limit: str, words: str, who: str) -> None:
    error = limit_error(OSError(code, os.strerror(code)), "doing it", who)
    assert error is not None
    assert (error.limit, error.errno) == (limit, code)
    assert str(error).startswith("doing it: ")
    assert words in str(error)
    assert ("daemon's `ulimit" in str(error)) == (who != THIS_PROCESS and "ulimit" in str(error))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.limit) == (weightd.ResourceLimitError, str(error), limit)
    wired = errors.from_wire(error.reason, error.message, error.metadata)
    assert (type(wired), str(wired), wired.exit_code) == (weightd.ResourceLimitError, str(error), 75)


def test_other_failures_are_no_limit() -> None:
    assert limit_error(OSError(errno.EIO, "x"), "doing it") is None
    assert _limits.out_of_descriptors("doing it", needed=3) is None
