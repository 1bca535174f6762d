"""Loads and verifications that break half-way, both sides in this process: what is said, and what is left."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pytest

from support.threaded_loads import LoadScene, on_a_desk, seeded
from weightd.errors import (
    CapacityError,
    DeviceError,
    DrainingError,
    FormatError,
    InvalidReferenceError,
    LeaseLostError,
    NotFoundError,
    ResourceLimitError,
    ServerError,
    WeightdError,
)
from weightd.types import FileIdentity, SourceFile
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.devices.host_io import HostSegmentIO
from weightd_daemon.loader import job, verifying
from weightd_daemon.loader._proto import loader_pb2 as wire
from weightd_daemon.loader.channel import LoaderChannelClosedError
from weightd_daemon.loader.copying import LoaderCopier
from weightd_daemon.loads import loader_pool, reading, verification
from weightd_daemon.loads.loader_process import LoadProcess

MIB = 1 << 20
SIZE = 100_000


def model(scene: LoadScene) -> Path:
    """A file of three tensors."""
    return scene.write("m", seeded(*"abc"))


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Never:
        raise error

    return fail


# -- files that change -------------------------------------------------------------------------------------------------


@on_a_desk(threads=1)
async def test_a_file_that_is_cut_while_it_is_read(scene: LoadScene) -> None:
    path = scene.write("m", seeded(*"abc", size=2 * MIB))
    scene.at_piece(1, lambda: os.truncate(path, 1000))
    await scene.refused(FormatError, r"^m\.safetensors: shrank while it was read \(no byte at \d+\)", path)
    await scene.check_serves(1)


@on_a_desk(threads=1)
async def test_a_file_that_is_touched_while_it_is_read(scene: LoadScene) -> None:
    path = model(scene)
    scene.at_piece(1, lambda: os.utime(path, (1, 1)))
    await scene.refused(FormatError, "changed while it was read; load it again", path)
    await scene.check_serves(1)


@on_a_desk(threads=1, budget=2 * MIB)
async def test_a_file_that_changes_between_hashing_and_copying(scene: LoadScene) -> None:
    """Digests that others were asked about must be those of the bytes that are placed."""
    await scene.desk.load(scene.write("first", seeded(*"abc", size=MIB // 2)))
    path = scene.write("m", seeded(*"def", size=MIB // 2))

    def change() -> None:
        with path.open("r+b") as file:
            file.seek(-MIB // 2, os.SEEK_END)
            file.write(b"other")

    scene.at_piece(4, change)
    with pytest.raises(FormatError, match=r"changed while it was read \(tensor 't2'\); load it again"):
        await scene.desk.load(path)


@on_a_desk()
async def test_another_file_than_was_announced(scene: LoadScene) -> None:
    """It is said at the loader's next question: what comes before that is not looked at any more."""
    announced = SourceFile("c", "m.safetensors", FileIdentity(1, 2, 3, 4, 5))
    match = r"^c/m\.safetensors: is not the file that was announced"
    await scene.refused(InvalidReferenceError, match, model(scene), sources=(announced,))
    await scene.check_serves(1)


# -- loaders that fail -------------------------------------------------------------------------------------------------


@on_a_desk()
async def test_a_loader_that_dies_in_mid_load(scene: LoadScene) -> None:
    scene.at_piece(1, scene.threads.die)
    await scene.refused(LeaseLostError, "the loader process of this load died; nothing was kept", model(scene))
    await scene.check_serves(2)


