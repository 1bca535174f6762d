"""The machine of the fake driver: what libraries keep open, who keeps a GPU up, and what NVML says of it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from support import fakecuda
from support.daemon import eventually
from support.program import StartProgram

GRANULE = 2 << 20
SUCCESS, INVALID_VALUE, NO_DEVICE, OPERATING_SYSTEM, UNKNOWN = 0, 1, 100, 304, 999
IMPORT = "result = status('cuMemImportFromShareableHandle', fd, DESCRIPTOR)"


# -- what the libraries keep -------------------------------------------------------------------------------------------

LISTED = """
def listed():
    links = []
    for number in os.listdir('/proc/self/fd'):
        try:
            links.append(os.readlink(f'/proc/self/fd/{number}').split('/')[-1])
        except OSError:  # that of the list itself
            pass
    return links
"""


def test_the_driver_keeps_descriptors_a_memfd_and_a_thread(program: StartProgram, tmp_path: Path) -> None:
    one = program(devices=2, nodes=fakecuda.make_nodes(tmp_path, 2))
    one.run(LISTED)
    seen = [Counter(one.run(f"{what}; result = listed()")) for what in ("pass", "ok('cuInit', 0)", "start(); start()")]
    assert dict(seen[1] - seen[0]) == {
        "nvidiactl": 1, "nvidia-uvm": 1, "nvidia0": 1, "nvidia1": 1, "memfd:of the driver (deleted)": 1,
    }  # fmt: skip
    assert dict(seen[2] - seen[1]) == {"nvidia0": 2, "anon_inode:[eventfd]": 2}
    assert one.run("result = len(os.listdir('/proc/self/task'))") == 2
    one.run("[ok('cuDevicePrimaryCtxRelease', 0) for _ in range(2)]")
    assert Counter(one.run("result = listed()")) == seen[1], "those of the context go with it"


def test_the_driver_s_thread_takes_no_signals(program: StartProgram) -> None:
    blocked = program().run("""
start()
thread, = set(os.listdir('/proc/self/task')) - {str(os.getpid())}
status = open(f'/proc/self/task/{thread}/status').read()
result = int(status.split('SigBlk:')[1].split()[0], 16)
""")
    catchable = sum(1 << number - 1 for number in range(1, 32) if number not in {9, 19})
    assert blocked & catchable == catchable


def test_without_descriptors_the_driver_fails_and_keeps_none(program: StartProgram) -> None:
    codes = program().run("""
import resource
ok('cuDriverGetVersion')  # the library is loaded
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
free = os.dup(0); os.close(free)
before, codes = len(os.listdir('/proc/self/fd')), []
def limited(count, name, *arguments):
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + count, hard))
    codes.append(status(name, *arguments))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
for count in range(4):
    limited(count, 'cuInit', 0)
assert len(os.listdir('/proc/self/fd')) == before
ok('cuInit', 0)
before, free = before + 4, free + 4
for count in range(5):
    limited(count, 'cuDevicePrimaryCtxRetain', 0)
    assert len(os.listdir('/proc/self/fd')) == before
