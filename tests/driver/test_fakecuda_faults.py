"""What tests make the fake driver do: fail with any status, take long, hang; full, exclusive and unconnected GPUs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support import fakecuda
from support.daemon import eventually
from support.program import StartProgram

GRANULE = 2 << 20
SUCCESS, OUT_OF_MEMORY, DEVICE_UNAVAILABLE, INVALID_DEVICE, ILLEGAL_ADDRESS = 0, 2, 46, 101, 700
CREATE = "result = status('cuMemCreate', GRANULE, properties(), 0)"


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_status_that_no_header_knows_is_returned_as_it_is(program: StartProgram) -> None:
    codes = program(fail="cuInit:917:1,cuInit:12345:2").run(
        "import ctypes; library = ctypes.CDLL('libcuda.so.1'); result = [library.cuInit(0) for _ in range(3)]"
    )
    assert codes == [917, 12345, SUCCESS]


def test_a_rule_can_be_for_one_gpu(program: StartProgram) -> None:
    rules = ",".join(f"{name}@1:999" for name in ("cuDeviceGetUuid", "cuMemCreate", "cuMemRelease", "cuMemGetInfo"))
    one = program(devices=2, visible="1,0", fail=rules)
    one.run("start(0); start(1); block = create(ordinal=1)")
    codes = one.run(
        "def ask(ordinal):\n"
        "    ok('cuCtxSetCurrent', ok('cuDevicePrimaryCtxRetain', ordinal))\n"
        "    return [status('cuDeviceGetUuid', ordinal), status('cuMemCreate', GRANULE, properties(ordinal), 0),"
        " status('cuMemGetInfo')]\n"
        "result = [ask(0), ask(1), status('cuMemRelease', block)]"
    )
    assert codes == [[999] * 3, [SUCCESS] * 3, SUCCESS], "it goes by the physical GPU, not by the ordinal"


@pytest.mark.parametrize(
    ("knob", "rule"),
    [("slow", "cuMemCreat:5"), ("slow", "cuMemCreate"), ("hang", "cuMemCreate:1:2"), ("fail", "cuMemCreate@x:1")],
)
def test_a_misspelt_rule_ends_the_process(program: StartProgram, knob: str, rule: str) -> None:
    one = program(**{knob: rule})
    with pytest.raises(AssertionError, match="ended with -6"):
        one.run("start()")


# -- slow calls --------------------------------------------------------------------------------------------------------


def test_a_call_can_be_slow_and_others_go_on_meanwhile(program: StartProgram) -> None:
    delay = 0.3
    one = program(slow=f"cuMemCreate:{round(delay * 1000)}")
    order = one.run("""
import threading
start()
order = []
thread = threading.Thread(target=lambda: (create(), order.append('slow')))
thread.start()
ok('cuMemGetInfo'); order.append('quick')
thread.join()
result = order
""")
    assert order == ["quick", "slow"]
    begun = time.monotonic()
    one.run(CREATE)
    assert time.monotonic() - begun >= delay


def test_a_call_hangs_while_a_file_is_there(program: StartProgram, tmp_path: Path) -> None:
    log, held = tmp_path / "log", tmp_path / "held"
    one = program(hang="cuMemCreate", hang_while=held, log=log)
    one.run("start();" + CREATE)
    held.touch()
    one.start(CREATE)
    eventually(lambda: len([call for call in fakecuda.calls(log) if call.function == "cuMemCreate"]) == 2)
    assert fakecuda.device_bytes(0) == GRANULE, "that of the first one: the second has not come back"
    held.unlink()
    assert one.finish() == SUCCESS
    assert fakecuda.device_bytes(0) == 2 * GRANULE


def test_only_the_processes_that_are_meant_are_slow_or_hang(program: StartProgram, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.touch()
    knobs = {"slow": "cuInit:100000", "hang": "cuInit", "hang_while": held}
    assert program(fail_in="weightd_daemon.loader", **knobs).run("result = status('cuInit', 0)") == SUCCESS


# -- contexts ----------------------------------------------------------------------------------------------------------


def test_a_context_takes_memory_of_its_device_once_for_a_process(program: StartProgram) -> None:
    knobs = {"devices": 2, "memory": 4 * GRANULE, "context": GRANULE + 1}
    first, second, third = program(**knobs), program(**knobs), program(**knobs)
    first.run("start(); start()")
    assert fakecuda.context_bytes(0) == [GRANULE + 1]
    assert first.run("result = ok('cuMemGetInfo')[0]") == 3 * GRANULE - 1
    second.run("start(); block = create()")
    assert fakecuda.context_bytes(0) == [GRANULE + 1] * 2
    assert fakecuda.device_bytes(0) == GRANULE, "contexts are not counted as memory"
    assert first.run(CREATE) == OUT_OF_MEMORY
    retain = "ok('cuInit', 0); result = status('cuDevicePrimaryCtxRetain', ordinal)"
    assert third.run(retain, ordinal=0) == OUT_OF_MEMORY
    assert third.run(retain, ordinal=1) == SUCCESS
    second.kill()
    assert third.run(retain, ordinal=0) == SUCCESS
    for _ in range(2):
        first.run("ok('cuDevicePrimaryCtxRelease', 0)")
    assert fakecuda.context_bytes(0) == [GRANULE + 1], "that of the third one"


def test_in_exclusive_mode_one_process_has_a_context(program: StartProgram) -> None:
    first, second = program(compute_mode=3), program(compute_mode=3)
    attempt = (
        "ok('cuInit', 0); mode = ok('cuDeviceGetAttribute', driver.CUdevice_attribute(20), 0)\n"
        "result = [int(mode), status('cuDevicePrimaryCtxRetain', 0)]"
    )
    assert first.run(attempt) == [3, SUCCESS]
    assert first.run(attempt) == [3, SUCCESS], "the same context"
    assert second.run(attempt) == [3, DEVICE_UNAVAILABLE]
    second.run("block = create()")  # needs no context
    first.kill()
    assert second.run(attempt) == [3, SUCCESS]
    assert program(compute_mode=2).run(attempt) == [2, DEVICE_UNAVAILABLE], "prohibited"


# -- access of each device ---------------------------------------------------------------------------------------------

PEERS = """
contexts = [start(ordinal) for ordinal in (0, 1)]
block = create()
address = int(ok('cuMemAddressReserve', GRANULE, 0, 0, 0))
ok('cuMemMap', address, GRANULE, 0, block, 0)
def on(ordinal): ok('cuCtxSetCurrent', contexts[ordinal])
def flags():
    where = [access(READ, ordinal).location for ordinal in (0, 1)]
    return [int(ok('cuMemGetAccess', place, address)) for place in where]
