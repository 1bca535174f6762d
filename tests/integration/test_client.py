"""The client in odd moments: answers that come late, several threads, finalizers, long requests, full tables."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import weightd
import weightd.torch
from support import checkpoints, fakecuda
from support.abandoned import end_abandoned_clients
from support.backends import EVERY, Backend
from support.background import background
from support.content import content
from support.daemon import Daemon, eventually
from support.worker import Worker
from weightd._libc import populate_read
from weightd._proto.v1 import handles_pb2
from weightd._transport.handle_socket import SocketClient
from weightd.client import Client
from weightd.errors import WeightdError

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
SIZE = 4096


@pytest.fixture
def forget(start_daemon: StartDaemon) -> Iterator[None]:
    """Close the client that weightd.torch keeps for this process: before, and after, but before daemons are checked."""
    del start_daemon  # what a fixture asks for ends after it

    def close() -> None:
        while weightd.torch._shared:
            weightd.torch._shared.popitem()[1].close()

    close()
    yield
    close()


def data(seed: str, index: int = 0) -> bytes:
    """The bytes of tensor `index` of `saved(..., seed)`."""
    return checkpoints.random_bytes((seed, index), SIZE)


def saved(folder: Path, seed: str, count: int = 1) -> Path:
    """A checkpoint file named after its seed."""
    return checkpoints.write_random(folder / f"{seed}.safetensors", count, SIZE, seed)


# -- an answer that comes late -----------------------------------------------------------------------------------------


def test_a_client_that_tests_abandon_is_ended_and_no_other(daemon: Daemon, tmp_path: Path) -> None:
    """What tests/conftest.py does after each module: this client's thread would look for its daemon for ever."""
    end_abandoned_clients()  # of tests before this one
    client = weightd.connect(daemon.socket)
    attachment = client.attach(checkpoints.write_random(tmp_path / "m.safetensors", 1, 1000))
    assert end_abandoned_clients() == 0
    daemon.kill()
    eventually(end_abandoned_clients, what="the connection's end is seen")
    assert client._connection.closed
    attachment.close()


def test_a_late_answer_is_not_taken_for_the_next_one(daemon: Daemon, tmp_path: Path) -> None:
    loader = daemon.connect()
    for name in ("a", "b"):
        loader.load(saved(tmp_path, name), name=name, pin=True)
    client = daemon.connect(timeout=1.0)
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        with pytest.raises(weightd.DaemonUnreachableError, match="does not answer within"):
            client.attach("a")
        client._connection.timeout = 60.0
        attaching = background(client.attach, "b")
        time.sleep(0.1)  # so that it asks before the answer to the first question comes
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    with attaching.result(60) as attachment:
        assert attachment.buffer("t0") == data("b")


def test_an_interrupted_question_is_not_answered_to_the_next_one(daemon: Daemon, spawn: Spawn, tmp_path: Path) -> None:
    """Ctrl-C while the daemon is slow."""
    loader = daemon.connect()
    for name in ("a", "b"):
        loader.load(saved(tmp_path, name), name=name, pin=True)
    worker = spawn(daemon)
    worker.run("import signal, weightd; client = weightd.connect(timeout=20)")
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        worker.start(
            "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
            "signal.setitimer(signal.ITIMER_REAL, 0.2)\n"
            "try:\n"
            "    client.attach('a')\n"
            "except KeyboardInterrupt:\n"
            "    result = 'interrupted'\n"
        )
        assert worker.finish() == "interrupted"
        worker.start("with client.attach('b') as attachment: result = bytes(attachment.buffer('t0')).hex()")
        time.sleep(0.2)  # so that it asks before the answer to the first question comes
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert worker.finish() == data("b").hex()


def test_an_error_of_the_daemon_keeps_the_connection(daemon: Daemon) -> None:
    client = daemon.connect()
    connection = client._handles
    with pytest.raises(weightd.NotFoundError):
        client.attach("nothing")
    client.ping()
    assert client._handles is connection


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.backends(*EVERY)
def test_threads_share_a_client(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a", pin=True)
    connection = client._handles

    def attach(_: int) -> None:
        for _ in range(100):
            with client.attach("a") as attachment:
                assert content(attachment, "t0") == data("a")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attach, range(8)))
    assert client._handles is connection, "it connected anew"


def test_a_client_may_wait_for_as_long_as_it_likes(daemon: Daemon) -> None:
    for timeout in (1e10, float("inf")):  # longer than the kernel, Python and gRPC can say
        with weightd.connect(daemon.socket, timeout=timeout) as client:
            assert client.stats().leases == 0
    for timeout in (0, -1, float("nan")):
        with pytest.raises(weightd.InvalidReferenceError, match=f"timeout {timeout}: must be more than 0 seconds"):
            weightd.connect(daemon.socket, timeout=timeout)


