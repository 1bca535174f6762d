"""GPU memory, from the daemon to the tensor: on the double of the driver, and on a real GPU where one is at hand."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
from support import checkpoints, fakecuda
from support.backends import CUDA, Backend
from support.background import background
from support.content import content
from support.daemon import ROOT, Daemon, environment, eventually
from support.launch import launcher
from support.leash import leashed
from support.loader import STOP, resume, wait_stopped
from support.worker import Worker

Spawn = Callable[[Daemon], Worker]
StartDaemon = Callable[..., Daemon]
MIB = 1 << 20

every_gpu = pytest.mark.backends(*CUDA)
on_the_double = pytest.mark.backends(*CUDA, double_only=True)
vmm_on_the_double = pytest.mark.backends("cuda_vmm", double_only=True)
ipc_on_the_double = pytest.mark.backends("cuda_ipc", double_only=True)

ATTACH = """
import weightd
from support.content import content
client = weightd.connect(timeout=60)
attachment = client.attach(reference, device=device)
result = [content(attachment, name)[:8].hex() for name in names]
"""


def make(folder: Path, name: str, count: int = 4, size: int = MIB) -> Path:
    return checkpoints.write_random(folder / f"{name}.safetensors", count, size, seed=name)


def heads(name: str, count: int = 4, size: int = MIB) -> list[str]:
    return [checkpoints.random_bytes((name, i), size)[:8].hex() for i in range(count)]


def attach(worker: Worker, reference: str, device: str = "cuda:0", count: int = 4) -> list[str]:
    found: list[str] = worker.run(ATTACH, reference=reference, device=device, names=[f"t{i}" for i in range(count)])
    return found


# -- one GPU -----------------------------------------------------------------------------------------------------------


@every_gpu
def test_processes_share_what_one_has_loaded(daemon: Daemon, backend: Backend, spawn: Spawn, tmp_path: Path) -> None:
    path = make(tmp_path, "base")
    first, second = spawn(daemon), spawn(daemon)
    assert attach(first, str(path), backend.device) == heads("base")
    assert attach(second, str(path), backend.device) == heads("base")
    client = daemon.connect()
    (checkpoint,) = client.checkpoints()
    assert (checkpoint.device, checkpoint.leases) == (backend.uuid, 2)
    (device,) = client.stats().devices
    assert (device.uuid, device.kind, device.live_bytes) == (backend.uuid, backend.kind, 4 * MIB)
    assert device.used_bytes >= device.live_bytes
    assert daemon.allocates(device.used_bytes, device.used_bytes)
    details = client.inspect(checkpoint.name)
    assert details.kind == backend.kind
    assert ("clients can write" in details.note) == (backend.kind == "cuda_ipc")


@every_gpu
def test_a_client_that_says_no_device_gets_the_only_one(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    client = daemon.connect()
    report = client.load_report(make(tmp_path, "base"), name="base")
    assert report is not None
    assert report.device == backend.uuid
    with client.attach("base") as attachment:
        assert attachment.device == backend.uuid
        assert content(attachment, "t2") == checkpoints.random_bytes(("base", 2), MIB)
    with pytest.raises(weightd.NotFoundError, match=r"device 'host': this daemon serves GPU-"):
        client.load(make(tmp_path, "base"), device="host")


@every_gpu
def test_a_gpu_is_named_by_the_beginning_of_its_uuid(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    client = daemon.connect()
    path = make(tmp_path, "base")
    assert client.load(path, device=backend.uuid[:12]).device == backend.uuid
    with pytest.raises(weightd.NotFoundError, match="this daemon serves"):
        client.load(path, device=backend.uuid[:11] + "xyz")


@every_gpu
def test_checkpoints_with_equal_tensors_share_them(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    client = daemon.connect()
    client.load(make(tmp_path, "base"), name="base")
    tuned = checkpoints.write_random(
        tmp_path / "tuned.safetensors", 4, MIB, seed="tuned", shared={1: ("base", 1), 3: ("base", 3)}
    )
    report = client.load_report(tuned, name="tuned")
    assert report is not None
    assert (report.unique_bytes, report.shared_bytes) == (2 * MIB, 2 * MIB)
    (device,) = client.stats().devices
    assert device.live_bytes == 6 * MIB
    with client.attach("tuned") as attachment:
        for i in range(4):
            seed = "base" if i in (1, 3) else "tuned"
            assert content(attachment, f"t{i}") == checkpoints.random_bytes((seed, i), MIB)
    verified = client.verify()
    assert verified.done_bytes == 6 * MIB


@every_gpu
def test_names_with_equal_bytes_have_addresses_of_their_own(daemon: Daemon, tmp_path: Path) -> None:
    data = checkpoints.random_bytes("same", MIB)
    path = checkpoints.write(tmp_path / "twice.safetensors", dict.fromkeys(("a", "b", "c"), ("U8", (MIB,), data)))
    client = daemon.connect()
    report = client.load_report(path)
    assert report is not None
    assert report.unique_bytes == MIB
    with client.attach(path) as attachment:
        buffers = [attachment.buffer(name) for name in ("a", "b", "c")]
        assert len({int(buffer.handle) for buffer in buffers}) == 3
        assert {content(attachment, name) for name in ("a", "b", "c")} == {data}


@every_gpu
def test_a_tensor_larger_than_a_segment_may_be(start_daemon: StartDaemon, backend: Backend, tmp_path: Path) -> None:
    if backend.is_real_gpu:
        size = 1100 * MIB
        daemon = start_daemon(budget="2GiB")
    else:
        pytest.skip("a gigabyte takes long on the double; the books are tested in tests/unit/test_core_memory.py")
    path = tmp_path / "large.safetensors"
    checkpoints.write(path, {"large": ("U8", (size,), bytes(size))})
    with daemon.connect().attach(path) as attachment:
        assert content(attachment, "large") == bytes(size)


# -- lifetimes ---------------------------------------------------------------------------------------------------------


@pytest.mark.backends("cuda_vmm")
def test_clients_outlive_a_killed_daemon(daemon: Daemon, backend: Backend, spawn: Spawn, tmp_path: Path) -> None:
    worker = spawn(daemon)
    attach(worker, str(make(tmp_path, "base")), backend.device)
    daemon.kill()
    found = worker.run("result = [content(attachment, name)[:8].hex() for name in names]")
    assert found == heads("base")
    worker.run("attachment.close(); del attachment")
    eventually(lambda: not backend.device_bytes(), what="memory of a daemon that is gone")
    daemon.start()


@every_gpu
def test_memory_goes_with_the_last_tensor(daemon: Daemon, backend: Backend, spawn: Spawn, tmp_path: Path) -> None:
    worker = spawn(daemon)
    attach(worker, str(make(tmp_path, "base")), backend.device)
    worker.run("kept = attachment.buffer('t1'); attachment.close(); del attachment, client")
    client = daemon.connect()
    (lease,) = client.leases()
    assert lease.pid == worker.pid
    with pytest.raises(weightd.InUseError):
        client.remove(client.checkpoints()[0].content_digest)
    worker.run("del kept")
    eventually(lambda: not client.leases())
    client.remove(client.checkpoints()[0].content_digest)
    eventually(lambda: client.stats().devices[0].used_bytes == 0)


@vmm_on_the_double
def test_a_write_to_a_mapping_harms_only_the_writer(
    daemon: Daemon, backend: Backend, spawn: Spawn, tmp_path: Path
) -> None:
    path = str(make(tmp_path, "base"))
    writer, reader = spawn(daemon), spawn(daemon)
    for worker in (writer, reader):
        attach(worker, path, backend.device)
    code = writer.run(
        "from weightd._mapping import cuda_driver\n"
        "address = int(attachment.buffer('t0').handle)\n"
        "with cuda_driver.on_device(0):\n"
        "    try: cuda_driver.call('cuMemsetD8', address, 1, 64)\n"
        "    except weightd.DeviceError as error: result = error.code\n"
    )
    assert code == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert reader.run("result = [content(attachment, name)[:8].hex() for name in names]") == heads("base")
    assert attach(spawn(daemon), path, backend.device) == heads("base")
    writer.kill()
    eventually(lambda: len(daemon.connect().leases()) == 2)


@vmm_on_the_double
def test_a_store_by_the_cpu_into_the_double_ends_the_writer(
    daemon: Daemon, backend: Backend, spawn: Spawn, tmp_path: Path
) -> None:
    """How a kernel's store to read-only memory shows on the double, where addresses are the host's."""
    writer = spawn(daemon)
    attach(writer, str(make(tmp_path, "base")), backend.device)
    writer.start("import ctypes; ctypes.memset(int(attachment.buffer('t0').handle), 1, 1)")
    assert writer.process.wait(60) == -signal.SIGSEGV
    eventually(lambda: not daemon.connect().leases())


@on_the_double
def test_a_forked_child_calls_no_driver_function(
    start_daemon: StartDaemon, backend: Backend, workers: list[Worker], tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    daemon = start_daemon()
    worker = Worker(daemon.socket, backend.with_knobs(log=log).environment)
    workers.append(worker)
    attach(worker, str(make(tmp_path, "base")), backend.device)
    worker.run(
        "import gc, os\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        del attachment, client\n"
        "        gc.collect()\n"
        "    finally:\n"
        "        os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "attachment.close()\n"
    )
    assert not [call for call in fakecuda.calls(log) if call.after_fork]


@pytest.mark.backends(*CUDA, double_only=True, swept="cuda_ipc")
def test_clients_come_and_go_and_leave_nothing(daemon: Daemon, backend: Backend, spawn: Spawn, tmp_path: Path) -> None:
    """64 clients of 8 processes attach and detach 100 times each: descriptors, mappings and bytes are as before."""
    path = make(tmp_path, "base")
    with weightd.connect(daemon.socket, timeout=60) as client:
        client.load(path, name="base", pin=True)
    workers = [spawn(daemon) for _ in range(8)]
    source = """
