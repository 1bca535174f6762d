"""Stream capture on the fake driver: what is captured, and what ends a capture."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from support.program import StartProgram

SUCCESS, INVALID_HANDLE, ILLEGAL_STATE, NOT_READY = 0, 400, 401, 600
UNSUPPORTED, INVALIDATED, MERGE, UNMATCHED, UNJOINED, ISOLATION, IMPLICIT, CAPTURED_EVENT, WRONG_THREAD = range(
    900, 909
)
GLOBAL, THREAD_LOCAL, RELAXED = range(3)
MODES = (GLOBAL, THREAD_LOCAL, RELAXED)

CAPTURING = """
import threading
start()
address, buffer = int(ok('cuMemAlloc', GRANULE)), pinned(4)
buffer[:] = b'aaaa'
write(address, b'....')
stream, other, blocking = [ok('cuStreamCreate', flags) for flags in (NON_BLOCKING, NON_BLOCKING, 0)]
before, event, apart = [ok('cuEventCreate', 0) for _ in range(3)]
ok('cuEventRecord', before, other)
registered = bytearray(64 << 10)
alignment = -driver_address(registered) % 4096
ok('cuMemHostRegister', driver_address(registered) + alignment, 4096, 0)
def begin(mode, stream): return status('cuStreamBeginCapture', stream, driver.CUstreamCaptureMode(mode))
def end(stream):
    code, graph = driver.cuStreamEndCapture(stream)
    assert (int(code) == 0) == bool(graph)
    return [int(code), int(ok('cuGraphGetNodes', graph, 0)[1]) if graph else None]
def copy(stream): return status('cuMemcpyHtoDAsync', address, buffer, 4, stream)
def state(stream): return int(ok('cuStreamIsCapturing', stream))
def elsewhere(work):
    done = []
    def run():
        ok('cuCtxSetCurrent', context)
        done.append(work())
    context = ok('cuCtxGetCurrent')
    thread = threading.Thread(target=run); thread.start(); thread.join()
    return done[0]