"""


def test_access_is_for_the_devices_that_are_named(program: StartProgram) -> None:
    flags = program(devices=2).run(
        PEERS + "result = [flags()]\n"
        "ok('cuMemSetAccess', address, GRANULE, [access(READ_WRITE, 0)], 1); result.append(flags())\n"
        "ok('cuMemSetAccess', address, GRANULE, [access(0, 0), access(READ, 1)], 2); result.append(flags())"
    )
    assert flags == [[0, 0], [3, 0], [0, 1]]


@pytest.mark.parametrize(
    "use", ["status('cuMemcpyDtoH', bytearray(1), address, 1)", "status('cuMemcpyHtoD', address, bytes(1), 1)"]
)
def test_a_device_without_access_faults(program: StartProgram, use: str) -> None:
    one = program(devices=2)
    one.run(PEERS + "ok('cuMemSetAccess', address, GRANULE, [access(READ_WRITE, 0)], 1)")
    code, later = one.run(f"on(0); result = [{use}]; on(1); result.append({use})")
    assert (code, later) == (SUCCESS, ILLEGAL_ADDRESS)


def test_a_peer_with_read_access_reads_and_does_not_write(program: StartProgram) -> None:
    codes = program(devices=2).run(
        PEERS + "ok('cuMemSetAccess', address, GRANULE, [access(READ_WRITE, 0), access(READ, 1)], 2); on(1)\n"
        "result = [len(read(address, 1)), status('cuMemcpyHtoD', address, bytes(1), 1)]"
    )
    assert codes == [2, ILLEGAL_ADDRESS]


def test_a_copy_between_peers_needs_access_on_each_side_only(program: StartProgram) -> None:
    program(devices=2).run(
        PEERS + "ok('cuMemSetAccess', address, GRANULE, [access(READ_WRITE, 0)], 1)\n"
        "on(0); write(address, b'over'); on(1); there = mapped(create(ordinal=1), READ_WRITE, ordinal=1)\n"
        "ok('cuMemcpyPeer', there, contexts[1], address, contexts[0], 4)\n"
        "assert bytes.fromhex(read(there, 4)) == b'over'\n"
        "stream = ok('cuStreamCreate', 0); write(there, bytes(4))\n"
        "ok('cuMemcpyPeerAsync', there, contexts[1], address, contexts[0], 4, stream)\n"
        "ok('cuStreamSynchronize', stream); assert bytes.fromhex(read(there, 4)) == b'over'\n"
        "assert status('cuMemcpyDtoD', there, address, 4) == 700, 'one device does it all, and reads too'"
    )


def test_devices_may_not_reach_each_other(program: StartProgram) -> None:
    source = (
        PEERS + "result = [ok('cuDeviceCanAccessPeer', 0, 1), ok('cuDeviceCanAccessPeer', 0, 0),"
        " status('cuMemSetAccess', address, GRANULE, [access(READ, 0), access(READ, 1)], 2)]"
    )
    assert program(devices=2).run(source) == [1, 0, SUCCESS]
    apart = program(devices=2, no_peers=True)
    assert apart.run(source) == [0, 0, INVALID_DEVICE]
    assert apart.run("result = flags()") == [0, 0], "a call that is refused changes nothing"
