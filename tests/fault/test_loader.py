"""Loaders that die or hang, at every stage: their load fails with a clear error, and the next one works."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints, fakecuda
from support.backends import EVERY, Backend
from support.background import background
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.loader import PIECE, STOP, resume, state, wait_stopped
from support.users import ALICE, needs_root, open_to_all
from support.worker import Worker

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20

pytestmark = pytest.mark.backends(*EVERY, swept="cuda_ipc")


@pytest.fixture
def stopping(start_daemon: StartDaemon) -> Daemon:
    """A daemon whose loaders stop at the mark in `marked`; what is freed is not kept."""
    return start_daemon(argv=launcher(loader="stopping"), pool=0, reader_threads=1)


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    """Six tensors of 2 MiB; the mark stands in the middle of "t3"."""
    tensors = {f"t{i}": ("U8", (2 * MIB,), data(i)) for i in range(6)}
    return checkpoints.write(tmp_path / "marked.safetensors", tensors)


def data(index: int) -> bytes:
    """The bytes of tensor `index` of `marked`."""
    plain = checkpoints.random_bytes(("marked", index), 2 * MIB)
    return plain[:PIECE] + STOP + plain[PIECE + len(STOP) :] if index == 3 else plain


def used_bytes(client: weightd.Client) -> int:
    (device,) = client.stats().devices
    return device.used_bytes


def check_load(client: weightd.Client, daemon: Daemon, marked: Path) -> None:
    """The same file loads, and its bytes are right."""
    future = background(client.load_report, marked, name="marked")
    resume(*wait_stopped(daemon))
    future.result(60)
    with client.attach("marked") as attachment:
        for i in range(6):
            assert content(attachment, f"t{i}") == data(i)


def test_killed_in_mid_load(stopping: Daemon, marked: Path) -> None:
    client = stopping.connect()
    future = background(client.load_report, marked)
    (pid,) = wait_stopped(stopping)
    (device,) = client.stats().devices
    assert device.in_flight_bytes >= 12 * MIB  # it has been granted its memory
    assert stopping.allocates(6 * MIB)  # and has written some
    assert [c.state for c in client.checkpoints()] == ["loading"]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(weightd.LeaseLostError, match=r"loader process of this load died.*load again"):
        future.result(60)
    eventually(lambda: used_bytes(client) == 0 and stopping.allocates(0, 0), what="its space is free again")
    assert client.checkpoints() == []
    check_load(client, stopping, marked)


def test_killed_before_it_took_the_files(daemon: Daemon, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 4, MIB)
    client = daemon.connect()
    future = background(client.load_report, path)
    pid = daemon.wait_for_loader()
    os.kill(pid, signal.SIGSTOP)
    if not future.done():  # else the loader was quicker than this test
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(weightd.LeaseLostError, match="load again"):
            future.result(60)
    if state(pid) == "T":
        resume(pid)
    report = client.load_report(path)
    assert report is not None
    assert report.total_bytes == 4 * MIB


def test_memory_stays_until_the_loader_has_put_it_down(start_daemon: StartDaemon, marked: Path) -> None:
    """Also when the checkpoint is removed in that moment: CUDA IPC memory must not be freed while it is open."""
    daemon = start_daemon(argv=launcher(loader="lingering"), pool=0)
    client = daemon.connect()
    with client.attach(client.load(marked).content_digest):
        pass
    (pid,) = wait_stopped(daemon)
    eventually(lambda: not client.leases(), what="the lease ends")
    assert client.remove(client.checkpoints()[0].content_digest) == 12 * MIB
    (device,) = client.stats().devices
    assert (device.live_bytes, device.segments) == (12 * MIB, 1)
    resume(pid)
    eventually(lambda: used_bytes(client) == 0 and daemon.allocates(0, 0), what="its space is free")
    assert client.checkpoints() == [], "it was not lost"


def test_stopped_loader_is_killed_when_the_last_waiter_leaves(stopping: Daemon, marked: Path) -> None:
    waiter, client = stopping.connect(), stopping.connect()
    future = background(waiter.load_report, marked)
    (pid,) = wait_stopped(stopping)
    waiter.close()
    with pytest.raises(weightd.LeaseLostError):
        future.result(60)
    eventually(lambda: state(pid) in ("", "Z"), what="the loader is killed")
    eventually(lambda: used_bytes(client) == 0, what="its space is free again")
    assert client.checkpoints() == []
    check_load(client, stopping, marked)


def test_killed_while_idle(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(checkpoints.write_random(tmp_path / "a.safetensors", 2, MIB, seed="a"))
    (pid,) = daemon.loaders()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in daemon.loaders(), what="the daemon has seen it")
    report = client.load_report(checkpoints.write_random(tmp_path / "b.safetensors", 2, MIB, seed="b"))
    assert report is not None
    assert report.unique_bytes == 2 * MIB
    assert len(daemon.loaders()) == 1


def test_killed_while_it_verifies(stopping: Daemon, marked: Path) -> None:
    client = stopping.connect()
    check_load(client, stopping, marked)
    future = background(client.verify)
    (pid,) = wait_stopped(stopping)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(weightd.LeaseLostError, match=r"died while it verified.*try again"):
        future.result(60)
    future = background(client.verify)
    resume(*wait_stopped(stopping))
    assert future.result(60).done_bytes == 12 * MIB


@pytest.mark.backends("cuda_ipc", double_only=True)
@pytest.mark.parametrize("gpu", [0, 1])
def test_a_device_that_is_lost_while_it_is_verified_or_waits_for_its_turn(
    backend: Backend, start_daemon: StartDaemon, marked: Path, gpu: int
) -> None:
    argv = launcher(loader="stopping")
    daemon = start_daemon(backend.with_knobs(devices=2), argv=argv, reader_threads=1, device="cuda")
    client = daemon.connect()
    for ordinal in range(2):
        future = background(client.load, marked, name="marked", device=fakecuda.uuid(ordinal))
        resume(*wait_stopped(daemon))
        future.result(60)
    holders = {Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-2]: pid for pid in daemon.holders()}
    future = background(client.verify)
    (loader,) = wait_stopped(daemon)  # which verifies the first
    os.kill(holders[fakecuda.uuid(gpu)], signal.SIGKILL)
    if gpu == 1:
        eventually(lambda: "device lost" in daemon.logged())
        resume(loader)
    with pytest.raises(weightd.DeviceError, match=f"checkpoint marked was lost: .*{fakecuda.uuid(gpu)}.*load it again"):
        future.result(60)
    future = background(client.verify)  # the other one
    resume(*wait_stopped(daemon))
    assert future.result(60).done_bytes == 12 * MIB


def test_verify_is_given_up_when_its_caller_leaves(stopping: Daemon, marked: Path) -> None:
    client, other = stopping.connect(), stopping.connect()
    check_load(client, stopping, marked)
    future = background(other.verify)
    (pid,) = wait_stopped(stopping)
    other.close()
    with pytest.raises(weightd.LeaseLostError):
        future.result(60)
    eventually(lambda: state(pid) in ("", "Z"), what="the loader is killed")
    eventually(lambda: not [lease for lease in client.leases() if lease.waiting and lease.pid == 0])
    client.remove("marked")


@needs_root
@pytest.mark.backends("host")
def test_a_user_verifies_in_its_own_turns(
    start_daemon: StartDaemon, marked: Path, tmp_path: Path, user: Callable[[Daemon, int], Worker]
) -> None:
    """One who asks for many verifications leaves others their turn."""
    daemon = open_to_all(
        start_daemon, argv=launcher(loader="stopping"), reader_threads=1, max_loads=2, max_user_loads=1
    )
    future = background(daemon.connect().load, marked, name="marked")
    resume(*wait_stopped(daemon))
    future.result(60)
    alice = user(daemon, ALICE)
    alice.run(
        "import threading\n"
        "asked = [threading.Thread(target=client.verify, args=('marked',), daemon=True) for _ in range(3)]\n"
        "for thread in asked: thread.start()"
    )
    wait_stopped(daemon)
    daemon.command("load", checkpoints.write_random(tmp_path / "other.safetensors", 1, 1000, seed="other"))
    assert sum(state(pid) == "T" for pid in daemon.loaders()) == 1, "one of hers at a time"

    def over() -> bool:
        resume(*(pid for pid in daemon.loaders() if state(pid) == "T"))
        return bool(alice.run("result = not any(thread.is_alive() for thread in asked)"))

    eventually(over, what="all of hers")