import gc, os, weightd
clients = [weightd.connect(timeout=60) for _ in range(8)]
def look():
    gc.collect()
    maps = open("/proc/self/maps").read()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:fakecuda"), maps.count("weightd-manifest")
def round():
    for client in clients:
        with client.attach("base", device=device) as attachment:
            attachment.buffer("t3")
round()
before = look()
for _ in range(99):
    round()
result = [before, look()]
"""
    daemon_before = daemon.descriptors()
    used = daemon.allocated()
    for worker in workers:
        worker.start(source, device=backend.device)
    for worker in workers:
        before, after = worker.finish()
        assert before == after
        assert after[1:] == [0, 0]
    eventually(lambda: not daemon.connect().leases())
    assert daemon.allocated() == used
    for worker in workers:
        worker.close()
    eventually(lambda: daemon.descriptors() <= daemon_before + 3, what="descriptors of clients that are gone")


# -- which GPU ---------------------------------------------------------------------------------------------------------


@on_the_double
def test_a_gpu_that_this_process_does_not_see(
    start_daemon: StartDaemon, backend: Backend, workers: list[Worker], tmp_path: Path
) -> None:
    daemon = start_daemon(backend.with_knobs(devices=2), device="cuda:1", budget="64MiB")
    daemon.connect().load(make(tmp_path, "base"), name="base")
    # To this process the second GPU is the first, and the first is not there.
    remapped = Worker(daemon.socket, backend.with_knobs(devices=2, visible="1").environment)
    blind = Worker(daemon.socket, backend.with_knobs(devices=2, visible="0").environment)
    workers += [remapped, blind]
    assert attach(remapped, "base", "cuda:0") == heads("base")
    source = """