def relax(mode): return int(ok('cuThreadExchangeStreamCaptureMode', driver.CUstreamCaptureMode(mode)))
"""


def test_what_is_captured_is_not_done(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING + "assert begin(0, stream) == 0 and state(stream) == 1 and state(other) == 0")
    codes = one.run("result = [copy(stream), copy(stream), status('cuMemsetD8Async', address, 1, 4, stream)]")
    assert codes == [SUCCESS] * 3
    assert one.run("result = [end(stream), state(stream)]") == [[SUCCESS, 3], 0]
    assert bytes.fromhex(one.run("ok('cuCtxSynchronize'); result = read(address, 4)")) == b"...."
    one.run("copy(stream); ok('cuStreamSynchronize', stream)")
    assert bytes.fromhex(one.run("result = read(address, 4)")) == b"aaaa", "after the capture the stream works"


def test_a_capture_has_a_number_of_its_own(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING + "def number(): status, number, *_ = ok('cuStreamGetCaptureInfo', stream); return int(number)")
    first, second = one.run(
        "begin(0, stream); result = [number()]; end(stream); begin(0, stream); result += [number()]"
    )
    assert 0 < first < second


SYNCHRONISING = {
    "status('cuCtxSynchronize')": UNSUPPORTED,
    "status('cuStreamSynchronize', stream)": UNSUPPORTED,
    "status('cuStreamQuery', stream)": UNSUPPORTED,
    "status('cuMemcpyDtoHAsync', bytearray(4), address, 4, stream)": UNSUPPORTED,
    "(ok('cuEventRecord', event, stream), status('cuEventQuery', event))[1]": CAPTURED_EVENT,
    "(ok('cuEventRecord', event, stream), status('cuEventSynchronize', event))[1]": CAPTURED_EVENT,
    "status('cuStreamWaitEvent', stream, before, 0)": ISOLATION,
}
UNSAFE = {
    "status('cuMemAlloc', 4096)": UNSUPPORTED,
    "status('cuMemHostAlloc', 4096, 0)": UNSUPPORTED,
    "status('cuEventQuery', before)": UNSUPPORTED,
    "status('cuEventSynchronize', before)": UNSUPPORTED,
    "status('cuStreamSynchronize', other)": UNSUPPORTED,
    "status('cuStreamQuery', other)": UNSUPPORTED,
}
FREEING = {
    "status('cuMemFree', {made})": "int(ok('cuMemAlloc', 4096))",
    "status('cuMemFreeHost', {made})": "int(ok('cuMemHostAlloc', 4096, 0))",
    "status('cuMemUnmap', {made}, GRANULE)": "mapped(create(), READ)",
    "status('cuMemSetAccess', {made}, GRANULE, [access(READ)], 1)": "mapped(create(), READ)",
}
HARMLESS = [
    "copy(other)",
    "write(address, b'sync')",  # the NULL stream does not wait for a stream that does not block
    "ok('cuEventRecord', apart, other)",
    "ok('cuStreamWaitEvent', other, before, 0)",
    "ok('cuStreamWaitEvent', stream, before, 1)",  # external
    "ok('cuStreamDestroy', ok('cuStreamCreate', NON_BLOCKING))",
    "create()",
    "ok('cuMemGetInfo')",
    "ok('cuPointerGetAttribute', driver.CUpointer_attribute(2), address)",
]


def test_a_call_that_waits_for_a_capture_ends_it_in_every_mode(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING)
    for mode, (call, code) in itertools.product(MODES, SYNCHRONISING.items()):
        assert one.run(f"begin({mode}, stream); copy(stream); relax(2); result = {call}") == code, call
        after = one.run("relax(0); result = [state(stream), copy(stream), end(stream), state(stream)]")
        assert after == [2, INVALIDATED, [INVALIDATED, None], 0], call


def test_a_call_that_is_refused_has_done_nothing(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING)
    for call in SYNCHRONISING:
        one.run(f"begin(0, stream); {call}; end(stream)")
    assert bytes.fromhex(one.run("result = read(address, 4)")) == b"...."


def test_an_unsafe_call_ends_captures_as_the_modes_say(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING)
    for mode, thread_mode, here, (call, code) in itertools.product(MODES, MODES, (True, False), UNSAFE.items()):
        concerned = mode != RELAXED if here else mode == thread_mode == GLOBAL
        forbidden = concerned and thread_mode != RELAXED
        work = f"lambda: (relax({thread_mode}), {call}, relax(0))[1]"
        run = f"({work})()" if here else f"elsewhere({work})"
        answer, ended = one.run(f"begin({mode}, stream); copy(stream); answer = {run}; result = [answer, end(stream)]")
        case = (mode, thread_mode, here, call)
        assert ended == ([INVALIDATED, None] if forbidden else [SUCCESS, 1]), case
        assert answer in ({code} if forbidden else {SUCCESS, NOT_READY}), case


def test_calls_that_free_or_unmap_are_unsafe_and_no_more(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING)
    for thread_mode, (call, make) in itertools.product(MODES, FREEING.items()):
        work = f"relax({thread_mode}); answer = {call.format(made='made')}; relax(0)"
        answer, ended = one.run(f"made = {make}; begin(0, stream); {work}; result = [answer, end(stream)[0]]")
        refused = thread_mode != RELAXED
        assert (answer, ended) == ((UNSUPPORTED, INVALIDATED) if refused else (SUCCESS, SUCCESS)), (thread_mode, call)


def test_calls_that_have_nothing_to_do_with_a_capture_leave_it_alone(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING)
    for call in HARMLESS:
        assert one.run(f"begin(0, stream); {call}; result = [state(stream), end(stream)[0]]") == [1, SUCCESS], call


def test_the_null_stream_ends_captures_of_blocking_streams(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING)
    for call in (
        "status('cuMemcpyHtoD', address, bytes(1), 1)",
        "status('cuMemsetD8', address, 0, 1)",
        "copy(0)",
        "status('cuStreamSynchronize', 0)",
        "status('cuStreamQuery', 0)",
        "status('cuEventRecord', apart, 0)",
        "status('cuStreamWaitEvent', 0, before, 0)",
    ):
        assert one.run(f"begin(2, blocking); result = [{call}, end(blocking)]") == [IMPLICIT, [INVALIDATED, None]], call
    asked = one.run("begin(2, blocking); result = [status('cuStreamIsCapturing', 0), end(blocking)[0]]")
    assert asked == [IMPLICIT, SUCCESS], "to ask ends nothing"


def test_captures_of_other_contexts_are_not_waited_for(program: StartProgram) -> None:
    one = program(devices=2)
    one.run(CAPTURING + "begin(2, stream); second = ok('cuDevicePrimaryCtxRetain', 1); ok('cuCtxPushCurrent', second)")
    assert one.run("result = status('cuCtxSynchronize'); ok('cuCtxPopCurrent')") is SUCCESS
    assert one.run("result = end(stream)") == [SUCCESS, 0]


def test_a_capture_ends_where_it_began(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING)
    source = "begin(mode, stream); result = [elsewhere(lambda: end(stream)), end(stream) if state(stream) else None]"
    assert one.run(source, mode=GLOBAL) == [[WRONG_THREAD, None], [SUCCESS, 0]]
    assert one.run(source, mode=THREAD_LOCAL) == [[WRONG_THREAD, None], [SUCCESS, 0]]
    assert one.run(source, mode=RELAXED) == [[SUCCESS, 0], None]


def test_captures_that_cannot_be(program: StartProgram) -> None:
    codes = program().run(
        CAPTURING + "ok('cuStreamDestroy', other)\n"
        "result = [begin(0, 0), begin(0, other), end(stream)[0], begin(0, stream), begin(0, stream)]"
    )
    assert codes == [UNSUPPORTED, INVALID_HANDLE, ILLEGAL_STATE, SUCCESS, ILLEGAL_STATE]


FORK = "begin(0, stream); ok('cuEventRecord', event, stream); ok('cuStreamWaitEvent', other, event, 0); copy(other)\n"
JOIN = "ok('cuEventRecord', apart, other); ok('cuStreamWaitEvent', stream, apart, 0)\n"


def test_a_stream_joins_a_capture_through_an_event(program: StartProgram) -> None:
    one = program()
    one.run(CAPTURING)
    assert one.run(FORK + JOIN + "result = [state(other), end(stream), state(other)]") == [1, [SUCCESS, 3], 0]
    assert one.run(FORK + "result = [end(stream), state(other)]") == [[UNJOINED, None], 0]
    assert one.run(FORK + JOIN + "copy(other); result = end(stream)") == [UNJOINED, None], "work after the join"
    assert one.run(FORK + "result = [end(other), end(stream)]") == [[UNMATCHED, None], [INVALIDATED, None]]
    assert one.run(FORK + "ok('cuStreamDestroy', other); result = end(stream)") == [INVALIDATED, None]


def test_two_captures_cannot_merge(program: StartProgram) -> None:
    merged = program().run(
        CAPTURING + "begin(2, stream); begin(2, other); ok('cuEventRecord', event, stream)\n"
        "result = [status('cuStreamWaitEvent', other, event, 0), end(stream), end(other)]"
    )
    assert merged == [MERGE, [INVALIDATED, None], [INVALIDATED, None]]


def test_an_event_of_a_capture_that_has_ended_is_like_any_other(program: StartProgram) -> None:
    codes = program().run(
        CAPTURING + "begin(0, stream); copy(stream); ok('cuEventRecord', event, stream); end(stream)\n"
        "result = [status('cuEventSynchronize', event), status('cuStreamWaitEvent', other, event, 0)]"
    )
    assert codes == [SUCCESS, SUCCESS]


def test_a_stream_destroyed_while_it_is_captured_ends_the_capture(program: StartProgram) -> None:
    codes = program().run(
        CAPTURING + "begin(0, stream); ok('cuStreamDestroy', stream)\n"
        "result = [status('cuCtxSynchronize'), status('cuStreamEndCapture', stream)]"
    )
    assert codes == [SUCCESS, INVALID_HANDLE], "nothing is left of it"
