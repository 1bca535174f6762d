"""Devices that are forgotten, on the double of the driver in this process: what goes, what stays if that ends early."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import fakecuda
from support.gpu_nodes import make_node
from support.kept_gpu import MIB, WHO, Keeper, Start
from weightd._proto.v1 import handles_pb2
from weightd.errors import DeviceAbsentError, DeviceError, InUseError
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.core.loading import StoreTransaction
from weightd_daemon.devices import cuda_node, served
from weightd_daemon.devices.cuda_opening import ServedGpu
from weightd_daemon.handles.attach import AttachHandler
from weightd_daemon.operations import absence
from weightd_daemon.operations.forget import DeviceForgetting

GPU = fakecuda.uuid(0)
NODE = f"gpu.{GPU}"
AWAY = "cuInit:802"
PEER = LeasePeer(1, 2, 1000, "python")


@pytest.fixture
def keeper(fake_driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """What a daemon has left that held "a" and "b" on the GPU: its device file, too."""

    async def leave() -> None:
        async with Start.of(made, device="host,cuda") as start:
            for name in "ab":
                await start.load(name, GPU, {"t": name.encode() * MIB})
            await start.until(lambda: NODE in made.kept)

    make_node(tmp_path, GPU)
    monkeypatch.setattr(cuda_node, "DEV", tmp_path)
    monkeypatch.setattr(cuda_node, "GPUS", tmp_path / "gpus")
    monkeypatch.setenv("FAKECUDA_FAIL", "")
    made = Keeper()
    asyncio.run(leave())
    yield made
    made.close()
    assert fakecuda.device_bytes(0) == 0


Body = Callable[[Start], Coroutine[Any, Any, None]]


def started(keeper: Keeper, body: Body) -> None:
    """Start on what is kept, do something, and be killed."""

    async def run() -> None:
        async with Start.of(keeper, device="host,cuda") as start, asyncio.timeout(60):
            await body(start)

    asyncio.run(run())


async def forget(start: Start, seconds: float = 60.0, gone: Callable[[int], None] = lambda _: None) -> None:
    loads: Any = SimpleNamespace(lose=lambda *_: None)
    forgetting = DeviceForgetting(
        store=start.store, loads=loads, absences=start.absences, reclaimers=start.reclaimers,
        settled=start.descriptor_store.settled,
    )  # fmt: skip
    async for _ in forgetting.forget(GPU, seconds, PEER, gone):
        pass


def test_no_lease_of_any_kind_is_taken_while_a_device_is_let_go_of(keeper: Keeper) -> None:
    """One would end the removal half way."""

    async def body(start: Start) -> None:
        connections: Any = SimpleNamespace(who=lambda _: WHO)
        connection: Any = SimpleNamespace(number=1, peer=PEER)
        attacher = AttachHandler(
            store=start.store, catalog=start.catalog, loads=None, manifests=start.manifests,  # type: ignore[arg-type]  # not used
            locks=start.locks, connections=connections, devices=start.served.devices, default_device=GPU,
            limits=UserLimits(), now=lambda: 7.0,
        )  # fmt: skip
        request = handles_pb2.AttachRequest(reference="b", manifest_only=True)
        refused: list[str] = []

        def gone(_: int) -> None:
            if start.store.on_device(GPU):  # "a" has gone
                with pytest.raises(DeviceAbsentError, match="is being let go of"):
                    attacher.attach(connection, request)
                refused.append("b")

        attached = attacher.attach(connection, request)
        os.close(attached.locked.manifest)
        await forget(start, gone=gone)
        assert (refused, start.store.on_device(GPU)) == (["b"], [])

    started(keeper, body)


def test_what_ends_early_because_memory_is_open_still_leaves_the_device_file(keeper: Keeper) -> None:
    """The device serves on, and what is loaded there next must outlive the daemon."""

    async def body(start: Start) -> None:
        load = StoreTransaction(start.store, GPU, "", 1000)
        while load.grant(MIB, MIB) is None:
            await start.reclaimers[GPU].wait()
        with pytest.raises(InUseError, match=r"has memory of .* open still"):
            await forget(start, 0.0)
        assert start.absences.serves(GPU)
        assert start.store.absent == {}
        assert (NODE in keeper.kept, NODE in keeper.dropped) == (True, False)
        load.end()
        await forget(start)
        assert NODE not in keeper.kept

    started(keeper, body)


def test_what_ends_early_in_the_last_moment_has_the_device_file_stored_anew(keeper: Keeper) -> None:
    async def body(start: Start) -> None:
        async def interrupted() -> None:
            assert NODE not in keeper.kept
            raise asyncio.CancelledError

        start.descriptor_store.settled = interrupted  # type: ignore[method-assign]  # where Ctrl-C comes
        with pytest.raises(asyncio.CancelledError):
            await forget(start)
        assert start.absences.serves(GPU)
        await start.until(lambda: NODE in keeper.kept)

    started(keeper, body)


class Tries:
    """What happens after a time happens at once. Counts the tries of absent devices, and how long is waited before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[float | None] = []
        self.count = 0
        timeout, open_again = asyncio.timeout, served.Devices.open_again

        def at_once(seconds: float | None) -> Any:
            self.waits.append(seconds)
            return timeout(None if seconds is None else 0.001)

        def counted(*arguments: Any) -> ServedGpu:
            self.count += 1
            return open_again(*arguments)

        monkeypatch.setattr(absence, "asyncio", SimpleNamespace(**{**vars(asyncio), "timeout": at_once}))
        monkeypatch.setattr(served.Devices, "open_again", counted)


def test_an_absent_device_that_is_forgotten_is_tried_again_only_when_somebody_asks(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = Tries(monkeypatch)

    async def body(start: Start) -> None:
        await start.until(lambda: tries.count)
        await forget(start)
        assert start.store.absent[GPU] == start.served.absent[GPU].reason == absence.GIVEN_UP
        await start.until(lambda: tries.waits[-1] is None, 10.0)
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        count = tries.count
        await asyncio.sleep(0.05)
        assert (tries.count, tries.waits[-1], start.store.absent[GPU]) == (count, None, absence.GIVEN_UP)
        start.absences.hurry()
        await start.until(lambda: start.absences.serves(GPU))
        await start.load("c", GPU, {"t": b"c" * MIB})
        await start.until(lambda: NODE in keeper.kept)

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, body)


@pytest.mark.parametrize("works", [True, False])
def test_a_try_that_is_under_way_brings_back_nothing_that_was_forgotten(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    open_again = served.Devices.open_again

    def slow(*arguments: Any) -> ServedGpu:
        begun.set()
        assert goes_on.wait(60)
        if not works:
            raise DeviceError("not yet")
        return open_again(*arguments)

    async def body(start: Start) -> None:
        monkeypatch.setenv("FAKECUDA_FAIL", "")
        monkeypatch.setattr(served.Devices, "open_again", slow)
        start.absences.hurry()
        await start.until(begun.is_set)
        tries = Tries(monkeypatch)
        await forget(start)
        goes_on.set()
        await start.until(lambda: tries.waits, 10.0)
        assert (tries.waits, start.store.absent[GPU]) == ([None], absence.GIVEN_UP)

    monkeypatch.setenv("FAKECUDA_FAIL", AWAY)
    started(keeper, body)
