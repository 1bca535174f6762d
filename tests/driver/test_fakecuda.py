"""The fake driver (tests/fakecuda) keeps the rules of the real one that our code relies on.

Each test drives it with cuda-bindings in processes of its own, where settings, faults and forks stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from support import fakecuda
from support.background import background
from support.daemon import environment
from support.program import StartProgram, new_machine

GRANULE = 2 << 20
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED = 1, 2, 3
NO_DEVICE, INVALID_DEVICE, INVALID_CONTEXT, INVALID_HANDLE = 100, 101, 201, 400
NOT_READY, ILLEGAL_ADDRESS, CONTEXT_IS_DESTROYED, NOT_SUPPORTED = 600, 700, 709, 801


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("1,0", [1, 0]),
        ("2", [2]),
        ("0,7,1", [0]),
        ("1,-1,0", [1]),
        ("0,1,0,2", [0, 1]),
        (f"GPU-f2,{fakecuda.uuid(0)}", [2, 0]),
        ("GPU-f,1", []),
        ("nonsense", []),
        ("", []),
    ],
)
def test_visible_devices_are_as_named_up_to_the_first_that_is_invalid(
    program: StartProgram, visible: str, seen: list[int]
) -> None:
    shown = program(devices=3, visible=visible).run(
        "result = [bytes(ok('cuDeviceGetUuid', ordinal).bytes).hex() for ordinal in range(ok('cuDeviceGetCount'))]"
        " if status('cuInit', 0) == 0 else status('cuInit', 0)"
    )
    assert shown == ([fakecuda.uuid(gpu).removeprefix("GPU-").replace("-", "") for gpu in seen] or NO_DEVICE)


def test_a_device_says_what_the_knobs_make_it(program: StartProgram) -> None:
    size, granule, version, name, beyond = program(devices=2, memory=5 << 20, granularity=1 << 20, version=12080).run(
        "start(); result = [ok('cuDeviceTotalMem', 0), "
        "ok('cuMemGetAllocationGranularity', properties(), driver.CUmemAllocationGranularity_flags(0)), "
        "ok('cuDriverGetVersion'), ok('cuDeviceGetName', 64, 1).split(bytes(1))[0].decode(), status('cuDeviceGet', 2)]"
    )
    assert (size, granule, version) == (5 << 20, 1 << 20, 12080)
    assert (name, beyond) == ("FakeCUDA device 1", INVALID_DEVICE)


def test_errors_have_their_names(program: StartProgram) -> None:
    names = program().run(
        "result = [ok('cuGetErrorName', driver.CUresult(code)).decode() == driver.CUresult(code).name"
        " for code in codes]",
        codes=[
            0,
            1,
            2,
            3,
            46,
            100,
            101,
            201,
            400,
            401,
            500,
            600,
            700,
            709,
            712,
            713,
            801,
            802,
            803,
            *range(900, 909),
            999,
        ],
    )
    assert all(names)


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_memory_copies_and_streams_need_a_current_context(program: StartProgram) -> None:
    calls = [
        "'cuMemAlloc', 4096",
        "'cuMemHostAlloc', 4096, 0",
        "'cuMemGetInfo'",
        "'cuMemcpyHtoD', 0, bytes(1), 1",
        "'cuMemcpyHtoDAsync', 0, bytes(1), 1, 0",
        "'cuMemsetD8', 0, 0, 1",
        "'cuStreamCreate', 0",
        "'cuStreamSynchronize', 0",
        "'cuEventCreate', 0",
        "'cuCtxSynchronize'",
        "'cuIpcOpenMemHandle', driver.CUipcMemHandle(), PEER_ACCESS",
    ]
    answers = program().run("ok('cuInit', 0); result = {call: eval(f'status({call})') for call in calls}", calls=calls)
    assert answers == dict.fromkeys(calls, INVALID_CONTEXT)


def test_virtual_memory_needs_no_context(program: StartProgram) -> None:
    program().run(
        "ok('cuInit', 0); block = create(); fd = int(ok('cuMemExportToShareableHandle', block, DESCRIPTOR, 0))\n"
        "mapped(ok('cuMemImportFromShareableHandle', fd, DESCRIPTOR), READ)"
    )


def test_nothing_works_before_the_driver_is_initialised(program: StartProgram) -> None:
    codes = program().run("result = [status('cuDeviceGetCount'), status('cuMemCreate', GRANULE, properties(), 0)]")
    assert codes == [NOT_INITIALIZED, NOT_INITIALIZED]


def test_current_contexts_are_a_stack_in_each_thread(program: StartProgram) -> None:
    program(devices=2).run("""
