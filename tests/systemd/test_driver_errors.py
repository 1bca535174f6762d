"""A driver that fails at a start, once or all the time, costs nothing that is kept: after the next good start, or when
it is tried again, everything is resident and has its bytes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import weightd
from support import checkpoints, fakecuda, http
from support.backends import Backend
from support.content import content
from support.daemon import Daemon, eventually
from support.gpu_nodes import make_node
from support.kept_gpu import MIB, WHO, Keeper, Start
from support.launch import launcher
from support.manager import Manager
from support.worker import Worker
from weightd_daemon.core.events import DeviceAbsent, DeviceBack

StartDaemon = Callable[..., Daemon]
Spawn = Callable[[Daemon], Worker]

CALLS = (
    "cuInit",
    "cuDeviceGetCount",
    "cuDeviceGetUuid",
    "cuMemGetAllocationGranularity",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemImportFromShareableHandle",
)
ERRORS = {
    802: "SYSTEM_NOT_READY",
    803: "SYSTEM_DRIVER_MISMATCH",
    999: "UNKNOWN",
    46: "DEVICE_UNAVAILABLE",
    2: "OUT_OF_MEMORY",
}
HOW = {"first call": ":1", "all of one start": ""}
TENSORS = {f"t{number}": bytes([number]) * (MIB // 2) for number in range(4)}
GPU = fakecuda.uuid(0)


# -- choice and restore, without processes -----------------------------------------------------------------------------


@pytest.fixture
def keeper(fake_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    """What a daemon has left that held one checkpoint on the GPU, pinned."""

    async def leave() -> None:
        async with Start.of(made, device="cuda") as start:
            checkpoint = await start.load("a", GPU, TENSORS)
            start.catalog.pin(WHO, checkpoint)

    monkeypatch.setenv("FAKECUDA_FAIL", "")
    made = Keeper()
    asyncio.run(leave())
    made.dropped.clear()
    yield made
    made.close()
    assert fakecuda.device_bytes(0) == 0


@pytest.mark.parametrize("then", ["next start", "tried again"])
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("call", CALLS)
def test_nothing_that_is_kept_is_lost_to_an_error_of_the_driver(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch, call: str, code: int, how: str, device: str, then: str
) -> None:
    before, kept = keeper.rows(), {*keeper.kept}

    async def fail() -> None:
        monkeypatch.setenv("FAKECUDA_FAIL", f"{call}:{code}{HOW[how]}")
        async with Start.of(keeper, device=device) as start:
            monkeypatch.setenv("FAKECUDA_FAIL", "")
            assert start.served.default == GPU
            (checkpoint,) = start.catalog.visible(WHO)
            assert (start.catalog.names(checkpoint), checkpoint.pins) == (["a"], {WHO.uid})
            assert start.store.memories[GPU].used == 2 * MIB
            if not HOW[how] and (call, code) != ("cuMemCreate", 2):  # a GPU that is full is served
                assert start.state("a") == "absent"
            if start.state("a") == "absent":
                assert [type(event) for event in start.events] == [DeviceAbsent]
                assert f"CUDA_ERROR_{ERRORS[code]}" in start.store.absent[GPU]
            if then == "tried again":
                start.absences.hurry()
                await start.until(lambda: not start.store.absent)
                assert start.bytes_of("a") == list(TENSORS.values())
                absent = [type(event) for event in start.events]
                assert absent in ([], [DeviceAbsent, DeviceBack])
                later = await start.load("b", GPU, {"t0": TENSORS["t0"], "new": b"x" * MIB})
                assert start.bytes_of("b") == [TENSORS["t0"], b"x" * MIB]
                start.store.remove(later)

    async def see() -> None:
        async with Start.of(keeper, device=device) as start:
            assert start.store.absent == {}
            assert start.bytes_of("a") == list(TENSORS.values())

    asyncio.run(fail())
    assert kept <= {*keeper.kept}
    assert keeper.rows() == before
    asyncio.run(see())
    assert fakecuda.device_bytes(0) == 2 * MIB


# -- with daemons ------------------------------------------------------------------------------------------------------

vmm = pytest.mark.backends("cuda_vmm", double_only=True)
SEED = "driver-errors"


def saved(folder: Path) -> Path:
    return checkpoints.write_random(folder / "a.safetensors", 2, MIB, SEED)


def bytes_attached(client: weightd.Client) -> list[bytes]:
    with client.attach("a") as attachment:
        return [content(attachment, key.name) for key in sorted(attachment.tensors)]


def fails(daemon: Daemon, backend: Backend, rules: str) -> None:
    """Kill a daemon, and start the next one with a driver that fails in it, and in nothing else."""
    daemon.kill()
    daemon.backend = backend.with_knobs(fail=rules, fail_in="weightd_daemon serve")
    daemon.start()


@vmm
@pytest.mark.parametrize(
    ("call", "rule"),
    [
        *((call, "{}:802") for call in CALLS),
        *((call, "{}:999:1") for call in ("cuInit", "cuMemImportFromShareableHandle")),
        *(pytest.param(call, "{}:999:1", marks=pytest.mark.sweep) for call in CALLS[1:-1]),
    ],
)
def test_the_next_daemon_has_what_one_with_a_failing_driver_could_not_serve(
    start_daemon: StartDaemon, manager: Manager, backend: Backend, tmp_path: Path, call: str, rule: str
) -> None:
    """The settings of the two alternate: each is met with each call. A call that fails once is made again at once."""
    device = "auto" if (CALLS.index(call) + len(rule)) % 2 else "cuda"
    daemon = start_daemon(manager=manager, device=device, transport="auto", budget="64MiB")
    client = daemon.connect()
    client.load(saved(tmp_path), name="a", pin=True)
    expected = bytes_attached(client)
    client.close()
    manager.settle()
    kept = {*manager.names()}

    fails(daemon, backend, rule.format(call))
    client = daemon.connect()
    (checkpoint,) = client.checkpoints()
    absent = rule.endswith("802") or call == "cuMemImportFromShareableHandle"
    assert (checkpoint.names, checkpoint.device, checkpoint.pinned) == (("a",), backend.uuid, True)
    assert checkpoint.state == ("absent" if absent else "resident")
    if absent:
        said = f"device {backend.uuid} is absent: .*CUDA_ERROR"
        with pytest.raises(weightd.DeviceAbsentError, match=f"checkpoint a: {said}"):
            client.attach("a")
        with pytest.raises(weightd.DeviceAbsentError, match=said):
            client.load(saved(tmp_path))
    else:
        assert bytes_attached(client) == expected
    client.close()
    manager.settle()
    assert kept <= {*manager.names()}

    daemon.kill()
    daemon.backend = backend
    daemon.start()
    client = daemon.connect()
    assert [(c.names, c.state, c.pinned) for c in client.checkpoints()] == [(("a",), "resident", True)]
    assert bytes_attached(client) == expected


@vmm
def test_an_absent_device_is_shown_as_it_is_and_taken_up_while_the_daemon_serves(
    start_daemon: StartDaemon, manager: Manager, backend: Backend, tmp_path: Path, spawn: Spawn
) -> None:
    rules, page = tmp_path / "rules", tmp_path / "m.sock"
    rules.write_text("")
    failing = backend.with_knobs(rules=rules, fail_in="weightd_daemon serve")
    daemon = start_daemon(
        failing, manager=manager, device="auto", transport="auto", budget="64MiB", metrics=str(page)
    )  # fmt: skip
    path, other = saved(tmp_path), checkpoints.write_random(tmp_path / "b.safetensors", 1, MIB, "other")
    client = daemon.connect()
    client.load(path, name="a", device=backend.uuid)
    worker = spawn(daemon)
    worker.run("import weightd\nclient = weightd.connect(timeout=60)\nattachment = client.attach('a')")
    expected = bytes_attached(client)
    client.close()
    daemon.kill()
    rules.write_text("cuInit:802")
    daemon.start()

    client = daemon.connect()
    eventually(lambda: [lease.pid for lease in client.leases()] == [worker.pid], what="its holder says who it is")
    refused = daemon.command("load", other, check=False)
    assert (refused.returncode, refused.stdout) == (75, "")
    assert f"device {backend.uuid} is absent: " in refused.stderr
    assert "CUDA_ERROR_SYSTEM_NOT_READY" in refused.stderr
    held = daemon.command("rm", "a", check=False)
    assert (held.returncode, str(worker.pid) in held.stderr) == (4, True)
    assert "absent" in daemon.command("ls").stdout
    assert "note       " in daemon.command("inspect", "a").stdout
    assert client.names()[0].state == "absent"
    assert client.inspect("a").checkpoint.state == "absent"
    with client.attach("a", manifest_only=True) as attachment:
        assert len(attachment.tensors) == 2
    host, gpu = client.stats().devices
    assert (host.absence, gpu.kind, gpu.used_bytes, gpu.live_bytes) == ("", "cuda_vmm", 2 * MIB, 2 * MIB)
    assert "SYSTEM_NOT_READY" in gpu.absence
    assert f"{backend.uuid} is absent: " in daemon.command("stats").stdout
    _, series = http.get(page, "/metrics")
    assert f'weightd_device_absent{{device="{backend.uuid}",kind="cuda_vmm"}} 1.0' in series
    assert 'weightd_checkpoints{state="absent"} 1.0' in series
    client.load(other, name="b", device="host")

    rules.write_text("")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: client.inspect("a").checkpoint.state == "resident", what="it is taken up")
    assert bytes_attached(client) == expected
    eventually(
        lambda: [lease.pid for lease in client.leases() if not lease.waiting] == [worker.pid], what="it is held still"
    )
    assert [event.kind for event in client.events() if event.kind.startswith("device")] == [
        "device_absent", "device_back",
    ]  # fmt: skip
    client.load(other, name="b", device=backend.uuid)
    worker.close()


@vmm
def test_only_rm_and_forget_let_go_of_what_an_absent_device_keeps(
    start_daemon: StartDaemon, manager: Manager, backend: Backend, tmp_path: Path
) -> None:
    rules = tmp_path / "rules"
    rules.write_text("")
    failing = backend.with_knobs(rules=rules, fail_in="weightd_daemon serve")
    daemon = start_daemon(failing, manager=manager, device="auto", transport="auto", budget="64MiB")
    client = daemon.connect()
    for name in "abc":
        path = checkpoints.write_random(tmp_path / f"{name}.safetensors", 2, MIB, name)
        client.load(path, name=name, device=backend.uuid)
    client.load(path, name="h", device="host")
    client.close()
    daemon.kill()
    rules.write_text("cuDeviceGetUuid:999")
    daemon.start()

    client = daemon.connect()
    assert client.remove("a") == 2 * MIB
    eventually(lambda: backend.device_bytes() == 4 * MIB, what="its memory is gone")
    daemon.command("drain", "--timeout", "10")
    daemon.command("drain", "--undo")
    assert [(c.name, c.state) for c in client.checkpoints()] == [("b", "absent"), ("c", "absent")]
    said = daemon.command("drain", "--forget", backend.uuid).stdout
    assert said == f"device {backend.uuid} is forgotten: drained 2 checkpoints, freed 4.00 MiB\n"
    assert (backend.device_bytes(), client.checkpoints()) == (0, [])
    assert not [name for name in manager.names() if name.startswith(("seg", "man"))]

    rules.write_text("")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: not client.stats().devices[1].absence, what="it serves again")
    client.load(path, name="c", device=backend.uuid)


@vmm
def test_a_device_that_serves_can_be_let_go_of_and_taken_back(
    start_daemon: StartDaemon, manager: Manager, backend: Backend, tmp_path: Path
) -> None:
    node, nodes = f"gpu.{backend.uuid}", tmp_path / "nodes"
    make_node(nodes, backend.uuid)
    argv = launcher(nodes=nodes)
    daemon = start_daemon(manager=manager, argv=argv, device="auto", transport="auto", budget="64MiB")
    client, path = daemon.connect(), saved(tmp_path)
    client.load(path, name="a", device=backend.uuid, pin=True)
    eventually(lambda: manager.names().count(node) == 1, what="its device file is kept open")
    client.close()
    daemon.kill()
    daemon.start()
    assert manager.names().count(node) == 1, "the next daemon goes by the one that is there"
    client = daemon.connect()
    client.load(path, name="h", device="host")
    with client.attach("a", device=backend.uuid):
        held = daemon.command("drain", "--forget", backend.uuid, "--timeout", "0", check=False)
        assert (held.returncode, "nothing was let go of" in held.stderr) == (4, True)
    client.attach("a", device=backend.uuid).close()

    assert daemon.command("drain", "--forget", "host", check=False).returncode == 2
    daemon.command("drain", "--forget", backend.uuid)
    assert [c.device for c in client.checkpoints()] == ["host"]
    assert (backend.device_bytes(), manager.names().count(node)) == (0, 0)
    eventually(lambda: len([name for name in manager.names() if name.startswith("seg")]) == 1, what="only the host's")
    refused = daemon.command("load", path, "--device", backend.uuid, check=False)
    assert (refused.returncode, "let go of" in refused.stderr) == (75, True)
    daemon.command("drain", "--undo")
    eventually(lambda: not client.stats().devices[1].absence, what="it serves again")
    client.load(path, name="a", device=backend.uuid)
    eventually(lambda: manager.names().count(node) == 1, what="and its device file is kept open again")


@vmm
def test_another_gpu_at_its_number_is_another_device(
    start_daemon: StartDaemon, manager: Manager, backend: Backend, tmp_path: Path
) -> None:
    two = backend.with_knobs(devices=2)
    daemon = start_daemon(two.with_knobs(visible="0"), manager=manager, device="cuda:0", budget="64MiB")
    client, path = daemon.connect(), saved(tmp_path)
    client.load(path, name="a")
    client.close()
    daemon.kill()
    daemon.backend = two.with_knobs(visible="1")
    daemon.start()
    client = daemon.connect()
    assert [(c.device, c.state) for c in client.checkpoints()] == [(fakecuda.uuid(0), "absent")]
    assert client.load(path, name="b").device == fakecuda.uuid(1)
    client.close()
    daemon.kill()
    daemon.backend = two.with_knobs(visible="0,1")
    daemon.start()
    client = daemon.connect()
    assert {(c.device, c.state) for c in client.checkpoints()} == {
        (fakecuda.uuid(0), "resident"), (fakecuda.uuid(1), "absent"),
    }  # fmt: skip
