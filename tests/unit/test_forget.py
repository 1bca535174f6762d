"""Devices that are forgotten, on the double of the driver in this process: what goes, what stays if that ends early."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import fakecuda
from support.kept_gpu import MIB, WHO, Keeper, Start
from weightd._proto.v1 import handles_pb2
from weightd.errors import DeviceAbsentError
from weightd_daemon.core.lease import LeasePeer
from weightd_daemon.core.limits import UserLimits
from weightd_daemon.handles.attach import AttachHandler
from weightd_daemon.operations.forget import DeviceForgetting

GPU = fakecuda.uuid(0)
PEER = LeasePeer(1, 2, 1000, "python")


@pytest.fixture
def keeper(fake_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """What a daemon has left that held "a" and "b" on the GPU."""

    async def leave() -> None:
        async with Start.of(made, device="host,cuda") as start:
            for name in "ab":
                await start.load(name, GPU, {"t": name.encode() * MIB})

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