import weightd
from support.descriptors import counted
client = weightd.connect(timeout=60)
before = counted()
result = []
for device in (None, uuid, "cuda:1"):
    try: client.attach("base", device=device)
    except weightd.DeviceMismatchError as error: result.append(str(error))
assert counted() == before
"""
    unnamed, by_uuid, by_number = blind.run(source, uuid=fakecuda.uuid(1))
    assert unnamed == by_uuid
    assert f"{fakecuda.uuid(1)} is not visible to this process (CUDA_VISIBLE_DEVICES=0)" in unnamed
    assert "cuda:1 is not there" in by_number
    eventually(lambda: [lease.pid for lease in daemon.connect().leases() if not lease.waiting] == [remapped.pid])


@on_the_double
def test_without_a_driver_a_client_says_so(daemon: Daemon, workers: list[Worker], tmp_path: Path) -> None:
    daemon.connect().load(make(tmp_path, "base"), name="base")
    worker = Worker(daemon.socket)  # whose environment has no double
    workers.append(worker)
    source = """
import weightd
client = weightd.connect(timeout=60)
result = []
for device in (None, "cuda:0"):
    try: client.attach("base", device=device)
    except weightd.DeviceMismatchError as error: result.append(str(error))
"""
    for message in worker.run(source):
        assert "no CUDA driver can be used here: " in message


@on_the_double
def test_one_daemon_serves_host_memory_and_several_gpus(
    start_daemon: StartDaemon, backend: Backend, workers: list[Worker], tmp_path: Path
) -> None:
    two = backend.with_knobs(devices=2)
    path = make(tmp_path, "base")
    daemon = start_daemon(two, device="auto", budget="host=32MiB,cuda:0=48MiB,cuda=64MiB")
    client = daemon.connect()
    first, second = fakecuda.uuid(0), fakecuda.uuid(1)
    budgets = {device.uuid: device.budget_bytes // MIB for device in client.stats().devices}
    assert budgets == {"host": 32, first: 48, second: 64}
    with pytest.raises(weightd.InvalidReferenceError, match=r"serves several devices, host.*; say which"):
        client.load(path)
    worker = Worker(daemon.socket, two.environment)
    workers.append(worker)
    for device in ("host", "cuda:0", "cuda:1"):
        assert attach(worker, str(path), device) == heads("base")
        for_peers = "with client.attach(reference, device=device, peers=True) as other: result = list(other.peers)"
        is_for_one = device == "host" or backend.kind == "cuda_ipc"
        assert worker.run(for_peers) == ([] if is_for_one else ["cuda:1" if device == "cuda:0" else "cuda:0"])
    assert sorted(checkpoint.device for checkpoint in client.checkpoints()) == sorted(budgets)
    assert [fakecuda.device_bytes(gpu) for gpu in (0, 1)] == [4 * MIB, 4 * MIB]
    with pytest.raises(weightd.InvalidReferenceError, match="means more than one checkpoint"):
        client.attach(client.checkpoints()[0].content_digest)
    worker.close()
    eventually(lambda: not client.leases())
    client.remove(client.checkpoints()[0].content_digest, "host")
    assert {checkpoint.device for checkpoint in client.checkpoints()} == {first, second}


@pytest.fixture(scope="module")
def rested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that has rested, so that the daemon knows it again."""
    path = make(tmp_path_factory.mktemp("rested"), "base")
    checkpoints.rest(path)
    return path