import threading
first = start()
second = ok('cuDevicePrimaryCtxRetain', 1)
ok('cuCtxPushCurrent', second)
assert int(ok('cuCtxGetDevice')) == 1
thread = threading.Thread(target=lambda: seen.append(status('cuCtxGetDevice')))
seen = []
thread.start(); thread.join()
assert seen == [201], 'another thread has none'
ok('cuCtxPopCurrent')
assert int(ok('cuCtxGetDevice')) == 0
ok('cuCtxPopCurrent')
assert status('cuCtxPopCurrent') == 201
""")


def test_the_last_release_of_a_context_frees_its_memory_but_no_virtual_memory(program: StartProgram) -> None:
    one = program()
    one.run("start(); ok('cuDevicePrimaryCtxRetain', 0); ok('cuMemAlloc', GRANULE); block = create()")
    one.run("ok('cuDevicePrimaryCtxRelease', 0)")
    assert fakecuda.device_bytes(0) == 2 * GRANULE, "retained twice"
    one.run("ok('cuDevicePrimaryCtxRelease', 0)")
    assert fakecuda.device_bytes(0) == GRANULE
    codes = one.run("result = [status('cuMemAlloc', 1), status('cuDevicePrimaryCtxRelease', 0)]")
    assert codes == [CONTEXT_IS_DESTROYED, INVALID_CONTEXT]


# -- fork --------------------------------------------------------------------------------------------------------------


def test_nothing_works_in_a_forked_child_and_the_log_says_so(program: StartProgram, tmp_path: Path) -> None:
    log = tmp_path / "log"
    one = program(log=log)
    child = one.run("""
start(); address = ok('cuMemAlloc', 4096)
pid = os.fork()
if pid == 0:
    codes = {status('cuInit', 0), status('cuDeviceGetCount'), status('cuMemFree', address), status('cuCtxSynchronize')}
    os._exit(0 if codes == {3} else 1)
assert os.waitpid(pid, 0)[1] == 0
ok('cuMemFree', address)
result = pid
""")
    forked = [call.function for call in fakecuda.calls(log) if call.after_fork]
    assert forked == ["cuInit", "cuDeviceGetCount", "cuMemFree", "cuCtxSynchronize"]
    assert {call.pid for call in fakecuda.calls(log) if call.after_fork} == {child}


def test_an_executed_child_is_fresh(program: StartProgram) -> None:
    program().run("""