result = codes
""")
    assert codes == [OPERATING_SYSTEM] * 9


def test_what_nodes_are_missing_the_driver_says(program: StartProgram, tmp_path: Path) -> None:
    one = program(nodes=tmp_path)
    ask = "result = status('cuInit', 0)"
    assert one.run(ask) == NO_DEVICE
    (tmp_path / "nvidiactl").touch()
    assert one.run(ask) == UNKNOWN
    (tmp_path / "nvidia-uvm").touch()
    assert one.run(ask) == NO_DEVICE
    os.mkfifo(tmp_path / "nvidia0")
    assert one.run(ask) == SUCCESS


# -- who keeps a GPU up ------------------------------------------------------------------------------------------------


def filled(program: StartProgram, nodes: Path) -> int:
    """A descriptor of memory of a process that is dead."""
    owner = program(nodes=nodes)
    owner.run("start(); block = create(); write(mapped(block, READ_WRITE), b'kept')")
    descriptor = owner.export()
    assert fakecuda.device_bytes(0, nodes) == GRANULE
    owner.kill()
    return descriptor


def imported(program: StartProgram, nodes: Path, descriptor: int) -> int:
    client = program(nodes=nodes)
    client.give(descriptor)
    code = client.run("start(); fd = take();" + IMPORT)
    client.kill()
    return code


def test_memory_is_gone_when_nobody_holds_its_gpu(program: StartProgram, tmp_path: Path) -> None:
    nodes = fakecuda.make_nodes(tmp_path)
    assert not fakecuda.is_up(nodes, 0)
    descriptor = filled(program, nodes)
    assert not fakecuda.is_up(nodes, 0), "a descriptor of memory is no descriptor of the GPU"
    assert fakecuda.device_bytes(0, nodes) == 0
    client = program(nodes=nodes, memory=GRANULE)
    client.give(descriptor)
    assert client.run("start(); fd = take();" + IMPORT) == INVALID_VALUE
    client.run("create()")
    assert fakecuda.device_bytes(0, nodes) == GRANULE, "the old memory takes no room"


def test_an_open_node_keeps_a_gpu_up(program: StartProgram, tmp_path: Path) -> None:
    nodes = fakecuda.make_nodes(tmp_path)
    node = os.open(nodes / "nvidia0", os.O_RDWR)
    descriptor = filled(program, nodes)
    assert fakecuda.device_bytes(0, nodes) == GRANULE
    assert imported(program, nodes, os.dup(descriptor)) == SUCCESS
    os.close(node)
    client = program(nodes=nodes)
    client.run("start(); fd = None")
    client.give(descriptor)
    assert client.run("fd = take();" + IMPORT) == INVALID_VALUE


def test_a_node_that_was_opened_too_late_brings_nothing_back(program: StartProgram, tmp_path: Path) -> None:
    nodes = fakecuda.make_nodes(tmp_path)
    descriptor = filled(program, nodes)
    node = os.open(nodes / "nvidia0", os.O_RDWR)
    assert fakecuda.is_up(nodes, 0)
    assert fakecuda.device_bytes(0, nodes) == 0
    assert imported(program, nodes, descriptor) == INVALID_VALUE
    os.close(node)


@pytest.mark.parametrize(
    "hold",
    [
        "ok('cuInit', 0)",
        "import pynvml; pynvml.nvmlInit(); pynvml.nvmlDeviceGetHandleByIndex(0)",
        "start(); child = os.fork() or time.sleep(600)",
    ],
)
def test_a_live_process_keeps_a_gpu_up(program: StartProgram, tmp_path: Path, hold: str) -> None:
    nodes = fakecuda.make_nodes(tmp_path)
    holder = program(nodes=nodes)
    holder.run("import time;" + hold)
    descriptor = filled(program, nodes)
    assert imported(program, nodes, descriptor) == SUCCESS
    if "fork" in hold:
        child = holder.run("result = child")
        holder.kill()
        assert fakecuda.is_up(nodes, 0), "a forked child has what its parent had open"
        os.kill(child, 9)
        eventually(lambda: not fakecuda.is_up(nodes, 0), what="the GPU to go down")


def test_a_reset_is_refused_while_anybody_holds_the_gpu(program: StartProgram, tmp_path: Path) -> None:
    nodes = fakecuda.make_nodes(tmp_path, 2)
    one = program(nodes=nodes, devices=2, visible="1")
    one.run("start()")
    fakecuda.reset(nodes, 0)
    with pytest.raises(fakecuda.BusyError, match="GPU 1 is in use"):
        fakecuda.reset(nodes, 1)
    one.kill()
    fakecuda.reset(nodes, 1)


# -- NVML --------------------------------------------------------------------------------------------------------------

NVML = """
import pynvml
pynvml.nvmlInit()
def refused(name, *arguments):
    try:
        return getattr(pynvml, name)(*arguments)
    except pynvml.NVMLError as error:
        return type(error).__name__
