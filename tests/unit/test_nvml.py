"""What is free on a GPU, by an NVML that comes late, goes, knows another name of the GPU, or refuses some questions."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from weightd_daemon.devices import cuda_nvml

GPU = "GPU-00000000-0000-0000-0000-00000000000a"
SUPPORTED, NOT_FOUND, NOT_LOADED, FUNCTION = 3, 6, 9, 13


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class Nvml:
    """The functions of pynvml that are used here. `works` is whether there is a driver; `known` has free bytes."""

    NVMLError = NvmlError
    NVML_ERROR_NOT_SUPPORTED = SUPPORTED
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_NOT_FOUND = NOT_FOUND
    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_FUNCTION_NOT_FOUND = FUNCTION

    def __init__(self) -> None:
        self.works = True
        self.known: dict[str, int | NvmlError] = {GPU: 100}
        self.begun = 0
        self.tried = 0
        self.reached, self.answers = threading.Event(), threading.Event()
        self.answers.set()

    def nvmlInit(self) -> None:  # noqa: N802  # pynvml's name
        self.tried += 1
        self.reached.set()
        assert self.answers.wait(60)
        if not self.works:
            raise NvmlError(NOT_LOADED)
        self.begun += 1

    def nvmlShutdown(self) -> None:  # noqa: N802  # pynvml's name
        if not self.begun:
            raise NvmlError(1)
        self.begun -= 1

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802  # pynvml's name
        if not self.works:
            raise NvmlError(NOT_LOADED)
        if name not in self.known:
            raise NvmlError(NOT_FOUND)
        return name

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802  # pynvml's name
        free = self.known[handle]
        if isinstance(free, NvmlError):
            raise free
        return SimpleNamespace(free=free)


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cuda_nvml, "time", clock)
    return clock


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Nvml:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]  # it stands for a module
    monkeypatch.setattr(cuda_nvml, "_library", cuda_nvml._Library())
    return nvml


def test_it_is_made_ready_once(nvml: Nvml) -> None:
    assert [cuda_nvml.free_bytes(GPU) for _ in range(3)] == [100] * 3
    assert nvml.tried == 1


def test_it_may_come_late_and_is_not_asked_all_the_time(nvml: Nvml, clock: Clock) -> None:
    nvml.works = False
    assert [cuda_nvml.free_bytes(GPU) for _ in range(100)] == [None] * 100
    assert nvml.tried == 1
    nvml.works = True
    clock.now += 5
    assert cuda_nvml.free_bytes(GPU) == 100


def test_it_may_go_and_come_again(nvml: Nvml, clock: Clock) -> None:
    """The driver was replaced, and the library that was ready with the old one is of no use."""
    assert cuda_nvml.free_bytes(GPU) == 100
    nvml.works = False
    assert cuda_nvml.free_bytes(GPU) is None
    assert nvml.begun == 0
    nvml.works = True
    assert cuda_nvml.free_bytes(GPU) is None  # for five seconds
    clock.now += 5
    assert cuda_nvml.free_bytes(GPU) == 100
    assert nvml.begun == 1


@pytest.mark.parametrize("value", [SUPPORTED, FUNCTION])
def test_a_question_that_is_refused_stops_no_other(nvml: Nvml, value: int) -> None:
    nvml.known["GPU-b"] = NvmlError(value)
    assert [cuda_nvml.free_bytes(uuid) for uuid in ("GPU-b", GPU, "GPU-c", GPU)] == [None, 100, None, 100]
    assert nvml.tried == 1


def test_a_part_of_a_gpu_has_another_name_there(nvml: Nvml) -> None:
    nvml.known = {"MIG-part": 7, GPU: 100}
    assert cuda_nvml.free_bytes("GPU-part") == 7
    assert cuda_nvml.free_bytes(GPU) == 100


def test_without_the_package_nothing_is_known(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cuda_nvml.free_bytes(GPU) is None
    assert cuda_nvml.free_bytes(GPU) is None


def test_a_start_of_nvml_that_hangs_stops_the_thread_of_no_other_gpu(nvml: Nvml, clock: Clock) -> None:
    """Each GPU has a thread: one that waits for another GPU's sake would be taken for one that does not answer."""
    nvml.answers.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cuda_nvml.free_bytes, GPU)
        try:
            assert nvml.reached.wait(60)
            clock.now += cuda_nvml._READY_SECONDS
            assert pool.submit(cuda_nvml.free_bytes, GPU).result(60) is None
            assert not first.done()
        finally:
            nvml.answers.set()
        assert first.result(60) == 100
    assert cuda_nvml.free_bytes(GPU) == 100
    assert nvml.tried == 1


def test_the_others_wait_for_a_start_of_nvml_that_is_quick(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder asks once, as it starts, what NVML calls its GPU."""
    nvml.answers.clear()
    waits = threading.Event()
    real = threading.Condition.wait

    def wait(self: threading.Condition, timeout: float | None = None) -> bool:
        if timeout == cuda_nvml._READY_SECONDS:
            waits.set()
            timeout = 60  # this machine may be busy
        return real(self, timeout)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cuda_nvml.free_bytes, GPU)
        assert nvml.reached.wait(60)
        monkeypatch.setattr(threading.Condition, "wait", wait)
        second = pool.submit(cuda_nvml.names_alike, GPU)
        try:
            assert waits.wait(60)
        finally:
            nvml.answers.set()
        assert second.result(60)
        assert first.result(60) == 100
    assert nvml.tried == 1


def test_an_error_of_one_gpu_waits_for_no_start_of_nvml(nvml: Nvml, clock: Clock) -> None:
    assert cuda_nvml.free_bytes(GPU) == 100
    nvml.works = False
    late = NvmlError(NOT_LOADED)  # another GPU had asked before, and hears of it only now
    assert cuda_nvml.free_bytes(GPU) is None
    nvml.reached.clear()
    nvml.answers.clear()
    clock.now += 5
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cuda_nvml.free_bytes, GPU)
        try:
            assert nvml.reached.wait(60)
            pool.submit(cuda_nvml._library.failed, late).result(60)
            assert not first.done()
        finally:
            nvml.answers.set()
        assert first.result(60) is None