import subprocess, sys
start()
source = 'from fakecuda.driving import start; start()'
subprocess.run([sys.executable, '-c', source], check=True, timeout=60)
""")


# -- injected failures and the log -------------------------------------------------------------------------------------


def test_the_nth_call_fails_and_no_other(program: StartProgram) -> None:
    codes = program(fail="cuMemCreate:2:3,cuMemRelease:999").run(
        "start(); result = [status('cuMemCreate', GRANULE, properties(), 0) for _ in range(4)]"
        " + [status('cuMemRelease', 0) for _ in range(2)]"
    )
    assert codes == [0, 0, OUT_OF_MEMORY, 0, 999, 999]


def test_failures_can_be_for_one_kind_of_process(program: StartProgram) -> None:
    here = program(fail="cuInit:999", fail_in="-m support.worker")
    elsewhere = program(fail="cuInit:999", fail_in="weightd_daemon.loader")
    assert here.run("result = status('cuInit', 0)") == 999
    assert elsewhere.run("result = status('cuInit', 0)") == 0


def test_a_failure_can_happen_once_in_all_processes(program: StartProgram, tmp_path: Path) -> None:
    knobs = {"fail": "cuMemCreate:2", "fail_once": tmp_path / "once"}
    first, second = program(**knobs), program(**knobs)
    source = "start(); result = [status('cuMemCreate', GRANULE, properties(), 0) for _ in range(2)]"
    assert first.run(source) == [OUT_OF_MEMORY, 0]
    assert second.run(source) == [0, 0]


def test_every_exported_function_can_be_made_to_fail(program: StartProgram, fake_driver: Path) -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", fake_driver / "libcuda.so.1"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()[2::3]
    assert len(symbols) > 60
    assert all(symbol.startswith("cu") for symbol in symbols)
    names = {symbol.partition("_v")[0] for symbol in symbols}
    # cuda-bindings is left out: it looks its functions up by cuGetProcAddress before it calls the first.
    codes = program(fail=",".join(f"{name}:719" for name in names)).run(
        "import ctypes\nlibrary = ctypes.CDLL('libcuda.so.1')\n"
        "result = [library[symbol](0, 0, 0, 0, 0, 0, 0) for symbol in symbols]",
        symbols=symbols,
    )
    assert dict(zip(symbols, codes, strict=True)) == dict.fromkeys(symbols, 719)


@pytest.mark.parametrize("item", ["cuMemCreat:2", "cuMemCreate", "cuMemCreate:2:1,nonsense"])
def test_a_misspelt_failure_ends_the_process(program: StartProgram, item: str) -> None:
    one = program(fail=item)
    with pytest.raises(AssertionError, match="ended with -6"):
        one.run("start()")


def test_the_log_names_the_calls_of_each_process(program: StartProgram, tmp_path: Path) -> None:
    log = tmp_path / "log"
    one, two = program(log=log), program(log=log)
    one.run("ok('cuInit', 0); create()")
    two.run("ok('cuInit', 0); status('cuMemAlloc', 1)")
    assert fakecuda.calls(log) == [
        fakecuda.Call(one.pid, "support.worker", "cuInit", False),
        fakecuda.Call(one.pid, "support.worker", "cuMemCreate", False),
        fakecuda.Call(two.pid, "support.worker", "cuInit", False),
        fakecuda.Call(two.pid, "support.worker", "cuMemAlloc", False),
    ]


# -- physical memory ---------------------------------------------------------------------------------------------------


def test_memory_of_cumemcreate_is_zero_and_memory_of_cumemalloc_is_not(program: StartProgram) -> None:
    contents = program().run("start(); result = [read(mapped(create(), READ), 4), read(ok('cuMemAlloc', 4), 4)]")
    assert contents == ["00000000", "a5a5a5a5"]


def test_a_device_is_full_for_all_processes_and_empties_when_they_die(program: StartProgram) -> None:
    one, two = program(devices=2, memory=4 * GRANULE), program(devices=2, memory=4 * GRANULE)
    one.run("start(); block = create(3 * GRANULE)")
    source = "result = status('cuMemCreate', 2 * GRANULE, properties(), 0), status('cuMemAlloc', 2 * GRANULE)"
    assert two.run("start();" + source) == [OUT_OF_MEMORY, OUT_OF_MEMORY]
    assert two.run("result = ok('cuMemGetInfo')") == [GRANULE, 4 * GRANULE]
    assert two.run("ok('cuMemCreate', 4 * GRANULE, properties(1), 0)") is None, "another device"
    one.kill()
    assert two.run("result = status('cuMemCreate', 2 * GRANULE, properties(), 0)") == 0


def test_a_descriptor_alone_keeps_memory_and_its_bytes(program: StartProgram) -> None:
    owner = program()
    owner.run("start(); block = create(); write(mapped(block, READ_WRITE), b'kept')")
    descriptor = owner.export()
    owner.kill()
    assert fakecuda.device_bytes(0) == GRANULE
    client = program()
    client.give(descriptor)
    assert fakecuda.device_bytes(0) == GRANULE, "it lies in a socket"
    client.run("start(); fd = take(); block = ok('cuMemImportFromShareableHandle', fd, DESCRIPTOR); os.close(fd)")
    client.run("address = mapped(block, READ); ok('cuMemRelease', block)")
    assert fakecuda.device_bytes(0) == GRANULE, "a mapping alone keeps it, too"
    assert bytes.fromhex(client.run("result = read(address, 4)")) == b"kept"
    client.run("ok('cuMemUnmap', address, GRANULE)")
    assert fakecuda.device_bytes(0) == 0


def test_memory_counts_for_the_physical_device_wherever_it_is_imported(program: StartProgram) -> None:
    owner, client = program(devices=2), program(devices=2, visible="1,0")
    owner.run("start(1); block = create(ordinal=1)")
    client.give(owner.export())
    assert [fakecuda.device_bytes(gpu) for gpu in range(2)] == [0, GRANULE]
    found = client.run(
        "start(); block = ok('cuMemImportFromShareableHandle', take(), DESCRIPTOR)\n"
        "result = ok('cuMemGetAllocationPropertiesFromHandle', block).location.id"
    )
    assert found == 0, "what the client calls the device"
    stranger = program(devices=2, visible="0")
    stranger.give(owner.export())
    code = stranger.run("start(); result = status('cuMemImportFromShareableHandle', take(), DESCRIPTOR)")
    assert code == INVALID_DEVICE


def test_two_runs_of_the_tests_do_not_share_their_gpus(program: StartProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    here = program(memory=GRANULE)
    here.run("start(); block = create()")
    descriptor = here.export()
    with monkeypatch.context() as patch:
        patch.setenv("FAKECUDA_MACHINE", new_machine())
        elsewhere = program(memory=GRANULE)
        assert fakecuda.device_bytes(0) == 0
    elsewhere.give(descriptor)
    codes = elsewhere.run(
        "start(); result = [status('cuMemImportFromShareableHandle', take(), DESCRIPTOR),"
        " status('cuMemCreate', GRANULE, properties(), 0)]"
    )
    assert codes == [INVALID_VALUE, 0]


def test_only_an_exported_descriptor_can_be_imported(program: StartProgram) -> None:
    owner, client = program(), program()
    owner.run("start(); block = create(); address = ok('cuMemAlloc', 4096)")
    descriptor = owner.export()
    client.give(os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR))
    client.give(os.memfd_create("something else"))
    client.give(descriptor)
    codes = client.run(
        "start(); result = [status('cuMemImportFromShareableHandle', take(), DESCRIPTOR) for _ in range(3)]"
        " + [status('cuMemImportFromShareableHandle', 999, DESCRIPTOR)]"
    )
    assert codes == [INVALID_VALUE, INVALID_VALUE, 0, INVALID_VALUE], "opened anew, no device memory, good, closed"


def test_a_mapping_costs_no_descriptor(program: StartProgram) -> None:
    descriptors = program().run("""