"""


def test_nvml_knows_the_gpus_and_what_is_free_on_them(program: StartProgram) -> None:
    knobs = {"devices": 2, "visible": "1", "memory": 8 * GRANULE, "context": GRANULE}
    owner, asker = program(**knobs), program(**knobs)
    owner.run(
        "start(); block = create(2 * GRANULE); fd = int(ok('cuMemExportToShareableHandle', block, DESCRIPTOR, 0))"
    )
    answers = asker.run(
        NVML + "handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]\n"
        "memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]\n"
        "result = [[m.total, m.free, m.used] for m in memory], [pynvml.nvmlDeviceGetMinorNumber(h) for h in handles],"
        " [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]",
        uuids=[fakecuda.uuid(0), fakecuda.uuid(1)],
    )
    total = 8 * GRANULE
    assert answers == [
        [[total, total, 0], [total, 5 * GRANULE, 3 * GRANULE]],
        [0, 1],
        [fakecuda.uuid(0), fakecuda.uuid(1)],
    ]
    owner.kill()
    assert asker.run("result = pynvml.nvmlDeviceGetMemoryInfo(handles[1]).free") == total


def test_nvml_calls_a_mig_instance_by_another_name_than_the_driver(program: StartProgram) -> None:
    one = program(mig=True, visible=fakecuda.uuid(0, mig=True))
    instance = fakecuda.uuid(0, mig=True)
    shown = one.run("start(); result = bytes(ok('cuDeviceGetUuid', 0).bytes).hex()")
    assert shown == instance.removeprefix("MIG-").replace("-", "")
    answers = one.run(
        NVML + "part = pynvml.nvmlDeviceGetHandleByUUID(instance)\n"
        "whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part)\n"
        "result = [refused('nvmlDeviceGetHandleByUUID', instance.replace('MIG', 'GPU')),"
        " pynvml.nvmlDeviceGetUUID(part), pynvml.nvmlDeviceGetUUID(whole), refused('nvmlDeviceGetMinorNumber', part),"
        " pynvml.nvmlDeviceGetMinorNumber(whole), pynvml.nvmlDeviceGetMigMode(whole)]",
        instance=instance,
    )
    assert answers == ["NVMLError_NotFound", instance, fakecuda.uuid(0), "NVMLError_NotSupported", 0, [1, 1]]


def test_nvml_keeps_descriptors_until_it_is_shut_down(program: StartProgram, tmp_path: Path) -> None:
    one = program(nodes=fakecuda.make_nodes(tmp_path))
    before = Counter(one.run(LISTED + "import pynvml; result = listed()"))
    steps = ["pynvml.nvmlInit(); pynvml.nvmlInit()", "pynvml.nvmlDeviceGetHandleByIndex(0)", "pynvml.nvmlShutdown()"]
    after = [Counter(one.run(f"{step}; result = listed()")) - before for step in steps]
    assert after == [{"nvidiactl": 1}, {"nvidiactl": 1, "nvidia0": 1}, {"nvidiactl": 1, "nvidia0": 1}]
    assert Counter(one.run("pynvml.nvmlShutdown(); result = listed()")) == before


def test_nvml_fails_where_the_driver_does_not_run_or_a_rule_says_so(program: StartProgram, tmp_path: Path) -> None:
    ask = NVML.replace("pynvml.nvmlInit()", "") + "result = [refused('nvmlInit') for _ in range(2)]"
    late = program(nodes=tmp_path)
    assert late.run(ask)[0] == "NVMLError_DriverNotLoaded"
    fakecuda.make_nodes(tmp_path)
    assert late.run(ask)[0] is None
    one = program(fail="nvmlInitWithFlags:999:1,nvmlDeviceGetMemoryInfo:3,cuInit:2")
    assert one.run(ask) == ["NVMLError_Unknown", None]
    memory = "result = refused('nvmlDeviceGetMemoryInfo', pynvml.nvmlDeviceGetHandleByIndex(0)), status('cuInit', 0)"
    assert one.run(memory) == ["NVMLError_NotSupported", 2]
