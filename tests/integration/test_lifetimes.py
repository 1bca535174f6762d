"""Lifetimes: never a wrong byte under a live tensor, and the space comes back once it is gone.

Each row of docs/lifetimes.md has a test here.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import weightd
import weightd.torch
from support import checkpoints, fake_torch, memory
from support.backends import EVERY, Backend
from support.content import content
from support.daemon import Daemon, eventually
from support.forked import fork
from support.shared import SharedDaemons
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
BUDGET = 32 * MIB
SIZE = 4 * MIB
"""Of each tensor. The kept checkpoint has three, so that with it under lease 20 MiB are left."""
IDLE_SECONDS = 10.0

everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")
where_memory_outlives_the_daemon = pytest.mark.backends("host", "cuda_vmm")

ATTACH = """
import gc, os, time, weightd
client = weightd.connect(timeout=60)
attachment = client.attach("kept")
"""
KEEP_ONE_TENSOR = f"""{ATTACH}
tensor = attachment.tensor("t1")
attachment.close()
del attachment
"""
BYTES_OF_TENSOR = "import xxhash; result = xxhash.xxh3_128_hexdigest(memoryview(tensor.cpu().numpy()))"
DROP = "del tensor; gc.collect()"


def expected() -> bytes:
    """The bytes of the tensor that is kept."""
    return checkpoints.random_bytes(("kept", 1), SIZE)


def digest_of(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor on whatever device."""
    return tensor.cpu().numpy().tobytes()


class Pressure:
    """Other checkpoints, for which the daemon has to evict and refill whatever it may."""

    def __init__(self, folder: Path) -> None:
        self._fillers = [checkpoints.write_random(folder / f"filler{i}.safetensors", 2, SIZE, seed=i) for i in range(5)]
        self._large = checkpoints.write_random(folder / "large.safetensors", 6, SIZE, seed="large")

    def fill(self, daemon: Daemon) -> None:
        """Load five checkpoints of 8 MiB, each forgotten at once, so that the later ones evict the earlier ones."""
        for filler in self._fillers:
            with weightd.connect(daemon.socket, timeout=20.0) as client:
                client.load(filler)

    def large_fits(self, daemon: Daemon) -> bool:
        """Whether 24 MiB, all that is not kept and a little more, can be had. Removes them again."""
        with weightd.connect(daemon.socket, timeout=20.0) as client:
            try:
                client.load(self._large, name="large")
            except weightd.CapacityError:
                return False
        with weightd.connect(daemon.socket, timeout=20.0) as client:
            client.remove("large")
        return True

    def apply(self, daemon: Daemon) -> None:
        """Evict, refill, and try for more than there is."""
        with weightd.connect(daemon.socket, timeout=20.0) as client:
            before = client.stats().evictions
            self.fill(daemon)
            assert client.stats().evictions > before, "there was no pressure"
        assert not self.large_fits(daemon), "the kept checkpoint does not count as leased"