start()
before = len(os.listdir('/proc/self/fd'))
for _ in range(8):
    block = create()
    address = mapped(block, READ)
    ok('cuMemRelease', block)
result = len(os.listdir('/proc/self/fd')) - before
""")
    assert descriptors == 0


# -- virtual memory ----------------------------------------------------------------------------------------------------


def test_calls_that_break_a_rule_of_virtual_memory_are_refused(program: StartProgram) -> None:
    one = program()
    one.run("""
start()
block, released = create(), create()
address, free = mapped(block, READ_WRITE), int(ok('cuMemAddressReserve', 2 * GRANULE, 0, 0, 0))
ok('cuMemRelease', released)
""")
    refused = {
        "'cuMemCreate', GRANULE + 4096, properties(), 0": INVALID_VALUE,
        "'cuMemCreate', 0, properties(), 0": INVALID_VALUE,
        "'cuMemCreate', GRANULE, properties(7), 0": INVALID_DEVICE,
        "'cuMemExportToShareableHandle', create(types=NO_HANDLE), DESCRIPTOR, 0": INVALID_VALUE,
        "'cuMemRelease', released": INVALID_VALUE,
        "'cuMemMap', address, GRANULE, 0, block, 0": INVALID_VALUE,
        "'cuMemMap', free, GRANULE, GRANULE, create(2 * GRANULE), 0": INVALID_VALUE,
        "'cuMemMap', free + 4096, GRANULE, 0, block, 0": INVALID_VALUE,
        "'cuMemMap', free, 4 * GRANULE, 0, block, 0": INVALID_VALUE,
        "'cuMemUnmap', address, 2 * GRANULE": INVALID_VALUE,
        "'cuMemUnmap', address, 4096": INVALID_VALUE,
        "'cuMemUnmap', free, GRANULE": INVALID_VALUE,
        "'cuMemSetAccess', address, 2 * GRANULE, [access(READ)], 1": INVALID_VALUE,
        "'cuMemSetAccess', address, GRANULE, [access(READ, 7)], 1": INVALID_DEVICE,
        "'cuMemAddressFree', address, GRANULE": INVALID_VALUE,
        "'cuMemAddressFree', free, GRANULE": INVALID_VALUE,
        "'cuMemFree', address": INVALID_VALUE,
        "'cuMemcpyHtoD', free, bytes(1), 1": INVALID_VALUE,
    }
    answers = one.run("result = {call: eval(f'status({call})') for call in calls}", calls=list(refused))
    assert answers == refused


def test_access_is_given_to_all_mappings_of_a_range_at_once(program: StartProgram) -> None:
    program().run("""
