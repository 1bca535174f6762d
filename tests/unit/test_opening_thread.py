"""Steps that open GPUs: nobody waits for one longer than a call may take, and none that hangs is begun twice."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from weightd.errors import DeviceError
from weightd_daemon.devices import opening_thread
from weightd_daemon.devices.opening_thread import begin, next_call

LATE = r"GPU-0 does not answer since \d\d:\d\d:\d\d, in {}"


class Hanging:
    """A call that hangs until the test lets it go on."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.goes_on.wait(60)
        return "opened"


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    made = Hanging()
    yield made
    made.goes_on.set()


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening_thread, "_steps", {})
    monkeypatch.setattr(opening_thread, "CALL_SECONDS", 0.1)


def opens(step: Hanging, call: str = "cuMemCreate", seconds: float = 0.0) -> str:
    next_call(call, seconds)
    return step()


def threads() -> int:
    return sum(thread.name == "weightd-opening" for thread in threading.enumerate())


def test_a_step_has_a_thread_of_its_own_and_its_result_and_errors_are_the_waiters() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    undone: list[object] = []
    assert begin("a", "GPU-0", threading.get_ident, undone.append).result() != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        begin("a", "GPU-0", broken, undone.append).result()
    assert undone == []


def test_a_step_that_hangs_is_given_up_and_none_of_its_kind_is_begun_until_it_is_back_and_undone(
    hanging: Hanging, caplog: pytest.LogCaptureFixture
) -> None:
    undone, undoes, begun = list[str](), Hanging(), threads()

    def undo(result: str) -> None:
        undoes()
        undone.append(result)

    with pytest.raises(DeviceError, match=LATE.format("cuMemCreate")) as caught:
        begin("a", "GPU-0", lambda: opens(hanging), undo).result()
    assert caught.value.metadata == {"call": "cuMemCreate"}
    for _ in range(3):
        with pytest.raises(DeviceError, match=LATE.format("cuMemCreate")):
            begin("a", "GPU-0", lambda: "another", undo)
    assert threads() == begun + 1
    assert begin("b", "GPU-1", lambda: "another kind", undo).result() == "another kind"
    with caplog.at_level(logging.WARNING):
        hanging.goes_on.set()
        assert undoes.begun.wait(60)
    assert caplog.messages == ["a answers again"]
    with pytest.raises(DeviceError, match=LATE.format("cuMemCreate")):
        begin("a", "GPU-0", lambda: "another", undo)
    step = opening_thread._steps["a"]
    undoes.goes_on.set()
    with step._changed:
        assert step._changed.wait_for(lambda: step._ended, 60)
    assert undone == ["opened"]
    assert begin("a", "GPU-0", lambda: "another", undo).result() == "another"


def test_a_late_step_that_fails_or_cannot_be_undone_by_a_bug_is_over_all_the_same(
    hanging: Hanging, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        opens(hanging)
        raise DeviceError("refused")

    def undo(_: object) -> None:
        raise AssertionError("a bug")

    for step in (fails, lambda: opens(hanging)):
        hanging.goes_on.clear()
        with pytest.raises(DeviceError, match=LATE.format("cuMemCreate")):
            begin("a", "GPU-0", step, undo).result()
        late = opening_thread._steps["a"]
        hanging.goes_on.set()
        with late._changed:
            assert late._changed.wait_for(lambda late=late: late._ended, 60)
        assert ("by a bug" in caplog.text) == (step is not fails)


def test_each_call_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = [0.0], list[float]()
    monkeypatch.setattr(opening_thread, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: clock[0]}))
    monkeypatch.setattr(opening_thread, "CALL_SECONDS", 10.0)

    def many() -> str:
        for call, seconds, took in (("cuDeviceGetCount", 0, 8), ("", 0, 8), ("cuInit", 60, 50), ("", 0, 50)):
            next_call(call, seconds)
            clock[0] += took
            with step._changed:
                seen.append(step._since + step._seconds - clock[0])
        next_call("cuMemCreate")
        clock[0] += 8
        return "opened"

    ready = Hanging()
    step = begin("a", "GPU-0", lambda: ready() and many(), lambda _: None)
    ready.goes_on.set()
    assert (step.result(), seen) == ("opened", [2, 2, 10, 10])
    next_call("cuInit")  # on the thread of no step


def test_who_waits_goes_by_the_call_that_is_under_way(hanging: Hanging) -> None:
    waits = Hanging()

    def longer_first() -> str:
        next_call("cuInit", 3600)
        waits()
        return opens(hanging, "cuDeviceGetCount")

    step = begin("a", "GPU-0", longer_first, lambda _: None)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(step.result)
        waits.goes_on.set()
        with pytest.raises(DeviceError, match=LATE.format("cuDeviceGetCount")):
            waiting.result(60)


def test_a_step_waits_for_the_one_of_its_kind_that_is_under_way(hanging: Hanging) -> None:
    first = begin("a", "GPU-0", lambda: opens(hanging, seconds=60), lambda _: None)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(lambda: begin("a", "GPU-0", lambda: "second", lambda _: None).result())
        assert hanging.begun.wait(60)
        assert not second.done()
        hanging.goes_on.set()
        assert second.result(60) == "second"
    assert first.result() == "opened"


def test_what_was_opened_lives_no_longer_than_whoever_has_it_wants() -> None:
    class Device:
        pass

    def fails() -> None:
        device = Device()
        seen.append(weakref.ref(device))
        raise DeviceError("refused")

    seen: list[weakref.ref[Device]] = []
    seen.append(weakref.ref(begin("a", "GPU-0", Device, lambda _: None).result()))
    with pytest.raises(DeviceError):
        begin("b", "GPU-0", fails, lambda _: None).result()
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