@vmm_on_the_double
def test_files_are_found_on_whatever_device_they_were_loaded(
    start_daemon: StartDaemon, backend: Backend, rested: Path
) -> None:
    """They are named otherwise, so that only their content can tell."""
    client = start_daemon(backend.with_knobs(devices=2), device="auto", budget="64MiB").connect()
    path, gpus = rested, [fakecuda.uuid(0), fakecuda.uuid(1)]
    with pytest.raises(weightd.NotFoundError):
        client.inspect(path)
    client.load(path, device=gpus[1], name="named")
    assert client.inspect(path).checkpoint.device == gpus[1]
    assert client.pin(path).pinned
    assert client.verify(path).done_blobs == 4
    with pytest.raises(weightd.NotFoundError):
        client.inspect(path, gpus[0])
    client.load(path, device=gpus[0], name="named")
    with pytest.raises(weightd.InvalidReferenceError, match=f"on {gpus[0]}, {gpus[1]}; say which with --device"):
        client.inspect(path)
    assert client.inspect(path, gpus[0][:12]).checkpoint.device == gpus[0]


@vmm_on_the_double
def test_the_default_device_comes_first_for_files_that_are_on_several(
    start_daemon: StartDaemon, backend: Backend, rested: Path
) -> None:
    client = start_daemon(backend, device="auto", budget="64MiB").connect()
    client.load(rested, device="host", name="named")
    assert client.inspect(rested).checkpoint.device == "host"
    client.load(rested, name="named")
    assert client.inspect(rested).checkpoint.device == backend.uuid


@vmm_on_the_double
def test_inspect_lists_tensors_where_they_are_and_loads_nothing(
    start_daemon: StartDaemon, backend: Backend, tmp_path: Path
) -> None:
    daemon = start_daemon(backend, device="auto", budget="64MiB")
    path = make(tmp_path, "base")
    daemon.connect().load(path, device="host")
    assert "t3" in daemon.command("inspect", path, "--tensors").stdout
    assert [checkpoint.device for checkpoint in daemon.connect().checkpoints()] == ["host"]


