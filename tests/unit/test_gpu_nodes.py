"""The device file of a GPU: which it is, and that it lies in the service manager's store until the GPU is forgotten."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.descriptors import open_descriptors
from support.gpu_nodes import make_node
from weightd.errors import DeviceError
from weightd_daemon.devices import cuda_node, cuda_nvml
from weightd_daemon.devices.driver_thread import AnyThread
from weightd_daemon.devices.host import HostDevice
from weightd_daemon.persistence.gpu_nodes import GpuNodes

UUIDS = [f"GPU-{number}aaa0000-0000-0000-0000-00000000000{number}" for number in range(3)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cuda_node, "DEV", tmp_path)
    monkeypatch.setattr(cuda_node, "GPUS", tmp_path / "gpus")
    monkeypatch.setattr(cuda_node, "minor_number", lambda _: None)
    return tmp_path


def opened(uuid: str) -> Path | None:
    descriptor = cuda_node.open_node(uuid)
    if descriptor is None:
        return None
    try:
        assert not os.get_inheritable(descriptor)
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    finally:
        os.close(descriptor)


def test_the_driver_says_in_proc_which_file_is_a_gpus(folder: Path) -> None:
    nodes = [make_node(folder, uuid, 2 - number) for number, uuid in enumerate(UUIDS[:2])]
    assert [opened(uuid) for uuid in UUIDS] == [*nodes, None]
    (folder / "gpus" / "0000:02:00.0" / "information").write_text("it fell off the bus\n")
    assert opened(UUIDS[0]) is None


def test_nvml_is_asked_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_node(folder, UUIDS[0], 0)
    other = make_node(folder, UUIDS[1], 1)
    monkeypatch.setattr(cuda_node, "minor_number", {UUIDS[0]: 1}.get)
    assert opened(UUIDS[0]) == other
    other.unlink()
    with pytest.raises(FileNotFoundError):
        opened(UUIDS[0])


class Nvml:
    """A library that knows one GPU, in two parts one of which is a MIG instance."""

    class NVMLError(Exception):
        value = 3

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802  # NVML's own names
        if uuid not in (UUIDS[0], f"MIG-{UUIDS[1][4:]}"):
            raise self.NVMLError
        return uuid

    def nvmlDeviceIsMigDeviceHandle(self, handle: str) -> bool:  # noqa: N802  # NVML's own names
        return handle.startswith("MIG-")

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, _: str) -> str:  # noqa: N802  # NVML's own names
        return UUIDS[0]

    def nvmlDeviceGetMinorNumber(self, handle: str) -> int:  # noqa: N802  # NVML's own names
        return {UUIDS[0]: 5}[handle]


def test_a_mig_instance_is_a_part_of_the_gpu_whose_file_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(get=Nvml, failed=lambda _: None)
    monkeypatch.setattr(cuda_nvml, "_library", library)
    assert [cuda_nvml.minor_number(uuid) for uuid in UUIDS] == [5, 5, None]
    library.get = lambda: None
    assert cuda_nvml.minor_number(UUIDS[0]) is None


def test_a_node_that_nobody_made_is_told_of_where_the_driver_is_loaded(folder: Path) -> None:
    cuda_node.GPUS = folder / "proc" / "gpus"
    assert cuda_node.missing_uvm() == ""
    cuda_node.GPUS.parent.mkdir()
    assert "nvidia-uvm is not there: as root, run `nvidia-modprobe -c0 -u`" in cuda_node.missing_uvm()
    (folder / "nvidia-uvm").touch()
    assert cuda_node.missing_uvm() == ""


class Store:
    """Stores what it is given, unless `refuses`."""

    stores = True

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self.refuses = False
        self.dropped: list[str] = []

    def holds(self, name: str) -> bool:
        return name in self.kept

    async def store(self, name: str, descriptor: int) -> None:
        await asyncio.sleep(0)
        if self.refuses:
            raise TimeoutError
        self.kept[name] = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    def drop(self, name: str) -> None:
        self.dropped.append(name)
        del self.kept[name]


class Gpu:
    calls = AnyThread()

    def __init__(self, uuid: str, *, lasting: bool = True) -> None:
        self.uuid, self.lasting = uuid, lasting

    def open_node(self) -> int | None:
        return cuda_node.open_node(self.uuid)


async def idle(nodes: GpuNodes) -> None:
    while nodes._tasks:
        await asyncio.wait(list(nodes._tasks.values()))
        await asyncio.sleep(0)


def test_the_file_of_each_gpu_whose_memory_outlives_the_daemon_is_stored_once(folder: Path) -> None:
    for number, uuid in enumerate(UUIDS):
        make_node(folder, uuid, number)
    devices: Any = {"host": HostDevice(), UUIDS[0]: Gpu(UUIDS[0]), UUIDS[1]: Gpu(UUIDS[1], lasting=False)}
    store: Any = Store()
    before = open_descriptors()

    async def steps() -> None:
        nodes = GpuNodes(store, devices)
        for _ in range(2):
            for uuid in devices:
                nodes.keep(uuid)
            await idle(nodes)
        assert store.kept == {f"gpu.{UUIDS[0]}": "nvidia0"}
        nodes.keep(UUIDS[1])
        await nodes.drop(UUIDS[0])
        await nodes.drop(UUIDS[1])
        assert (store.kept, store.dropped) == ({}, [f"gpu.{UUIDS[0]}"])
        nodes.keep(UUIDS[0])
        (task,) = nodes._tasks.values()
        await nodes.drop(UUIDS[0])  # while it is on its way
        await task
        assert store.kept == {}
        nodes.keep(UUIDS[0])
        while not nodes._storing:  # noqa: ASYNC110  # a thread opens it
            await asyncio.sleep(0)
        await nodes.drop(UUIDS[0])  # while it is being stored
        assert (store.kept, store.dropped) == ({}, [f"gpu.{UUIDS[0]}"] * 2)

    asyncio.run(steps())
    assert open_descriptors() == before


class Slow(Gpu):
    """Its driver takes until `goes_on`."""

    def __init__(self, uuid: str) -> None:
        super().__init__(uuid)
        self.goes_on = threading.Event()

    def open_node(self) -> int | None:
        assert self.goes_on.wait(60)
        return super().open_node()


def test_a_gpu_that_does_not_answer_is_forgotten_without_it(folder: Path) -> None:
    make_node(folder, UUIDS[0])
    store: Any = Store()
    before = open_descriptors()

    async def steps() -> None:
        slow = Slow(UUIDS[0])
        devices: Any = {UUIDS[0]: slow}
        nodes = GpuNodes(store, devices)
        nodes.keep(UUIDS[0])
        task = nodes._tasks[UUIDS[0]]
        await asyncio.sleep(0)  # it asks
        await asyncio.wait_for(nodes.drop(UUIDS[0]), 10)
        devices[UUIDS[0]] = Gpu(UUIDS[0])  # it was opened anew
        nodes.keep(UUIDS[0])
        await idle(nodes)
        assert store.kept == {f"gpu.{UUIDS[0]}": "nvidia0"}
        await nodes.drop(UUIDS[0])
        slow.goes_on.set()
        await task
        assert store.kept == {}

    asyncio.run(steps())
    assert open_descriptors() == before


@pytest.mark.parametrize(("refused", "why"), [(False, "No such file"), (True, "does not answer")])
def test_a_file_that_cannot_be_kept_is_told_of_and_nothing_else_fails(
    refused: bool, why: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    node = make_node(folder, UUIDS[0])
    store: Any = Store()
    store.refuses = refused
    if not refused:
        node.unlink()

    async def steps() -> None:
        devices: Any = {UUIDS[0]: Gpu(UUIDS[0])}
        nodes = GpuNodes(store, devices)
        nodes.keep(UUIDS[0])
        await idle(nodes)

    asyncio.run(steps())
    (said,) = caplog.messages
    assert why in said
    assert "its memory may not outlive this daemon" in said
    assert store.kept == {}


def test_a_device_file_is_no_segment(folder: Path) -> None:
    """Whatever a root record says."""
    descriptor = os.open(make_node(folder, UUIDS[0]), os.O_RDWR)
    try:
        with pytest.raises(DeviceError):
            HostDevice().adopt(descriptor, 4096)
    finally:
        os.close(descriptor)