@pytest.mark.parametrize(
    ("failure", "error", "match"),
    [
        (KeyError("t0"), ServerError, "^loader: KeyError: 't0'"),
        (OSError(errno.EIO, "Input/output error"), ServerError, "^loader: OSError: "),
        (OSError(errno.EMFILE, "Too many open files"), ResourceLimitError, "^loading: the daemon's loader process"),
        (DeviceError("the driver fell"), DeviceError, "^the driver fell"),
    ],
)
def test_a_loader_that_has_failed_of_itself_does_no_other_job(
    failure: Exception, error: type[WeightdError], match: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    @on_a_desk()
    async def play(scene: LoadScene) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(LoaderCopier, "copy", raising(failure))
            await scene.refused(error, match, model(scene))
        await scene.check_serves(2)

    play(tmp_path=tmp_path, monkeypatch=monkeypatch)


@on_a_desk()
async def test_a_message_that_is_no_job(scene: LoadScene) -> None:
    with scene.patch.context() as patch:
        patch.setattr(reading, "load_job", lambda *_: wire.ToLoader(full=wire.Freed()))
        await scene.refused(ServerError, "the daemon sent full where a job was due", model(scene))
    await scene.check_serves(2)


@on_a_desk()
async def test_what_fails_when_the_load_is_sealed_costs_the_loader_and_not_the_load(scene: LoadScene) -> None:
    """It closes what it had open only then."""
    with scene.patch.context() as patch:
        patch.setattr(HostSegmentIO, "close", raising(DeviceError("the driver fell")))
        await scene.desk.load(model(scene))
    await scene.check_serves(2)


@on_a_desk()
async def test_a_loader_that_takes_long_to_close_its_segments_is_replaced(scene: LoadScene) -> None:
    gate = threading.Event()
    with scene.patch.context() as patch:
        patch.setattr(loader_pool, "LEAVE_SECONDS", 0.01)
        patch.setattr(HostSegmentIO, "close", lambda _: gate.wait(60))
        await scene.desk.load(model(scene))
        gate.set()
    await scene.check_serves(2)


@on_a_desk()
async def test_a_loader_that_cannot_be_killed_keeps_its_memory(scene: LoadScene) -> None:
    """As one whose read hangs in the kernel: its load ends at once, and its memory is nobody's until it has ended."""
    set_aside, quarantine = asyncio.Event(), StoreTransaction.quarantine

    def noted(loading: StoreTransaction) -> None:
        quarantine(loading)
        set_aside.set()

    at_gate, gate = scene.hang()
    load = scene.desk.start(model(scene))
    await at_gate.wait()
    with scene.patch.context() as patch:
        patch.setattr(reading, "LEAVE_SECONDS", 0.01)
        patch.setattr(LoadProcess, "kill", lambda _: None)
        patch.setattr(StoreTransaction, "quarantine", noted)
        scene.desk.loads.leave(load, *load.waiters)
        with pytest.raises(LeaseLostError, match="nobody waits for it"):
            await load.done
        await set_aside.wait()
        memory = scene.desk.store.memories["host"]
        assert memory.used > 0
        assert not memory.reclaiming, "others would wait for it"
    gate.set()
    scene.threads.processes[0].kill()
    await scene.desk.over(load)
    await scene.desk.reclaimer.finish()
    assert memory.used == 0
    await scene.check_serves(2)


@on_a_desk()
async def test_an_idle_loader_that_has_died_gets_no_job(scene: LoadScene) -> None:
    await scene.desk.load(model(scene))
    (loader,) = scene.desk.loads._pool._idle
    loader.kill()
    await loader.exited
    await scene.check_serves(2)


# -- limits and room ---------------------------------------------------------------------------------------------------


@on_a_desk()
async def test_a_list_of_tensors_that_the_books_have_no_room_for(scene: LoadScene) -> None:
    scene.desk.store.books.limit = 1
    await scene.refused(CapacityError, "the limit books is reached", model(scene))


@pytest.mark.parametrize(
    ("failure", "error", "match"),
    [
        (OSError(errno.EMFILE, "Too many open files"), ResourceLimitError, "^loading: the weightd daemon has all"),
        (OSError(errno.EIO, "Input/output error"), ServerError, "the load failed by a bug in the daemon"),
    ],
)
def test_what_fails_in_the_daemon_is_said(
    failure: OSError, error: type[WeightdError], match: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    @on_a_desk()
    async def play(scene: LoadScene) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(scene.desk.loads, "_prepare", raising(failure))
            await scene.refused(error, match, model(scene))
        await scene.check_serves(2)

    play(tmp_path=tmp_path, monkeypatch=monkeypatch)


def full_once(patch: pytest.MonkeyPatch) -> None:
    """Have each loader find its device full as it begins a job."""
    opened = job.open_io

    def open_io(kind: str, device: str, segments: Any, on_full: Callable[[DeviceError], None]) -> Any:
        on_full(DeviceError("out of memory", {"call": "cuDevicePrimaryCtxRetain"}))
        return opened(kind, device, segments, on_full)

    patch.setattr(job, "open_io", open_io)


@pytest.mark.parametrize("verifies", [False, True])
def test_a_loader_whose_device_is_full_takes_the_room_of_one_that_is_idle(
    verifies: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @on_a_desk()
    async def play(scene: LoadScene) -> None:
        for number in range(10):  # the second load may get the loader of the first, where that is done already
            loads = [scene.desk.load(scene.write(name, seeded(name))) for name in (f"a{number}", f"b{number}")]
            (checkpoint, _), _ = await asyncio.gather(*loads)
            if len(scene.desk.loads._pool._idle) == 2:
                break
        assert len(scene.desk.loads._pool._idle) == 2
        full_once(monkeypatch)
        if verifies:
            assert await scene.desk.verify(checkpoint).done == []
        else:
            await scene.desk.load(model(scene))
        assert len(scene.desk.loads._pool._idle) == 1
        with pytest.raises(CapacityError, match="no room on host for the context of a loader process"):
            await scene.desk.load(scene.write("c", seeded(*"ghi")))
        with pytest.raises(CapacityError, match="cannot verify: no room on host for the context"):
            await scene.desk.verify(checkpoint).done

    play(tmp_path=tmp_path, monkeypatch=monkeypatch)


# -- verifications -----------------------------------------------------------------------------------------------------


async def loaded(scene: LoadScene, count: int = 3) -> Any:
    """A checkpoint."""
    return (await scene.desk.load(scene.write("m", seeded(*range(count)))))[0]


@on_a_desk()
async def test_what_has_changed_in_memory_is_found(scene: LoadScene) -> None:
    scene.patch.setattr(verification, "BATCH", 2)
    scene.patch.setattr(verifying, "_PROGRESS_SECONDS", 0.0)
    checkpoint = await loaded(scene, 5)
    blobs = list(checkpoint.unique.values())
    for blob in (blobs[0], blobs[4]):
        os.pwrite(scene.desk.device.writable(blob.segment), b"damaged", blob.offset + 9)
    verified = scene.desk.verify(checkpoint)
    seen = [(verified.done_blobs, verified.done_bytes) async for _ in verified.changes()]
    assert sorted(verified.done.result()) == sorted([blobs[0].number, blobs[4].number])
    assert seen == sorted(seen)
    assert (verified.done_blobs, verified.done_bytes) == (verified.total_blobs, verified.total_bytes) == (5, 5 * SIZE)
    assert not len([lease for lease in scene.desk.store.leases if lease.peer.connection != 1])


@on_a_desk()
async def test_a_loader_that_dies_while_it_verifies(scene: LoadScene) -> None:
    checkpoint = await loaded(scene)
    scene.act = scene.threads.die
    with pytest.raises(LeaseLostError, match="the loader process died while it verified"):
        await scene.desk.verify(checkpoint).done
    scene.act = lambda: None
    assert await scene.desk.verify(checkpoint).done == []
    assert len(scene.threads.processes) == 2


@on_a_desk()
async def test_a_loader_that_fails_to_verify_says_why(scene: LoadScene) -> None:
    checkpoint = await loaded(scene)
    scene.act = raising(KeyError("t0"))
    with pytest.raises(ServerError, match="loader: KeyError: 't0'"):
        await scene.desk.verify(checkpoint).done
    scene.act = lambda: None
    assert await scene.desk.verify(checkpoint).done == []


@pytest.mark.parametrize("answers", [True, False])
def test_what_goes_while_it_is_verified(answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its device loses its memory: the loader is killed, and the answer is why the checkpoint went."""

    @on_a_desk()
    async def play(scene: LoadScene) -> None:
        checkpoint = await loaded(scene)
        loop = asyncio.get_running_loop()

        def lose() -> None:
            scene.desk.store.lose("host", "it fell")
            scene.desk.loads.lose("GPU-9", DeviceError("another"))
            scene.desk.loads.lose("host", DeviceError("it fell"))

        def act() -> None:
            loop.call_soon_threadsafe(lose)
            if not answers:
                raise LoaderChannelClosedError

        scene.at_piece(1, act)
        scene.patch.setattr(scene.desk.device, "close", lambda: None)
        with pytest.raises(NotFoundError, match="gone"):
            await scene.desk.verify(checkpoint).done

    play(tmp_path=tmp_path, monkeypatch=monkeypatch)


@on_a_desk()
async def test_whoever_asked_for_it_may_leave_at_any_time(scene: LoadScene) -> None:
    checkpoint = await loaded(scene)
    leases = len(scene.desk.store.leases)
    at_gate, gate = scene.hang()
    for began in (False, True):
        verified = scene.desk.verify(checkpoint)
        if began:
            await at_gate.wait()
        verified.cancel()
        with pytest.raises(LeaseLostError, match="the verification was ended"):
            await verified.done
        assert [_ async for _ in verified.changes()] == []
    gate.set()
    assert len(scene.desk.store.leases) == leases
    scene.desk.store.leases.draining = True
    with pytest.raises(DrainingError):
        scene.desk.verify(checkpoint)


@on_a_desk()
async def test_verifications_end_with_the_daemon(scene: LoadScene) -> None:
    checkpoint = await loaded(scene)
    at_gate, gate = scene.hang()
    verified = [scene.desk.verify(checkpoint) for _ in range(6)]  # of which some wait for their turn
    await at_gate.wait()
    await scene.desk.loads.close()
    gate.set()
    for one in verified:
        with pytest.raises(LeaseLostError, match="verif"):
            one.done.result()