start()
base = int(ok('cuMemAddressReserve', 2 * GRANULE, 0, 0, 0))
for place in (base, base + GRANULE):
    ok('cuMemMap', place, GRANULE, 0, create(), 0)
ok('cuMemSetAccess', base, 2 * GRANULE, [access(READ_WRITE)], 1)
write(base + GRANULE - 2, b'over')
assert bytes.fromhex(read(base + GRANULE - 2, 4)) == b'over', 'a copy may span neighbours'
for place in (base + GRANULE, base):
    ok('cuMemUnmap', place, GRANULE)
ok('cuMemAddressFree', base, 2 * GRANULE)
""")


@pytest.mark.parametrize(("flags", "store", "ends"), [("READ", True, True), ("READ", False, False), ("0", False, True)])
def test_a_store_through_a_read_only_mapping_kills(program: StartProgram, flags: str, store: bool, ends: bool) -> None:
    one = program()
    one.run(f"import ctypes; start(); byte = ctypes.c_ubyte.from_address(mapped(create(), {flags}))")
    source = "byte.value = 1" if store else "byte.value"
    if not ends:
        one.run(source)
        return
    with pytest.raises(AssertionError, match=f"ended with -{signal.SIGSEGV.value}"):
        one.run(source)


def test_a_copy_into_a_read_only_mapping_is_the_end_of_the_context(program: StartProgram) -> None:
    victim, neighbour = program(), program()
    neighbour.run("start(); block = create(); address = mapped(block, READ_WRITE)")
    victim.give(neighbour.export())
    codes = victim.run("""
start()
address = mapped(ok('cuMemImportFromShareableHandle', take(), DESCRIPTOR), READ)
result = [status('cuMemcpyHtoD', address, b'bad', 3), status('cuMemcpyDtoH', bytearray(1), address, 1),
          status('cuCtxSynchronize'), status('cuMemUnmap', address, GRANULE), status('cuDeviceGetCount')]
