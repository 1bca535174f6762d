"""A driver that hangs at a start keeps nobody from the rest and loses nothing, and no thread hangs beside another."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import weightd
from support import checkpoints, fakecuda
from support.backends import Backend
from support.content import content
from support.daemon import Daemon, eventually
from support.kept_gpu import MIB, WHO, Keeper, Start
from support.launch import launcher
from support.manager import Manager
from weightd_daemon.config.settings import TemporaryConfigError
from weightd_daemon.core.events import DeviceAbsent, DeviceBack
from weightd_daemon.devices import cuda_nvml, driver_thread, opening_thread
from weightd_daemon.operations import absence
from weightd_daemon.operations.absence import AbsentDevices

StartDaemon = Callable[..., Daemon]

CALLS = {
    "cuInit": "cuInit",
    "cuDeviceGetCount": "cuDeviceGetCount",
    "cuDeviceGetUuid": "cuDeviceGetUuid",
    "cuDeviceGetName": "cuDeviceGetName",
    "cuDeviceTotalMem": "cuDeviceTotalMem",
    "nvmlInitWithFlags": "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetMemoryInfo": "nvmlDeviceGetMemoryInfo",
    "cuMemGetAllocationGranularity": "cuMemGetAllocationGranularity",
    "cuMemCreate": "cuMemCreate",
    "cuMemExportToShareableHandle": "cuMemCreate",
    "cuMemRelease": "cuMemRelease",
    "cuMemImportFromShareableHandle": "cuMemImportFromShareableHandle",
}
"""The function that hangs, and the call that it is told as."""
LOOKS = ("cuInit", "cuDeviceGetCount", "cuDeviceGetUuid")
"""Without these nobody knows which GPUs there are."""
TENSORS = {f"t{number}": bytes([number]) * (MIB // 2) for number in range(4)}
GPU = fakecuda.uuid(0)


# -- choice and restore, without processes -----------------------------------------------------------------------------


@pytest.fixture
def hang(fake_driver: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Have a function hang in this process while the file is there whose path is returned, or until the test ends."""
    path = tmp_path / "hangs"
    monkeypatch.setenv("FAKECUDA_HANG_WHILE", str(path))
    monkeypatch.setenv("FAKECUDA_FAIL", "")
    for module, name in ((opening_thread, "CALL_SECONDS"), (opening_thread, "START_SECONDS")):
        monkeypatch.setattr(module, name, 0.5)
    monkeypatch.setattr(driver_thread, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(absence, "END_SECONDS", 0.1)

    def hangs(function: str) -> Path:
        path.touch()
        monkeypatch.setenv("FAKECUDA_HANG", function)
        monkeypatch.setattr(cuda_nvml, "_library", cuda_nvml._Library())  # it may be ready by now
        return path

    yield hangs
    path.unlink(missing_ok=True)
    eventually(lambda: not hanging(), what="every thread has ended")


def hanging() -> list[str]:
    """The threads that make calls of the driver in this process."""
    return [thread.name for thread in threading.enumerate() if thread.name in ("weightd-opening", "weightd-driver")]


@pytest.fixture
def keeper(fake_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """What a daemon has left that held one checkpoint on the GPU, pinned."""

    async def leave() -> None:
        async with Start.of(made, device="host,cuda") as start:
            start.catalog.pin(WHO, await start.load("a", GPU, TENSORS))

    made = Keeper()
    asyncio.run(leave())
    made.dropped.clear()
    yield made
    made.close()
    eventually(lambda: fakecuda.device_bytes(0) == 0, what="nothing is left of what came late")


@pytest.mark.parametrize("device", ["auto", "host,cuda"])
@pytest.mark.parametrize("function", CALLS)
def test_what_is_kept_is_absent_while_a_call_hangs_and_taken_up_when_it_is_back(
    keeper: Keeper, hang: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, function: str, device: str
) -> None:
    before, kept, tried = keeper.rows(), {*keeper.kept}, list[str]()

    async def counted(self: AbsentDevices, uuid: str) -> None:
        await plain(self, uuid)
        tried.append(uuid)

    async def waits() -> None:
        path = hang(function)
        async with Start.of(keeper, device=device) as start:
            assert start.served.default == GPU
            assert start.state("a") == "absent"
            said = (
                rf"(it|the driver) does not answer since [\d:]+, in {CALLS[function]}; what is kept on it stays kept, "
            )
            assert re.match(said, start.store.absent[GPU])
            await start.load("h", "host", {"t": b"h" * 4096})
            assert len(hanging()) == 1
            for number in range(3):
                start.absences.hurry()
                await start.until(lambda number=number: len(tried) > number)
            assert re.match(said, start.store.absent[GPU])
            assert len(hanging()) == 1
            path.unlink()
            await start.until(lambda: not hanging())
            start.absences.hurry()
            await start.until(lambda: not start.store.absent)
            assert [type(event) for event in start.events if isinstance(event, DeviceAbsent | DeviceBack)] == [
                DeviceAbsent, DeviceBack,
            ]  # fmt: skip
            assert start.bytes_of("a") == list(TENSORS.values())
            start.catalog.remove(WHO, "h")

    plain = AbsentDevices._try
    monkeypatch.setattr(AbsentDevices, "_try", counted)
    asyncio.run(waits())
    assert kept <= {*keeper.kept}
    assert keeper.rows() == before


@pytest.mark.parametrize("function", [call for call in CALLS if "Import" not in call])
def test_without_anything_kept_the_rest_is_served_or_the_service_manager_tries_again(
    hang: Callable[[str], Path], function: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def waits(device: str) -> None:
        keeper = Keeper()
        try:
            async with Start.of(keeper, device=device) as start:
                await start.load("h", "host", {"t": b"h" * 4096})
                assert start.store.absent.keys() == ({GPU} if device != "auto" or function not in LOOKS else set())
                path.unlink()
                await start.until(lambda: not hanging())
                start.absences.hurry()
                await start.until(lambda: not start.store.absent)
                if GPU in start.store.memories:
                    await start.load("g", GPU, TENSORS)
        finally:
            keeper.close()

    path = hang(function)
    said = rf"does not answer since [\d:]+, in {CALLS[function]}"
    for device in ("cuda", "host,cuda")[: 2 if function in LOOKS else 1]:
        with pytest.raises(TemporaryConfigError, match=said) as caught:
            asyncio.run(waits(device))
        assert caught.value.exit_code == 75
    for device in ("auto", f"host,{GPU}"):
        caplog.clear()
        asyncio.run(waits(device))
        assert re.search(said, caplog.text)
        eventually(lambda: not hanging(), what="what came late has ended")
        path = hang(function)


# -- with daemons ------------------------------------------------------------------------------------------------------

SEED = "hanging-start"


def bytes_attached(client: weightd.Client) -> list[bytes]:
    with client.attach("a") as attachment:
        return [content(attachment, key.name) for key in sorted(attachment.tensors)]


def hangs_in(backend: Backend, function: str, path: Path) -> Backend:
    """A driver that hangs in daemons, and in nothing else, while `path` is there."""
    return backend.with_knobs(hang=function, hang_while=path, fail_in="support.launch")


IMPATIENT = {"init": 1.0, "opening": 1.0, "answer": 1.0}


@pytest.mark.backends("cuda_vmm", double_only=True)
@pytest.mark.parametrize(
    "function",
    [
        "cuInit",
        "nvmlInitWithFlags",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("cuMemGetAllocationGranularity", "cuMemCreate")),
    ],
)
def test_a_daemon_serves_the_rest_while_its_driver_hangs_and_everything_when_it_is_back(
    start_daemon: StartDaemon, manager: Manager, backend: Backend, tmp_path: Path, function: str
) -> None:
    path = tmp_path / "hangs"
    daemon = start_daemon(
        hangs_in(backend, function, path), manager=manager, argv=launcher(**IMPATIENT), device="auto", transport="auto",
        budget="64MiB",
    )  # fmt: skip
    client, file = daemon.connect(), checkpoints.write_random(tmp_path / "a.safetensors", 2, MIB, SEED)
    eventually(lambda: not client.stats().devices[1].absence, what="the GPU serves, however slow this machine is")
    client.load(file, name="a", device=backend.uuid, pin=True)
    expected = bytes_attached(client)
    client.close()
    manager.settle()
    kept = {name for name in manager.names() if name.startswith(("seg", "man"))}
    daemon.kill()
    path.touch()

    daemon.start()
    client = daemon.connect()
    (checkpoint,) = client.checkpoints()
    assert (checkpoint.names, checkpoint.state, checkpoint.pinned) == (("a",), "absent", True)
    with pytest.raises(weightd.DeviceAbsentError, match=rf"device {backend.uuid} is absent: .*does not answer since"):
        client.load(file)
    client.load(checkpoints.write_random(tmp_path / "h.safetensors", 1, MIB, "other"), name="h", device="host")
    assert "absent" in daemon.command("ls").stdout
    assert "does not answer since" in daemon.command("stats").stdout
    client.close()
    assert daemon.stop() == 0, "the call that hangs does not keep it from its end"
    manager.settle()
    assert kept <= {*manager.names()}

    daemon.start()
    client = daemon.connect()
    assert [(c.device, c.state) for c in client.checkpoints()] == [(backend.uuid, "absent"), ("host", "resident")]
    path.unlink()
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: client.inspect("a").checkpoint.state == "resident", what="it is taken up")
    assert bytes_attached(client) == expected


@pytest.mark.backends("cuda_vmm", double_only=True)
def test_a_daemon_that_was_told_to_serve_a_gpu_alone_ends_with_75_while_its_driver_hangs(
    start_daemon: StartDaemon, backend: Backend, tmp_path: Path
) -> None:
    path = tmp_path / "hangs"
    daemon = start_daemon(hangs_in(backend, "cuInit", path), argv=launcher(init=1.0), device="auto", budget="64MiB")
    assert daemon.stop() == 0
    path.touch()
    daemon.start()
    client = daemon.connect()
    assert [device.kind for device in client.stats().devices] == ["host"]
    assert re.search(
        "no GPU is served, only host memory: the driver does not answer since .*, in cuInit", daemon.logged()
    )
    client.close()
    assert daemon.stop() == 0

    daemon._settings["device"] = "cuda"
    with pytest.raises(AssertionError, match="did not start"):
        daemon.start()
    assert daemon.process is not None
    assert daemon.process.returncode == 75
    assert re.search("weightd: .*device = 'cuda': the driver does not answer since .*, in cuInit", daemon.logged())


@pytest.mark.backends("cuda_vmm", double_only=True)
def test_a_daemon_can_be_stopped_while_its_driver_hangs_at_the_start(
    start_daemon: StartDaemon, backend: Backend, tmp_path: Path
) -> None:
    """With the limit that users have: nobody waits for that."""
    path, log = tmp_path / "hangs", tmp_path / "calls"
    daemon = start_daemon(
        hangs_in(backend, "cuInit", path).with_knobs(log=log), argv=launcher(), device="host,cuda", budget="64MiB"
    )
    assert daemon.stop() == 0
    path.touch()
    log.write_text("")

    def stops() -> float:
        eventually(lambda: "cuInit" in log.read_text(), what="the driver hangs")
        assert daemon.process is not None
        daemon.process.terminate()
        return time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(stops)
        with pytest.raises(AssertionError, match="did not start"):
            daemon.start()
    assert daemon.process is not None
    assert daemon.process.returncode == 0
    assert time.monotonic() - told.result() < opening_thread.START_SECONDS / 2