@on_the_double
def test_loads_to_different_gpus_run_at_the_same_time(
    start_daemon: StartDaemon, backend: Backend, tmp_path: Path
) -> None:
    path = checkpoints.write(tmp_path / "stops.safetensors", {"t": ("U8", (MIB,), STOP.ljust(MIB, b"."))})
    daemon = start_daemon(
        backend.with_knobs(devices=2), device="cuda", budget="64MiB", argv=launcher(loader="stopping")
    )
    loads = [background(daemon.connect().load, path, device=fakecuda.uuid(gpu)) for gpu in (0, 1)]
    resume(*wait_stopped(daemon, 2))
    assert [load.result(60).device for load in loads] == [fakecuda.uuid(0), fakecuda.uuid(1)]


# -- a daemon without a GPU --------------------------------------------------------------------------------------------


def serve(tmp_path: Path, *flags: str, more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `weightd serve` until it ends, or until it is ready and then told to stop."""
    serve = [sys.executable, "-m", "weightd_daemon", "serve", f"--socket={tmp_path}/s", f"--state-dir={tmp_path}"]
    process = subprocess.Popen(
        leashed([*serve, *flags]),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | (more or {}), cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if ready:
            process.terminate()
        rest, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, ready + rest, errors)


def test_without_a_gpu_auto_serves_host_memory_and_says_why_in_one_line(tmp_path: Path) -> None:
    served = serve(tmp_path, "--device=auto", "--budget=64MiB")
    assert served.returncode == 0
    assert served.stdout.startswith("weightd is ready")
    assert "host memory" in served.stdout
    (line,) = [line for line in served.stderr.splitlines() if "no GPU" in line]
    assert "no CUDA driver can be used here" in line
    assert "only host memory: no CUDA driver can be used here: " in line
    assert not line.endswith(".")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "GPU-0123abcd"])
def test_without_a_gpu_a_daemon_that_must_have_one_is_to_be_started_again(tmp_path: Path, device: str) -> None:
    served = serve(tmp_path, f"--device={device}")
    assert (served.returncode, served.stdout) == (75, "")
    (line,) = served.stderr.splitlines()
    assert device in line
    assert "no CUDA driver can be used here" in line


@vmm_on_the_double
def test_a_gpu_that_is_not_there_or_means_several(backend: Backend, tmp_path: Path) -> None:
    two = backend.with_knobs(devices=2).environment
    for flags, (code, why) in {
        ("--device=cuda:2",): (78, "is not there"),
        ("--device=auto", "--budget=cuda:2=1GiB"): (75, "cuda:2 is not served"),
        ("--device=cuda:0", f"--device={fakecuda.uuid(0)}"): (78, "named already"),
        ("--device=cuda:0", "--budget=cuda:1=1GiB"): (78, "cuda:1"),
        ("--device=cuda", "--budget=900GiB"): (78, "900GiB"),
    }.items():
        served = serve(tmp_path, *flags, more=two)
        assert (served.returncode, served.stdout) == (code, ""), served.stderr
        assert why in served.stderr.splitlines()[-1]
    assert serve(tmp_path, "--device=cuda", "--budget=1MiB", more=two).returncode == 78  # less than one page


@vmm_on_the_double
def test_where_memory_cannot_be_exported_it_is_shared_by_cuda_ipc(
    start_daemon: StartDaemon, backend: Backend, tmp_path: Path
) -> None:
    poor = backend.with_knobs(no_export=True)
    client = start_daemon(poor, transport="auto", budget="64MiB").connect()
    (device,) = client.stats().devices
    assert device.kind == "cuda_ipc"
    client.load(make(tmp_path, "base"), name="base")
    served = serve(tmp_path, "--device=cuda", "--transport=cuda_vmm", more=poor.environment)
    assert served.returncode == 75
    assert "cannot be served" in served.stderr


@vmm_on_the_double
def test_auto_goes_without_a_gpu_that_does_not_answer_and_loads_find_the_others(
    start_daemon: StartDaemon, backend: Backend, tmp_path: Path
) -> None:
    broken = backend.with_knobs(devices=3, fail="cuDeviceGetUuid@1:999", fail_in="weightd_daemon")  # in loaders, too
    daemon = start_daemon(broken, device="auto", budget="64MiB")
    client = daemon.connect()
    assert [device.uuid for device in client.stats().devices] == ["host", fakecuda.uuid(0), fakecuda.uuid(2)]
    assert "device cuda:1 is not served: cuDeviceGetUuid failed" in daemon.logged()
    for gpu in (0, 2):
        assert client.load(make(tmp_path, "base"), device=fakecuda.uuid(gpu)).device == fakecuda.uuid(gpu)


@vmm_on_the_double
def test_a_gpu_for_one_process_at_a_time_is_told_at_the_start_and_when_a_load_fails(
    start_daemon: StartDaemon, backend: Backend, spawn: Spawn, tmp_path: Path
) -> None:
    # Of GPU 0 this very process may have a context, from tests before.
    daemon = start_daemon(backend.with_knobs(compute_mode=3, devices=16, visible="15"))
    assert f"device {fakecuda.uuid(15)} is in compute mode EXCLUSIVE_PROCESS: one process at a time" in daemon.logged()
    client = daemon.connect()
    client.load(make(tmp_path, "base"), name="base")
    for loader in daemon.loaders():  # which has the GPU; on a very busy machine it has left already
        assert b"\0CUDA_MPS_PIPE_DIRECTORY=/dev/null\0" in Path(f"/proc/{loader}/environ").read_bytes()
        os.kill(loader, signal.SIGKILL)
    eventually(lambda: not daemon.loaders())
    assert attach(spawn(daemon), "base") == heads("base")
    with pytest.raises(
        weightd.DeviceError, match=r"CUDA_ERROR_DEVICE_UNAVAILABLE.*another process has the GPU to itself"
    ):
        client.load(make(tmp_path, "other"))


@vmm_on_the_double
def test_auto_gives_a_small_gpu_at_most_what_it_has_of_a_budget_for_all(
    start_daemon: StartDaemon, backend: Backend, tmp_path: Path
) -> None:
    small = backend.with_knobs(memory=64 * MIB)
    client = start_daemon(small, device="auto", budget="128MiB").connect()
    assert {device.kind: device.budget_bytes for device in client.stats().devices} == {
        "host": 128 * MIB, "cuda_vmm": 64 * MIB,
    }  # fmt: skip
    for flags in (["--budget=cuda:0=128MiB"], ["--budget=128MiB", "--device=cuda"]):
        assert serve(tmp_path, *flags, more=small.environment).returncode == 78


@on_the_double
def test_a_loader_that_cannot_use_the_gpu_is_not_taken_for_the_client(
    start_daemon: StartDaemon, backend: Backend, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    daemon = start_daemon(backend.with_knobs(fail="cuInit:999", fail_in="weightd_daemon.loader", fail_once=seen))
    client = daemon.connect()
    path = make(tmp_path, "base")
    with pytest.raises(weightd.DeviceError, match="the loader cannot use the device: no CUDA device can be used here"):
        client.load(path)
    assert client.load(path).state == "resident"


# -- loss --------------------------------------------------------------------------------------------------------------


def loads(client: weightd.Client, path: Path) -> bool:
    """Load it; False while the next holder is not ready."""
    try:
        return client.load(path, name=path.stem).state == "resident"
    except weightd.DeviceError as error:
        if "is being started" not in error.message:
            raise
        return False


@ipc_on_the_double
def test_a_dead_holder_loses_its_checkpoints_and_frees_the_books(
    daemon: Daemon, backend: Backend, spawn: Spawn, tmp_path: Path
) -> None:
    path = make(tmp_path, "base")
    client = daemon.connect()
    client.load(path, name="base", pin=True)
    (holder,) = daemon.holders()
    os.kill(holder, signal.SIGKILL)
    eventually(lambda: [checkpoint.state for checkpoint in client.checkpoints()] == ["lost"])
    (device,) = client.stats().devices
    assert (device.used_bytes, device.live_bytes, device.segments) == (0, 0, 0)
    with pytest.raises(weightd.DeviceError, match=r"checkpoint base was lost: .*; load it again"):
        client.attach("base")
    eventually(lambda: loads(client, path), what="another holder")
    with client.attach("base") as attachment:
        assert content(attachment, "t1") == checkpoints.random_bytes(("base", 1), MIB)
    assert [checkpoint.state for checkpoint in client.checkpoints()] == ["resident"]
    assert daemon.holders() != [holder]
    assert len(daemon.holders()) == 1


@ipc_on_the_double
def test_the_holder_dies_with_its_daemon(daemon: Daemon, backend: Backend, tmp_path: Path) -> None:
    daemon.connect().load(make(tmp_path, "base"), name="base")
    (holder,) = daemon.holders()
    daemon.kill()
    eventually(lambda: not Path(f"/proc/{holder}").exists())
    assert backend.device_bytes() == 0
    daemon.start()


# -- capacity ----------------------------------------------------------------------------------------------------------


@on_the_double
def test_a_device_that_is_full_for_others_reasons(start_daemon: StartDaemon, backend: Backend, tmp_path: Path) -> None:
    """The budget would allow it, the device does not: evict, try again, then say so with numbers."""
    daemon = start_daemon(backend.with_knobs(memory=16 * MIB), budget="16MiB")
    client = daemon.connect()
    for name in ("first", "second"):
        client.load(make(tmp_path, name, 6), name=name)
        client.close()
        client = daemon.connect()
    assert client.load(make(tmp_path, "third", 6), name="third").state == "resident"
    assert client.stats().evictions >= 1
    with pytest.raises(weightd.CapacityError) as raised:
        client.load(make(tmp_path, "huge", 20), name="huge")
    assert raised.value.requested_bytes == 20 * MIB


@vmm_on_the_double
def test_a_full_device_makes_room_for_the_context_of_a_loader(
    start_daemon: StartDaemon, backend: Backend, spawn: Spawn, tmp_path: Path
) -> None:
    """Clients have contexts of their own, so a GPU is full before its budget is used up: no segment is refused here."""
    daemon = start_daemon(backend.with_knobs(memory=64 * MIB, context=4 * MIB), budget="60MiB")
    client = daemon.connect()

    def load(name: str, count: int, **options: bool) -> None:
        client.load(make(tmp_path, name, count), name=name, **options)

    def fill_with_contexts(*clients: Worker) -> None:
        """End the loader, and have clients take what it had."""
        for loader in daemon.loaders():
            os.kill(loader, signal.SIGKILL)
        eventually(lambda: not daemon.loaders())
        for worker in clients:
            attach(worker, "leased", count=1)
        assert fakecuda.device_bytes(0) + sum(fakecuda.context_bytes(0)) == 64 * MIB

    for name, count in (("leased", 20), ("first", 20), ("second", 16)):
        load(name, count)
        client.close()
        client = daemon.connect()
    fill_with_contexts(spawn(daemon), spawn(daemon))
    load("third", 4)
    assert {checkpoint.name for checkpoint in client.checkpoints()} == {"leased", "second", "third"}
    load("fourth", 12, pin=True)
    for name in ("second", "third"):
        client.pin(name)
    fill_with_contexts(spawn(daemon))
    with pytest.raises(weightd.CapacityError, match="the context of a loader process") as raised:
        load("fifth", 1)
    assert raised.value.evictable_bytes == 0
    assert raised.value.pinned_bytes + raised.value.leased_bytes == 52 * MIB
    refused = daemon.command("load", tmp_path / "fifth.safetensors", check=False)
    assert refused.returncode == 5
    assert "(cuDevicePrimaryCtxRetain)" in refused.stderr
    client.unpin("second")
    load("fifth", 1)


@every_gpu
def test_a_checkpoint_that_is_all_duplicates_loads_into_a_full_device(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon(budget="8MiB")
    client = daemon.connect()
    client.load(make(tmp_path, "base", 8), name="base", pin=True)
    (device,) = client.stats().devices
    assert device.used_bytes == device.budget_bytes
    again = checkpoints.write_random(
        tmp_path / "again.safetensors", 8, MIB, shared={i: ("base", 7 - i) for i in range(8)}
    )
    report = client.load_report(again, name="again")
    assert report is not None
    assert (report.unique_bytes, report.shared_bytes) == (0, 8 * MIB)
    assert client.stats().devices[0].used_bytes == device.used_bytes