@pytest.fixture
def tensors(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let weightd.torch make tensors here also of what lies on the double."""
    if backend.library is not None:
        monkeypatch.setattr("weightd._tensors._raw", fake_torch._raw)


@pytest.fixture
def small(start_daemon: StartDaemon, tensors: None) -> Daemon:
    """A daemon with 32 MiB and a page or two for rounding."""
    return start_daemon(budget=str(BUDGET + MIB), pool="8MiB")


@pytest.fixture(scope="module")
def pressure(tmp_path_factory: pytest.TempPathFactory) -> Pressure:
    return Pressure(tmp_path_factory.mktemp("pressure"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 12 MiB."""
    return checkpoints.write_random(tmp_path_factory.mktemp("kept") / "kept.safetensors", 3, SIZE, seed="kept")


def load(daemon: Daemon, path: Path, name: str = "kept") -> None:
    with weightd.connect(daemon.socket, timeout=20.0) as client:
        client.load(path, name=name, pin=False)


def attached_worker(daemon: Daemon, path: Path, spawn: Spawn, source: str = KEEP_ONE_TENSOR) -> Worker:
    """A process that holds the checkpoint, which nobody else does."""
    worker = spawn(daemon)
    worker.run("import weightd, weightd.torch, xxhash")
    if daemon.backend.library is not None:
        worker.run("from support import fake_torch; fake_torch.install()")
    with weightd.connect(daemon.socket, timeout=20.0) as client:
        client.load(path, name="kept")
        worker.run(source)
    return worker


def leases(daemon: Daemon) -> list[int]:
    with weightd.connect(daemon.socket, timeout=20.0) as client:
        return [lease.pid for lease in client.leases()]


# -- never a wrong byte under a live tensor ------------------------------------------------------------------------


@everywhere
def test_tensor_outlives_attachment_and_client(small: Daemon, kept: Path, pressure: Pressure) -> None:
    client = weightd.connect(small.socket, timeout=20.0)
    client.load(kept, name="kept")
    attachment = client.attach("kept")
    tensor = attachment.tensor("t1")
    attachment.close()
    client.close()
    del attachment, client

    pressure.apply(small)
    assert raw(tensor) == expected()
    del tensor
    eventually(lambda: pressure.large_fits(small), what="the space of the kept checkpoint")


@everywhere
def test_stopped_client_keeps_its_bytes(small: Daemon, kept: Path, pressure: Pressure, spawn: Spawn) -> None:
    worker = attached_worker(small, kept, spawn)
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        pressure.apply(small)
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert worker.run(BYTES_OF_TENSOR) == digest_of(expected())
    worker.run(DROP)
    eventually(lambda: pressure.large_fits(small), what="the space of the kept checkpoint")


@pytest.mark.parametrize("end", ["exits", "killed"])
def test_forked_child_keeps_the_bytes_of_its_parent(
    end: str, small: Daemon, kept: Path, pressure: Pressure, spawn: Spawn, tmp_path: Path
) -> None:
    worker = attached_worker(small, kept, spawn)
    with fork(worker, tmp_path) as child:
        if end == "exits":
            worker.close()
        else:
            worker.kill()
        assert leases(small) == [worker.pid]  # it was this process that took it
        pressure.apply(small)
        assert child.run(BYTES_OF_TENSOR) == digest_of(expected())
        child.run(DROP)
        eventually(lambda: not leases(small), what="the lease of the forked child")
        assert pressure.large_fits(small)


@everywhere
def test_killed_forked_child_gives_the_lease_up(small: Daemon, kept: Path, spawn: Spawn, tmp_path: Path) -> None:
    worker = attached_worker(small, kept, spawn)
    with fork(worker, tmp_path) as child:
        worker.kill()
        assert leases(small) == [worker.pid]
        child.kill()
        eventually(lambda: not leases(small), what="the lease of a killed forked child")


@where_memory_outlives_the_daemon
def test_daemon_killed_and_restarted(small: Daemon, kept: Path, pressure: Pressure, spawn: Spawn) -> None:
    worker = attached_worker(small, kept, spawn)
    small.kill()
    assert worker.run(BYTES_OF_TENSOR) == digest_of(expected())
    small.start()
    pressure.fill(small)
    assert pressure.large_fits(small), "the new daemon starts empty"
    pressure.fill(small)
    assert worker.run(BYTES_OF_TENSOR) == digest_of(expected())
    # The same client goes on with the new daemon, beside the tensor that it has from the old one.
    load(small, kept)
    assert worker.run(
        "from support.content import content; attachment = client.attach('kept')\n"
        "result = content(attachment, 't1') == tensor.cpu().numpy().tobytes()"
    )
    worker.run("attachment.close(); del attachment")
    assert memory.mappings(worker.pid) > 0
    worker.run(DROP)
    assert memory.mappings(worker.pid) == 0, "memory of the daemon that died stays mapped"
    eventually(lambda: not leases(small), what="the worker's lease with the new daemon")
    pressure.fill(small)
    assert pressure.large_fits(small)


@where_memory_outlives_the_daemon
def test_daemon_killed_while_attached_and_attachment_closed_later(small: Daemon, kept: Path) -> None:
    client = weightd.connect(small.socket, timeout=20.0)
    client.load(kept, name="kept")
    attachment = client.attach("kept")
    small.kill()
    assert content(attachment, "t1") == expected()
    tensor = attachment.tensor("t1")
    attachment.close()  # its daemon is gone: no error
    assert raw(tensor) == expected()
    small.start()
    assert client.leases() == []
    with pytest.raises(weightd.NotFoundError):
        client.attach("kept")
    client.close()


# -- dropping, in whatever order ------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("order", list(itertools.permutations(["attachment", "tensor", "client"])))
@pytest.mark.parametrize("closing", [True, False], ids=["close", "del"])
def test_drop_orders(order: tuple[str, ...], closing: bool, module_daemon: Daemon, small_path: Path) -> None:
    things: dict[str, Any] = {}
    client = things["client"] = weightd.connect(module_daemon.socket, timeout=20.0)
    client.load(small_path, name="kept")
    attachment = things["attachment"] = client.attach("kept")
    things["tensor"] = attachment.tensor("t1")
    del client, attachment
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for name in order:
            held = "attachment" in things or "tensor" in things
            assert leases(module_daemon) == ([os.getpid()] if held else [])
            thing = things.pop(name)
            if closing and not isinstance(thing, torch.Tensor):
                thing.close()
            del thing
            gc.collect()
            if "tensor" in things:
                assert raw(things["tensor"]) == checkpoints.random_bytes((0, 1), 5000)
    assert leases(module_daemon) == []


def test_dropping_an_open_attachment_warns(module_daemon: Daemon, small_path: Path) -> None:
    with weightd.connect(module_daemon.socket, timeout=20.0) as client:
        client.load(small_path, name="kept")
        attachment = client.attach("kept")
        with pytest.warns(ResourceWarning, match=r"unclosed <weightd\.Attachment sha256:") as warned:
            del attachment
        warned.clear()  # a warning keeps its source
        assert client.leases() == []


@everywhere
def test_views_outlive_tensor_and_module(backend: Backend, module_daemon: Daemon, small_path: Path) -> None:
    with weightd.connect(module_daemon.socket, timeout=20.0) as client:
        client.load(small_path, name="kept")
        with client.attach("kept") as attachment:
            state = attachment.state_dict()
    module = torch.nn.Module()
    for name, tensor in state.items():
        module.register_buffer(name, tensor)
    view = module.get_buffer("t1")[100:200].view(torch.int8)
    array = (module.get_buffer("t2") if backend.is_real_gpu else module.get_buffer("t2").numpy())[5:7]
    del module, state, tensor
    gc.collect()
    assert raw(view) == checkpoints.random_bytes((0, 1), 5000)[100:200]
    assert leases(module_daemon) == [os.getpid()]
    del view
    assert raw(torch.as_tensor(array)) == checkpoints.random_bytes((0, 2), 5000)[5:7]
    assert leases(module_daemon) == [os.getpid()]
    del array
    assert leases(module_daemon) == []


@everywhere
def test_interpreter_ends_with_everything_alive(module_daemon: Daemon, small_path: Path, spawn: Spawn) -> None:
    worker = attached_worker(
        module_daemon, small_path, spawn, f"{ATTACH}\ntensor = attachment.tensor('t0'); view = attachment.buffer('t1')"
    )
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    assert worker.process.wait(60) == 0
    eventually(lambda: leases(module_daemon) == [], what="the end of the lease")


# -- forks ---------------------------------------------------------------------------------------------------------


def test_client_in_a_forked_child(module_daemon: Daemon, small_path: Path, spawn: Spawn, tmp_path: Path) -> None:
    load(module_daemon, small_path)
    worker = spawn(module_daemon)
    worker.run(f"{ATTACH}\ntensor = attachment.tensor('t1')")
    refused = """
calls = {
    "attach": lambda: client.attach("kept"),
    "load": lambda: client.load(path),
    "stats": lambda: client.stats(),
    "leases": lambda: client.leases(),
    "checkpoints": lambda: client.checkpoints(),
}
result = []
for name, call in calls.items():
    try:
        call()
    except weightd.ForkedError as error:
        assert "connect again" in str(error)
    else:
        result.append(name)
"""
    with fork(worker, tmp_path) as child:
        assert child.run(refused, path=str(small_path)) == []
        data = checkpoints.random_bytes((0, 1), 5000)
        assert child.run(BYTES_OF_TENSOR) == digest_of(data)
        # What the child gives up it gives up for itself: connection and lease of the parent stay.
        child.run("client.close(); attachment.close(); del attachment, tensor, client; gc.collect()")
        assert worker.run("result = bytes(attachment.buffer('t1')).hex()") == data.hex()
        assert worker.run("result = len(client.leases())") == 1
        fresh = (
            "own = weightd.connect(timeout=60); again = own.attach('kept'); result = bytes(again.buffer('t1')).hex()"
        )
        assert child.run(fresh) == data.hex()
        assert sorted(leases(module_daemon)) == sorted([worker.pid, child.pid])
        assert child.run("again.close(); result = own.load(path).names", path=str(small_path)) is not None
        child.run("own.close()")
    eventually(lambda: leases(module_daemon) == [worker.pid], what="the end of the child's lease")


@everywhere
def test_closing_in_a_forked_child_says_nothing_on_the_parents_connection(
    module_daemon: Daemon, small_path: Path, spawn: Spawn, tmp_path: Path
) -> None:
    load(module_daemon, small_path)
    worker = spawn(module_daemon)
    worker.run(ATTACH)
    # The lock of the connection is held when the fork happens, as by a thread that is in the midst of a request.
    worker.run("client._handles._lock.acquire()")
    with fork(worker, tmp_path) as child:
        worker.run("client._handles._lock.release()")
        closes = "import threading; t = threading.Thread(target=attachment.close, daemon=True); t.start(); t.join(60)"
        assert child.run(f"{closes}; result = t.is_alive()") is False
    worker.run("attachment.close()")


# -- the table of docs/lifetimes.md, where it is not above --------------------------------------------------------


@everywhere
def test_kill_of_a_client_ends_its_lease_at_once(small: Daemon, kept: Path, spawn: Spawn) -> None:
    worker = attached_worker(small, kept, spawn, ATTACH)
    with weightd.connect(small.socket, timeout=20.0) as client:
        assert [(lease.pid, lease.bytes, lease.waiting) for lease in client.leases()] == [(worker.pid, 3 * SIZE, False)]
        worker.kill()
        assert client.leases() == [], "the kernel ends it with the process"


@everywhere
def test_mapping_lives_until_the_last_tensor_is_gone(
    backend: Backend, module_daemon: Daemon, small_path: Path, spawn: Spawn
) -> None:
    worker = attached_worker(module_daemon, small_path, spawn, f"{ATTACH}\nstate = attachment.state_dict()")
    # The manifest, which is the lease, and one segment; of a real GPU's segment the kernel does not know.
    expected = 1 if backend.is_real_gpu else 2
    assert mappings(worker.pid) == expected
    worker.run("attachment.close(); del attachment; keep = state.pop('t0'); del state; gc.collect()")
    assert mappings(worker.pid) == expected
    descriptors = [os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{worker.pid}/fd")]
    # A driver has memfds of its own, and the double keeps what CUDA IPC has opened.
    ours = "memfd:weightd" if backend.kind == "cuda_ipc" else "memfd:(weightd|fakecuda)"
    assert not [name for name in descriptors if re.search(ours, name)], "the client keeps a descriptor"
    worker.run("del keep; gc.collect()")
    assert mappings(worker.pid) == 0


def mappings(pid: int) -> int:
    """How many of our memfds, and of the double's, a process has mapped."""
    return memory.mappings(pid) + Path(f"/proc/{pid}/maps").read_text().count("/memfd:fakecuda")


def test_lease_lives_while_the_daemon_does_not(small: Daemon, kept: Path, spawn: Spawn) -> None:
    worker = attached_worker(small, kept, spawn, ATTACH)
    assert leases(small) == [worker.pid]
    small.kill()
    # A lock on the mapped file is the lease; it is the kernel's, and still there.
    assert [kind for kind, _ in ofd_locks(small, worker.pid)] == ["READ"]
    worker.run("attachment.close(); del attachment; gc.collect()")
    assert ofd_locks(small, worker.pid) == []
    small.start()


def ofd_locks(daemon: Daemon, pid: int) -> list[tuple[str, int]]:
    """Kind and inode of the kernel's locks on files that a process has mapped from the daemon."""
    mapped = {
        int(line.split()[4])
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "/memfd:weightd-lease" in line
    }
    found = []
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] != "OFDLCK":  # also those that wait, which have a column more
            continue
        inode = int(words[5].split(":")[2])
        if inode in mapped:
            found.append((words[3], inode))
    return found


@everywhere
def test_blob_lives_as_long_as_a_checkpoint_refers_to_it(small: Daemon, tmp_path: Path) -> None:
    shared = {0: "both"}
    one = checkpoints.write_random(tmp_path / "one.safetensors", 2, SIZE, seed=1, shared=shared)
    two = checkpoints.write_random(tmp_path / "two.safetensors", 2, SIZE, seed=2, shared=shared)
    with small.connect() as client:
        client.load(one, name="one")
        client.load(two, name="two")
        assert (client.stats().blobs, client.stats().resident_bytes) == (3, 3 * SIZE)
        with client.attach("one"):
            pass
        assert client.remove("one") == SIZE
        assert (client.stats().blobs, client.stats().resident_bytes) == (2, 2 * SIZE)
        with client.attach("two") as attachment:
            assert content(attachment, "t0") == checkpoints.random_bytes("both", SIZE)
            with pytest.raises(weightd.InUseError, match=f"pid {os.getpid()}"):
                client.remove("two")
        assert client.remove("two") == 2 * SIZE
        eventually(lambda: client.stats().blobs == 0, what="its last blobs are gone")


@everywhere
def test_segment_returns_to_the_system_when_its_last_blob_is_gone(start_daemon: StartDaemon, kept: Path) -> None:
    daemon = start_daemon(pool="0")
    with daemon.connect() as client:
        client.load(kept, name="kept")
        with client.attach("kept"):
            assert daemon.allocates(3 * SIZE)
            assert client.stats().devices[0].segments == 1
        client.remove("kept")
        eventually(lambda: daemon.allocates(0, 0), what="the segment's memory")
        eventually(lambda: client.stats().devices[0].used_bytes == 0, what="the books to follow")
        assert client.stats().devices[0].segments == 0


def has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    status = path.stat()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found = entry.stat()
            if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
                return True
    return False


def test_offered_descriptors_are_closed_when_the_load_is_done(small: Daemon, kept: Path, tmp_path: Path) -> None:
    with small.connect() as client:
        client.load(kept)
        (loader,) = small.loaders()
        eventually(lambda: not has_open(loader, kept), what="the loader to close the file")
        assert not has_open(small.pid, kept), "the daemon itself received the client's file"
        assert not has_open(os.getpid(), kept)
        bad = checkpoints.write_random(tmp_path / "bad.safetensors", 1, 1000)
        bad.write_bytes(bad.read_bytes()[:-1])
        with pytest.raises(weightd.FormatError):
            client.load(bad)
        eventually(lambda: not has_open(loader, bad), what="the loader to close the bad file")


def test_offered_descriptors_are_closed_when_the_connection_ends(
    small: Daemon, kept: Path, tmp_path: Path, spawn: Spawn
) -> None:
    load(small, checkpoints.write_random(tmp_path / "first.safetensors", 1, 1000), "first")
    (loader,) = small.loaders()
    worker = spawn(small)
    worker.run("import weightd; client = weightd.connect(timeout=60); client.stats()")
    os.kill(loader, signal.SIGSTOP)
    worker.start("client.load(path)", path=str(kept))
    with small.connect() as client:
        eventually(lambda: any(c.state == "loading" for c in client.checkpoints()), what="the load to begin")
        worker.kill()
        eventually(lambda: not any(c.state == "loading" for c in client.checkpoints()), what="the load to be cancelled")
        eventually(lambda: small.loaders() == [], what="the end of a loader with a cancelled load")
        # Its descriptors went with it, and the load's memory came back.
        eventually(lambda: client.stats().devices[0].in_flight_bytes == 0, what="the load's memory")
        client.load(kept)


def test_loader_serves_a_burst_then_leaves(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    assert daemon.loaders() == []
    paths = [checkpoints.write_random(tmp_path / f"{i}.safetensors", 1, 1000, seed=i) for i in range(3)]
    with daemon.connect() as client:
        pids = []
        for path in paths:
            client.load(path)
            eventually(lambda opened=path: not has_open(daemon.loaders()[0], opened))
            pids += daemon.loaders()
        assert len(set(pids)) == 1, "each load had a loader of its own"
        eventually(lambda: daemon.loaders() == [], what=f"the idle loader to leave after {IDLE_SECONDS} s")
        client.load(checkpoints.write_random(tmp_path / "late.safetensors", 1, 1000, seed="late"))
        (loader,) = daemon.loaders()
    daemon.kill()
    eventually(lambda: not Path(f"/proc/{loader}").exists() or state_of(loader) == "Z", what="the loader's end")
    daemon.start()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# -- one daemon for the tests that need no pressure ------------------------------------------------------------------


@pytest.fixture(scope="module")
def module_daemons() -> Iterator[SharedDaemons]:
    daemons = SharedDaemons()
    yield daemons
    daemons.close()


@pytest.fixture
def module_daemon(module_daemons: SharedDaemons, backend: Backend, tensors: None) -> Iterator[Daemon]:
    """A daemon that holds nothing."""
    with module_daemons.on(backend) as daemon:
        yield daemon


@pytest.fixture
def small_path(tmp_path: Path) -> Path:
    """A checkpoint of three tensors of 5,000 bytes; the same content in every test."""
    return checkpoints.write_random(tmp_path / "small.safetensors", 3, 5000)


def test_waiting_lease_ends_with_attach_or_connection(small: Daemon, kept: Path) -> None:
    """A finished load is kept for its waiter until it has attached, or has left."""
    observer = small.connect()
    with small.connect() as attaching, small.connect() as leaving:
        attaching.load(kept)
        leaving.load(kept)
        assert [lease.waiting for lease in observer.leases()] == [True, True]
        attaching.attach(kept).close()
        assert [lease.waiting for lease in observer.leases()] == [True]
        leaving.close()
        eventually(lambda: not observer.leases(), what="the connection is closed")