""")
    assert codes == [ILLEGAL_ADDRESS] * 4 + [0]
    assert neighbour.run("result = read(address, 3)") == "000000", "another process goes on, and nothing was written"


def test_an_importer_may_give_itself_write_access(program: StartProgram) -> None:
    owner, client = program(), program()
    owner.run("start(); block = create(); address = mapped(block, READ_WRITE)")
    client.give(owner.export())
    client.run("start(); write(mapped(ok('cuMemImportFromShareableHandle', take(), DESCRIPTOR), READ_WRITE), b'x')")
    assert owner.run("result = read(address, 1)") == b"x".hex()


def test_a_platform_may_not_export(program: StartProgram) -> None:
    codes = program(no_export=True).run(
        "start(); plain = create(types=NO_HANDLE); result = [status('cuMemCreate', GRANULE, properties(), 0),"
        " status('cuMemExportToShareableHandle', plain, DESCRIPTOR, 0),"
        " status('cuIpcGetMemHandle', ok('cuMemAlloc', 1))]"
    )
    assert codes == [NOT_SUPPORTED, NOT_SUPPORTED, 0]


# -- CUDA IPC ----------------------------------------------------------------------------------------------------------


def test_a_handle_opens_the_whole_block_once_for_a_process_and_writable(program: StartProgram) -> None:
    owner, client = program(), program()
    handle = owner.run("start(); address = ok('cuMemAlloc', 8192); write(address, b'from'); result = exported(address)")
    first, second = client.run(
        "start(); opened = [int(ok('cuIpcOpenMemHandle', ipc_handle(handle), PEER_ACCESS)) for _ in range(2)]\n"
        "result = opened",
        handle=handle,
    )
    assert first == second
    assert bytes.fromhex(client.run("result = read(opened[0], 4)")) == b"from"
    client.run("write(opened[0] + 4096, b'back')")
    assert bytes.fromhex(owner.run("result = read(int(address) + 4096, 4)")) == b"back"
    assert fakecuda.device_bytes(0) == 8192, "opened is not copied"
    assert client.run("available, total = ok('cuMemGetInfo'); result = total - available") == 8192
    codes = client.run(
        "result = [status('cuIpcCloseMemHandle', opened[0]), len(read(opened[0], 1)),"
        " status('cuIpcCloseMemHandle', opened[0]), status('cuMemcpyDtoH', bytearray(1), opened[0], 1)]"
    )
    assert codes == [0, 2, 0, INVALID_VALUE], "it stays until it is closed as often as it was opened"


def test_memory_that_another_process_has_open_cannot_be_freed(program: StartProgram) -> None:
    owner, client, killed = program(), program(), program()
    handle = owner.run("start(); address = ok('cuMemAlloc', 4096); result = exported(address)")
    for opener in (client, killed):
        opener.run("start(); address = ok('cuIpcOpenMemHandle', ipc_handle(handle), PEER_ACCESS)", handle=handle)
    free = "result = status('cuMemFree', address)"
    assert owner.run(free) == INVALID_VALUE
    client.run("ok('cuIpcCloseMemHandle', address)")
    assert owner.run(free) == INVALID_VALUE
    killed.kill()
    assert owner.run(free) == 0
    assert fakecuda.device_bytes(0) == 0


def test_locks_that_come_and_go_elsewhere_change_nothing(program: StartProgram) -> None:
    """Whatever file is locked meanwhile: /proc/locks then lists some locks twice, and others not at all."""
    owner = program()
    owner.run("start(); ok('cuMemAlloc', 4096)")
    done = threading.Event()

    def lock_and_unlock() -> None:
        with tempfile.TemporaryFile() as file:
            while not done.is_set():
                for start in range(0, 200, 2):  # not neighbours, which would become one lock
                    fcntl.lockf(file, fcntl.LOCK_SH, 1, start)
                fcntl.lockf(file, fcntl.LOCK_UN)

    with contextlib.ExitStack() as open_files:
        for _ in range(200):  # so that the list is longer than what one system call returns
            fcntl.flock(open_files.enter_context(tempfile.TemporaryFile()), fcntl.LOCK_SH)
        other = background(lock_and_unlock)
        try:
            freed = owner.run("result = [status('cuMemFree', ok('cuMemAlloc', 4096)) for _ in range(500)]")
            counted = {fakecuda.device_bytes(0) for _ in range(500)}
        finally:
            done.set()
            other.result(60)
    assert (set(freed), counted) == ({0}, {4096})


def test_what_cannot_be_shared_by_cuda_ipc_is_refused(program: StartProgram) -> None:
    codes = program().run("""
start()
own = ok('cuMemAlloc', 4096)
result = [status('cuIpcGetMemHandle', mapped(create(), READ_WRITE)),
          status('cuIpcOpenMemHandle', ipc_handle(exported(own)), PEER_ACCESS),
          status('cuIpcOpenMemHandle', driver.CUipcMemHandle(), PEER_ACCESS)]
""")
    assert codes == [INVALID_VALUE, INVALID_CONTEXT, INVALID_VALUE]


def test_handles_are_never_the_same_for_two_allocations(program: StartProgram) -> None:
    owner, client = program(), program()
    first, second = owner.run("""