def test_a_connection_that_waits_for_an_answer_is_alive(daemon: Daemon) -> None:
    """What another thread is about to read is no farewell."""
    connection = daemon.connect()._handles
    with connection._lock:
        connection._socket.sendall(
            handles_pb2.HandleRequest(attach=handles_pb2.AttachRequest(reference="nothing")).SerializeToString()
        )
        connection._socket.recv(1 << 16, socket.MSG_PEEK)
        assert connection.alive()
        connection._socket.recv(1 << 16)
    assert connection.alive()


# -- waiting for a daemon ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forget")
def test_wait_waits_again_for_a_daemon_that_has_gone(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
    path = saved(tmp_path, "a")
    weightd.torch.load_file(path)
    daemon.stop()
    waiting = background(weightd.torch.load_file, path, fallback="wait")
    with pytest.raises(TimeoutError):
        waiting.result(0.5)
    daemon.start()
    assert waiting.result(60)["t0"].numpy().tobytes() == data("a")


@pytest.mark.usefixtures("forget")
def test_who_waits_holds_up_nobody_else(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
    path = saved(tmp_path, "a")
    daemon.stop()
    waiting = background(weightd.torch.load_file, path, fallback="wait")
    with pytest.raises(TimeoutError):
        waiting.result(0.3)
    with pytest.raises(weightd.DaemonUnreachableError):
        background(weightd.torch.load_file, path).result(60)
    daemon.start()
    assert list(waiting.result(60)) == ["t0"]
    del waiting  # the other future's error refers to this frame: the tensors would live until the next collection


# -- finalizers --------------------------------------------------------------------------------------------------------


def test_a_lease_may_be_given_up_in_the_midst_of_a_question(daemon: Daemon, tmp_path: Path) -> None:
    """The garbage collector may run anywhere, so also where this thread holds the connection."""
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a", pin=True)
    attachment = client.attach("a")

    def close_inside() -> None:
        with client._handles._lock:
            attachment.close()

    background(close_inside).result(60)
    eventually(lambda: not client.leases(), what="the lease's end")


@pytest.mark.usefixtures("forget")
def test_a_finalizer_says_nothing_to_the_daemon(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTD_SOCKET", str(daemon.socket))
    path = saved(tmp_path, "a")
    file = weightd.torch.safe_open(path, framework="pt")
    said: list[int] = []
    monkeypatch.setattr(SocketClient, "detach", lambda _, lease: said.append(lease))
    del file
    assert said == []
    client = daemon.connect()
    eventually(lambda: not client.leases(), what="the lease's end")


# -- populate ----------------------------------------------------------------------------------------------------------


def test_populate_maps_the_pages_of_the_tensors_that_are_attached(daemon: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write(
        tmp_path / "p.safetensors",
        {name: ("U8", (1 << 20,), checkpoints.random_bytes(name, 1 << 20)) for name in "abc"},
    )
    client = daemon.connect()
    client.load(path, name="p", pin=True)
    for populate in (False, True):
        with client.attach("p", tensors=["a", "c"], populate=populate) as attachment:
            resident = sum(resident_bytes(one.address) for one in attachment.ranges())
            assert 2 << 20 <= resident < 3 << 20 if populate else resident == 0
            assert attachment.buffer("c") == checkpoints.random_bytes("c", 1 << 20)
    with client.attach("p", manifest_only=True, populate=True) as attachment:
        assert attachment.ranges() == []


def test_pages_stay_mapped_while_they_are_populated(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may close the attachment meanwhile: the addresses would be nobody's, or somebody else's."""
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "p.safetensors", 1, 1 << 20), name="p")
    attachment = client.attach("p")

    def close_first(address: int, size: int) -> None:
        attachment.close()
        populate_read(address, size)

    monkeypatch.setattr("weightd._mapping.host.populate_read", close_first)
    attachment.populate()


def test_an_attach_that_cannot_populate_leaves_no_lease(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(address: int, size: int) -> None:
        raise OSError(errno.EINVAL, "no such advice")

    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a", pin=True)
    monkeypatch.setattr("weightd._mapping.host.populate_read", fail)
    with pytest.raises(WeightdError, match=r"populate needs Linux 5\.14"):
        client.attach("a", populate=True)
    eventually(lambda: not client.leases(), what="the lease's end")


def resident_bytes(address: int) -> int:
    """Bytes of the mapping at an address whose pages are mapped."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{address:x}-"))
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))


# -- long requests -----------------------------------------------------------------------------------------------------


def test_more_files_than_a_frame_can_name(daemon: Daemon, tmp_path: Path) -> None:
    """The checkpoint is attached by its digest, once when it has to be loaded and once when it is resident."""
    name = "long-name-of-a-shard-" * 8
    files = [tmp_path / "many" / f"{name}{i + 1:05}-of-00400.safetensors" for i in range(400)]
    for i, file in enumerate(files):
        checkpoints.write(file, {f"t{i}": ("U8", (16,), data("many")[:15] + bytes([i % 256]))})
    client = daemon.connect()
    for _ in range(2):
        with client.attach(tmp_path / "many") as attachment:
            assert len(attachment.tensors) == 400
            assert attachment.buffer("t399")[15] == 399 % 256
    with client.attach(tmp_path / "many", tensors=["t7"]) as attachment:
        assert [key.name for key in attachment.tensors] == ["t7"]


def test_more_names_than_a_frame_can_hold(daemon: Daemon, tmp_path: Path) -> None:
    """Names of tensors beside a component: every segment is mapped then, not the component's alone."""
    for part, names in {"few": ["t"], "many": [f"t{i}-" + "é" * 90 for i in range(400)]}.items():
        tensors = {name: ("U8", (16,), checkpoints.random_bytes((part, name), 16)) for name in names}
        checkpoints.write(tmp_path / "both" / part / "model.safetensors", tensors)
    client = daemon.connect()
    client.load(checkpoints.describe_pipeline(tmp_path / "both"), name="both")
    keys = [("many", f"t{i}-" + "é" * 90) for i in range(400)]
    with client.attach("both", components=["few"], tensors=keys) as attachment:
        assert len(attachment.tensors) == 401
        for part, name in keys[:3]:
            assert attachment.buffer(name, part) == checkpoints.random_bytes((part, name), 16)
    with pytest.raises(weightd.NotFoundError, match="'no'"):
        client.attach("both", tensors=[*keys, ("many", "no")])
    with pytest.raises(weightd.NotFoundError, match="'nor'"):
        client.attach("both", components=["nor"], tensors=keys)


def test_what_is_removed_between_load_and_attach_is_loaded_again(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, other = daemon.connect(), daemon.connect()
    load = Client._load
    loads: list[Any] = []

    def load_and_lose(self: Client, *arguments: Any, **options: Any) -> Any:
        result: Any = load(self, *arguments, **options)
        loads.append(result)
        if len(loads) < 3:
            self._handles.close()  # what waits for the connection is let go
            eventually(lambda: not other.leases(), what="the end of what waited")
            other.remove(result.content_digest)
        return result

    monkeypatch.setattr(Client, "_load", load_and_lose)
    with client.attach(saved(tmp_path, "a")) as attachment:
        assert attachment.buffer("t0") == data("a")
    assert len(loads) == 3


def test_a_tensor_that_is_not_in_the_files_is_no_reason_to_load_again(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Client._load
    loads: list[Any] = []

    def count(self: Client, *arguments: Any, **options: Any) -> Any:
        loads.append(load(self, *arguments, **options))
        return loads[-1]

    monkeypatch.setattr(Client, "_load", count)
    with pytest.raises(weightd.NotFoundError, match="'no'"):
        daemon.connect().attach(saved(tmp_path, "a"), tensors=["no"])
    assert len(loads) == 1


def test_what_is_removed_where_it_was_loaded_is_loaded_again_though_it_is_elsewhere(
    start_daemon: Callable[..., Daemon], fake_driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = start_daemon(Backend("double", "cuda_vmm", fake_driver), device="host,cuda:0")
    client, other = daemon.connect(), daemon.connect()
    path = saved(tmp_path, "a")
    client.load(path, device="host", pin=True)
    load = Client._load
    places: list[str] = []

    def load_and_lose(self: Client, *arguments: Any, **options: Any) -> Any:
        result: Any = load(self, *arguments, **options)
        places.append(result.device)
        if len(places) == 1:
            self._handles.close()
            eventually(lambda: not other.leases(), what="the end of what waited")
            other.remove(result.content_digest, result.device)
        return result

    monkeypatch.setattr(Client, "_load", load_and_lose)
    gpu = fakecuda.uuid(0)
    with client.attach(path, device=gpu[:12]) as attachment:
        assert attachment.device == gpu
        assert content(attachment, "t0") == data("a")
    assert places == [gpu, gpu]


def test_a_device_that_cannot_be_offers_the_daemon_nothing(daemon: Daemon, tmp_path: Path) -> None:
    """It keeps so many offers of a connection, and then hangs up."""
    client, path = daemon.connect(), saved(tmp_path, "a")
    connection = client._handles
    for _ in range(20):
        with pytest.raises(weightd.DeviceMismatchError, match="'mps': must be"):
            client.load(path, device="mps")
    assert client.load(path).state == "resident"
    assert client._handles is connection


# -- descriptors -------------------------------------------------------------------------------------------------------


@pytest.mark.backends("host", "cuda_vmm")
def test_received_descriptors_are_closed_on_exec(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(saved(tmp_path, "a"), name="a")
    received = client._handles.attach(handles_pb2.AttachRequest(reference="a"))
    try:
        assert len(received.descriptors) == 3, "of manifest, lease file and segment"
        for descriptor in received.descriptors:
            assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    finally:
        for descriptor in received.descriptors:
            os.close(descriptor)