start()
address = ok('cuMemAlloc', 4096)
first = exported(address)
assert exported(address) == first
ok('cuMemFree', address)
result = [first, exported(ok('cuMemAlloc', 4096))]
""")
    assert first != second
    source = "result = [status('cuIpcOpenMemHandle', ipc_handle(handle), PEER_ACCESS) for handle in handles]"
    assert client.run("start();" + source, handles=[first, second]) == [INVALID_VALUE, 0]


def test_what_is_open_outlives_its_exporter_but_cannot_be_opened_any_more(program: StartProgram) -> None:
    owner, early, late = program(), program(), program()
    handle = owner.run("start(); address = ok('cuMemAlloc', 4096); write(address, b'old'); result = exported(address)")
    early.run("start(); address = ok('cuIpcOpenMemHandle', ipc_handle(handle), PEER_ACCESS)", handle=handle)
    owner.kill()
    assert bytes.fromhex(early.run("result = read(address, 3)")) == b"old"
    assert fakecuda.device_bytes(0) == 4096
    source = "start(); result = status('cuIpcOpenMemHandle', ipc_handle(handle), PEER_ACCESS)"
    assert late.run(source, handle=handle) == INVALID_VALUE


def test_a_platform_may_know_no_cuda_ipc(program: StartProgram) -> None:
    codes = program(no_ipc=True).run(
        "start(); result = [status('cuIpcGetMemHandle', ok('cuMemAlloc', 1)),"
        " status('cuIpcOpenMemHandle', driver.CUipcMemHandle(), PEER_ACCESS),"
        " status('cuMemCreate', GRANULE, properties(), 0)]"
    )
    assert codes == [NOT_SUPPORTED, NOT_SUPPORTED, 0]


# -- streams -----------------------------------------------------------------------------------------------------------

COPIES = """
start()
address = int(ok('cuMemAlloc', 4096))
stream, other, apart = ok('cuStreamCreate', 0), ok('cuStreamCreate', 0), ok('cuStreamCreate', NON_BLOCKING)
buffer = pinned(4)
buffer[:] = b'aaaa'
def copy(stream): ok('cuMemcpyHtoDAsync', address, buffer, 4, stream)
def peek(): return ctypes.string_at(address, 4).decode('latin-1')  # as nobody can on a real device
event = ok('cuEventCreate', 0)
import ctypes, threading
"""
FRESH = "\xa5" * 4


WAITS = [
    "ok('cuStreamSynchronize', stream)",
    "ok('cuCtxSynchronize')",
    "ok('cuStreamDestroy', stream)",
    "ok('cuEventRecord', event, stream); ok('cuEventSynchronize', event)",
    "ok('cuEventRecord', event, stream); assert status('cuEventQuery', event) == 600; ok('cuEventQuery', event)",
    "assert status('cuStreamQuery', stream) == 600; ok('cuStreamQuery', stream)",
    "ok('cuEventRecord', event, stream); ok('cuStreamWaitEvent', other, event, 0); ok('cuStreamSynchronize', other)",
    "ok('cuEventRecord', event, stream); ok('cuStreamWaitEvent', 0, event, 0)",
    "ok('cuMemsetD8', address + 64, 0, 1)",
    "ok('cuMemsetD8Async', address + 64, 0, 1, 0)",
]


def test_work_of_a_stream_is_done_when_somebody_waits_for_it(program: StartProgram) -> None:
    one = program()
    for wait in WAITS:
        one.run(COPIES + "copy(stream); buffer[:] = b'bbbb'")
        assert one.run("result = peek()") == FRESH, "not yet"
        one.run(wait)
        assert one.run("result = peek()") == "bbbb", f"read as late as {wait}"


def test_an_event_covers_what_came_before_it(program: StartProgram) -> None:
    one = program()
    one.run(COPIES + "copy(stream); ok('cuEventRecord', event, stream)")
    one.run("ok('cuMemsetD8Async', address, 0x63, 4, stream); ok('cuEventSynchronize', event)")
    assert one.run("result = peek()") == "aaaa"
    one.run("ok('cuStreamSynchronize', stream)")
    assert one.run("result = peek()") == "cccc"


def test_the_null_stream_does_not_wait_for_streams_that_do_not_block(program: StartProgram) -> None:
    one = program()
    one.run(COPIES + "copy(apart); ok('cuMemsetD8', address + 64, 0, 1); ok('cuStreamSynchronize', 0)")
    assert one.run("result = peek()") == FRESH
    one.run("ok('cuStreamSynchronize', apart)")
    assert one.run("result = peek()") == "aaaa"


def test_a_copy_to_the_host_arrives_late(program: StartProgram) -> None:
    seen = program().run(
        COPIES + "write(address, b'dddd'); ok('cuMemcpyDtoHAsync', buffer, address, 4, stream)\n"
        "before = bytes(buffer).decode(); ok('cuStreamSynchronize', stream); result = [before, bytes(buffer).decode()]"
    )
    assert seen == ["aaaa", "dddd"]


@pytest.mark.parametrize("registered", [False, True])
def test_memory_that_is_not_pinned_is_staged_at_once(program: StartProgram, registered: bool) -> None:
    one = program()
    one.run(COPIES + "import mmap; pages = mmap.mmap(-1, 4096); view = (ctypes.c_ubyte * 4).from_buffer(pages)")
    if registered:
        one.run("ok('cuMemHostRegister', ctypes.addressof(view), 4096, 0)")
    one.run("view[:] = b'eeee'; ok('cuMemcpyHtoDAsync', address, ctypes.addressof(view), 4, stream); view[:] = b'ffff'")
    assert one.run("ok('cuStreamSynchronize', stream); result = peek()") == ("ffff" if registered else "eeee")


@pytest.mark.parametrize("removal", ["ok('cuMemFreeHost', ctypes.addressof(buffer))", "ok('cuMemFree', address)"])
def test_memory_that_is_gone_before_the_copy_is_done_is_a_fault(program: StartProgram, removal: str) -> None:
    one = program()
    one.run(COPIES + "copy(stream);" + removal)
    assert one.run("result = status('cuStreamSynchronize', stream)") == ILLEGAL_ADDRESS


def test_threads_with_streams_of_their_own_do_not_disturb_each_other(program: StartProgram) -> None:
    program().run(
        COPIES
        + """
context, size, failures = ok('cuCtxGetCurrent'), 64 << 10, []
def work(number):
    try:
        ok('cuCtxSetCurrent', context)
        mine, stream, event = int(ok('cuMemAlloc', size)), ok('cuStreamCreate', NON_BLOCKING), ok('cuEventCreate', 0)
        buffer, back = pinned(size), pinned(size)
        for turn in range(20):
            content = bytes([number * 20 + turn]) * size
            buffer[:] = content
            ok('cuMemcpyHtoDAsync', mine, buffer, size, stream)
            ok('cuMemcpyDtoHAsync', back, mine, size, stream)
            ok('cuEventRecord', event, stream)
            ok('cuEventSynchronize', event)
            assert bytes(back) == content
    except BaseException as error:
        failures.append(repr(error))
threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
"""
    )


def test_stale_streams_and_events_are_refused(program: StartProgram) -> None:
    codes = program().run(
        COPIES + "ok('cuStreamDestroy', stream); ok('cuEventDestroy', event)\n"
        "result = [status('cuStreamSynchronize', stream), status('cuEventQuery', event),"
        " status('cuMemcpyHtoDAsync', address, buffer, 4, stream), status('cuEventRecord', event, other)]"
    )
    assert codes == [INVALID_HANDLE] * 4


# -- cuda-core ---------------------------------------------------------------------------------------------------------


def test_a_buffer_of_cuda_core_is_taken_for_device_memory_and_keeps_its_owner(program: StartProgram) -> None:
    answer = program(devices=2).run("""
import gc, weakref
from cuda.core import Buffer, Device
from cuda.core.utils import StridedMemoryView
class Owner: pass
start(); Device(1).set_current()
address = int(ok('cuMemAlloc', 4096))
owner = Owner()
gone = weakref.ref(owner)
buffer = Buffer.from_handle(address, 4096, owner=owner)
capsule = buffer.__dlpack__()
stream = Device(1).create_stream()
view = StridedMemoryView.from_dlpack(buffer, stream_ptr=int(stream.handle))
result = [list(map(int, buffer.__dlpack_device__())), view.ptr == address, view.shape[0], view.device_id]
del owner, buffer
gc.collect()
result.append(gone() is not None)
del capsule, view
gc.collect()
result.append(gone() is None)
""")
    assert answer == [[2, 1], True, 4096, 1, True, True]


# -- this process ------------------------------------------------------------------------------------------------------


def test_a_process_that_has_loaded_the_library_needs_no_path_to_it(fake_driver: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from support import fakecuda; fakecuda.preload(Path(sys.argv[1]))\n"
        "from fakecuda import driving; driving.start(); driving.create(); print(fakecuda.device_bytes(0))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, fake_driver],
        env=environment(), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert finished.stdout == f"{GRANULE}\n"


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="gcc is not installed"):
        fakecuda.build(tmp_path)
