"""What a daemon does with GPUs whose driver fails: by call, by error, for a moment or for good, kept or not.

The driver is a table of functions in this process, under the real devices; no library is loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.descriptors import open_descriptors
from weightd._mapping import cuda_driver
from weightd.errors import DeviceError, DeviceMismatchError
from weightd_daemon.config.settings import ConfigError, TemporaryConfigError
from weightd_daemon.devices import cuda_opening
from weightd_daemon.devices.absent import AbsentDevice
from weightd_daemon.devices.cuda_choice import Choice, choose_gpus, try_again
from weightd_daemon.devices.cuda_errors import explained
from weightd_daemon.devices.cuda_opening import ServedGpu

HOLDING: Any = None  # for holders, of which none is started here
PAGE = 2 << 20
UUIDS = ["GPU-00000000-0000-0000-0000-00000000000a", "GPU-00000000-0000-0000-0000-00000000000b"]
FIRST, SECOND = UUIDS
KEPT = {"host": "host", FIRST: "cuda_vmm"}

CALLS = {
    "init": "cuInit",
    "count": "cuDeviceGetCount",
    "uuid": "cuDeviceGetUuid",
    "granularity": "cuMemGetAllocationGranularity",
    "create": "cuMemCreate",
    "export": "cuMemExportToShareableHandle",
}
CODES = {
    802: "CUDA_ERROR_SYSTEM_NOT_READY",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    999: "CUDA_ERROR_UNKNOWN",
    46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
    2: "CUDA_ERROR_OUT_OF_MEMORY",
    917: "CUDA_ERROR_917",  # newer than the bindings
}
PASSING = [(call, code) for call in CALLS for code in CODES]
FULL = ("create", 2)
"""The one failure that says nothing against a GPU: it is served, and has no room yet."""


class Driver:
    """A driver with `gpus`. `failing` has, by function, its error and how many calls are still to fail by that."""

    def __init__(self) -> None:
        self.gpus = UUIDS[:1]
        self.failing: dict[str, tuple[str, float]] = {}
        self.allocated = 0
        self.functions: dict[str, Callable[..., Any]] = {
            "cuInit": lambda _: None,
            "cuDeviceGetCount": lambda: len(self.gpus),
            "cuDeviceGet": lambda ordinal: ordinal,
            "cuDeviceGetUuid": self._uuid,
            "cuDeviceGetName": lambda *_: b"A GPU\0",
            "cuDeviceTotalMem": lambda _: 1 << 30,
            "cuDeviceGetAttribute": lambda *_: 0,
            "cuMemGetAllocationGranularity": lambda *_: PAGE,
            "cuMemCreate": self._create,
            "cuMemRelease": self._release,
            "cuMemExportToShareableHandle": lambda *_: os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC),
        }

    def fail(self, call: str, code: str, times: float = float("inf")) -> None:
        self.failing[CALLS[call]] = code, times

    def call(self, function: str, *arguments: Any) -> Any:
        name = function.removesuffix("_v2")
        code, times = self.failing.get(name, ("", 0))
        if times > 0:
            self.failing[name] = code, times - 1
            raise DeviceError(f"{name} failed with {code}; see `nvidia-smi`", {"call": name, "code": code})
        return self.functions[name](*arguments)

    def _uuid(self, ordinal: int) -> Any:
        return SimpleNamespace(bytes=bytes.fromhex(self.gpus[ordinal].removeprefix("GPU-").replace("-", "")))

    def _create(self, *_: Any) -> object:
        self.allocated += 1
        return object()

    def _release(self, _: object) -> None:
        self.allocated -= 1


class IpcDevice:
    """A GPU by CUDA IPC, which works."""

    kind = "cuda_ipc"
    page = PAGE
    creates_by, releases_by = "cuMemAlloc", "cuMemFree"

    def __init__(self, ordinal: int, _: object) -> None:
        self.uuid = cuda_driver.uuid_of(ordinal)

    def create(self, _: int) -> int:
        return 1

    def release(self, _: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    pytest.importorskip("cuda.bindings")  # for its structures
    driver = Driver()
    monkeypatch.setattr(cuda_driver, "call", driver.call)
    monkeypatch.setattr(cuda_driver, "_initialised_in", None)
    monkeypatch.setattr(cuda_opening, "CudaIpcDevice", IpcDevice)
    before = len(open_descriptors())
    yield driver
    assert driver.allocated == 0, "segments of trials were not given back"
    assert len(open_descriptors()) == before


def choose(said: str, transport: str = "auto", kept: dict[str, str] | None = None) -> Choice:
    return choose_gpus(said.split(","), transport, HOLDING, kept or {})


def served(choice: Choice) -> list[tuple[str, str]]:
    return [(gpu.device.uuid, gpu.device.kind) for gpu in choice.served]


WORKS = [(FIRST, "cuda_vmm")]


@pytest.mark.parametrize("kept", [KEPT, {}], ids=["kept", "not-kept"])
@pytest.mark.parametrize("said", ["auto", "cuda", f"host,{FIRST}"])
@pytest.mark.parametrize(("call", "code"), PASSING)
def test_one_failure_changes_nothing(gpus: Driver, call: str, code: int, said: str, kept: dict[str, str]) -> None:
    gpus.fail(call, CODES[code], times=1)
    choice = choose(said, kept=kept)
    assert (served(choice), choice.absent) == (WORKS, [])


@pytest.mark.parametrize("transport", ["auto", "cuda_vmm"])
@pytest.mark.parametrize("said", ["auto", "cuda", "cuda:0", f"host,{FIRST}"])
@pytest.mark.parametrize(("call", "code"), [cell for cell in PASSING if cell != FULL])
def test_a_kept_gpu_that_fails_is_absent_until_it_works(
    gpus: Driver, call: str, code: int, said: str, transport: str
) -> None:
    gpus.fail(call, CODES[code])
    choice = choose(said, transport, KEPT)
    assert served(choice) == []
    (absent,) = choice.absent
    assert (absent.uuid, absent.kind) == (FIRST, "cuda_vmm")
    assert CODES[code] in absent.reason
    assert not absent.reason.endswith(".")
    with pytest.raises((DeviceError, DeviceMismatchError), match=CODES[code]):
        try_again(absent, said.split(","), transport, HOLDING, KEPT)
    gpus.failing.clear()
    again = try_again(absent, said.split(","), transport, HOLDING, KEPT)
    assert (again.device.uuid, again.device.kind, again.names) == (FIRST, "cuda_vmm", (FIRST, "cuda:0", "cuda"))


@pytest.mark.parametrize(("call", "code"), [cell for cell in PASSING if cell != FULL])
def test_a_gpu_of_which_nothing_is_kept_is_absent_where_its_uuid_is_known(
    gpus: Driver, call: str, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    gpus.fail(call, CODES[code])
    known = call in ("granularity", "create", "export")
    choice = choose("auto")
    assert served(choice) == []
    assert [(absent.uuid, absent.index, absent.kind) for absent in choice.absent] == [(FIRST, 0, None)] * known
    assert known or CODES[code] in caplog.text
    with pytest.raises(TemporaryConfigError, match=CODES[code]) as caught:
        choose("cuda:0")
    assert caught.value.exit_code == 75
    if known:  # host memory is something else to serve, and the GPU is tried again
        assert choose("host,cuda:0").absent == choice.absent
    else:  # nobody would try it again, and loads would go to host memory
        with pytest.raises(TemporaryConfigError, match=CODES[code]):
            choose("host,cuda:0")
        assert [absent.uuid for absent in choose(f"host,{FIRST}").absent] == [FIRST]


@pytest.mark.parametrize("said", ["auto", "cuda", "cuda:0"])
def test_a_full_gpu_is_served(gpus: Driver, said: str) -> None:
    gpus.fail("create", CODES[2])
    for kept in (KEPT, {}):
        assert served(choose(said, kept=kept)) == WORKS


UNSUPPORTED = ["NOT_SUPPORTED", "INVALID_DEVICE", "INVALID_VALUE", "NOT_PERMITTED"]


@pytest.mark.parametrize("code", UNSUPPORTED)
@pytest.mark.parametrize("call", ["granularity", "create", "export"])
def test_cuda_ipc_takes_over_what_is_not_supported_and_nothing_that_is_kept(gpus: Driver, call: str, code: str) -> None:
    gpus.fail(call, f"CUDA_ERROR_{code}", times=1)
    assert served(choose("auto")) == WORKS
    gpus.fail(call, f"CUDA_ERROR_{code}")
    assert served(choose("auto")) == [(FIRST, "cuda_ipc")]
    choice = choose("auto", kept=KEPT)
    assert (served(choice), [absent.uuid for absent in choice.absent]) == ([], [FIRST])


def test_the_rest_is_served_where_one_fails(gpus: Driver) -> None:
    gpus.gpus = UUIDS
    plain = gpus.functions["cuMemCreate"]

    def create(size: int, properties: Any, flags: int) -> object:
        if properties.location.id == 0:
            raise DeviceError("cuMemCreate failed", {"call": "cuMemCreate", "code": "CUDA_ERROR_UNKNOWN"})
        return plain(size, properties, flags)

    gpus.functions["cuMemCreate"] = create
    for said in ("auto", "cuda", "cuda:0,cuda:1"):
        for kept in (KEPT, {}):
            choice = choose(said, kept=kept)
            assert served(choice) == [(SECOND, "cuda_vmm")]
            assert [(absent.uuid, absent.names) for absent in choice.absent] == [(FIRST, (FIRST, "cuda:0", "cuda"))]
    assert served(choose("cuda:1")) == [(SECOND, "cuda_vmm")]


def test_another_gpu_at_its_index_is_another_gpu(gpus: Driver) -> None:
    gpus.gpus = [SECOND]
    for said in ("auto", "cuda", "cuda:0"):
        choice = choose(said, kept=KEPT)
        assert served(choice) == [(SECOND, "cuda_vmm")]
        reason = f"the driver does not show it; it shows cuda:0 ({SECOND})"
        assert choice.absent == [AbsentDevice(FIRST, None, "cuda_vmm", reason, said=said != "cuda:0")]
        with pytest.raises(DeviceError, match="the driver does not show it"):
            try_again(choice.absent[0], [said], "auto", HOLDING, KEPT)
    gpus.gpus = [SECOND, FIRST]
    assert try_again(choice.absent[0], ["cuda"], "auto", HOLDING, KEPT).names == (FIRST, "cuda:1", "cuda")


def test_a_kept_gpu_that_is_not_shown_is_no_wrong_name(gpus: Driver) -> None:
    gpus.gpus = [SECOND]
    for said in (FIRST, "cuda:1", f"host,{FIRST[:20]}"):
        kept = {**KEPT, SECOND: "cuda_vmm"} if said == "cuda:1" else KEPT
        assert FIRST in [absent.uuid for absent in choose(said, kept=kept).absent]
    for said in ("cuda:1", FIRST[:20]):  # nothing of it is kept, and the driver works: waiting does not help
        gpus.gpus = ["GPU-1" + SECOND[5:]]
        with pytest.raises(ConfigError, match=f"device = '{said}': is not there; the driver shows cuda:0") as caught:
            choose(said)
        assert caught.value.exit_code == 78


def test_a_whole_uuid_that_is_not_shown_is_a_gpu_that_is_missing(gpus: Driver) -> None:
    gpus.gpus = [SECOND]
    for said in (f"{SECOND},{FIRST}", f"host,MIG-{FIRST[4:]}"):
        choice = choose(said)
        assert choice.absent == [
            AbsentDevice(FIRST, None, None, f"the driver does not show it; it shows cuda:0 ({SECOND})")
        ]
        assert served(choice) == [(SECOND, "cuda_vmm")] * (SECOND in said)
    with pytest.raises(TemporaryConfigError, match=f"device {FIRST} cannot be served: the driver does not show it"):
        choose(FIRST)
    gpus.gpus = UUIDS
    assert try_again(choice.absent[0], ["host", f"MIG-{FIRST[4:]}"], "auto", HOLDING, {}).names[0] == FIRST


def test_a_driver_that_shows_no_gpu_may_show_one_later(gpus: Driver) -> None:
    gpus.gpus = []
    assert choose("auto") == Choice([], [])
    for said in ("cuda", "cuda:0", FIRST):
        with pytest.raises(
            TemporaryConfigError, match=r"the driver does not show it|is not there; the driver shows no GPU"
        ):
            choose(said)
        (absent,) = choose(said, kept=KEPT).absent
        assert absent == AbsentDevice(FIRST, None, "cuda_vmm", "the driver does not show it; it shows no GPU")


def test_settings_that_no_longer_say_a_kept_gpu_keep_it(gpus: Driver) -> None:
    assert choose("host", kept=KEPT).absent == [
        AbsentDevice(FIRST, None, "cuda_vmm", "device = 'host' does not name it", said=False)
    ]
    gpus.gpus = UUIDS
    choice = choose(f"host,{SECOND}", kept=KEPT)
    assert served(choice) == [(SECOND, "cuda_vmm")]
    (absent,) = choice.absent
    assert absent == AbsentDevice(FIRST, 0, "cuda_vmm", f"device = 'host,{SECOND}' does not name it", said=False)
    for said in (["host"], ["host", SECOND]):
        with pytest.raises(DeviceError, match="does not name it"):
            try_again(absent, said, "auto", HOLDING, KEPT)


def test_another_transport_does_not_take_a_kept_gpu(gpus: Driver) -> None:
    choice = choose("cuda", "cuda_ipc", KEPT)
    assert served(choice) == []
    (absent,) = choice.absent
    assert absent == AbsentDevice(
        FIRST, 0, "cuda_vmm", "transport = 'cuda_ipc', and what is kept on it is shared by cuda_vmm"
    )
    assert served(choose("cuda", "cuda_ipc")) == [(FIRST, "cuda_ipc")]


def test_a_package_that_is_missing_costs_nothing_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise DeviceMismatchError("the package cuda-bindings is not installed", {"package": "cuda-bindings"})

    monkeypatch.setattr(cuda_driver, "call", missing)
    with pytest.raises(ConfigError, match="cuda-bindings is not installed") as caught:
        choose("cuda")
    assert caught.value.exit_code == 78
    assert choose("auto") == Choice([], [])
    for said in ("auto", "cuda"):
        assert [absent.uuid for absent in choose(said, kept=KEPT).absent] == [FIRST]


def test_what_was_opened_is_closed_where_the_choice_fails(gpus: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.gpus = UUIDS
    closed: list[str] = []
    monkeypatch.setattr(cuda_opening.CudaVmmDevice, "close", lambda self: closed.append(self.uuid))

    def broken(ordinal: int, *arguments: Any) -> ServedGpu:
        if ordinal == 1:
            raise AssertionError("a bug")
        return plain(ordinal, *arguments)

    plain = cuda_opening._open
    monkeypatch.setattr(cuda_opening, "_open", broken)
    with pytest.raises(AssertionError):
        choose("cuda")
    assert closed == [FIRST]


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("CUDA_ERROR_SYSTEM_NOT_READY", "start nvidia-fabricmanager"),
        ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart the machine"),
        ("CUDA_ERROR_DEVICE_UNAVAILABLE", "compute mode"),
    ],
)
def test_an_error_comes_with_what_to_do(code: str, advice: str) -> None:
    assert advice in explained(DeviceError("cuInit failed", {"code": code}))
    assert explained(DeviceError("cuInit failed")) == "cuInit failed"


@pytest.mark.parametrize("code", ["CUDA_ERROR_UNKNOWN", "CUDA_ERROR_NO_DEVICE"])
def test_a_missing_node_of_uvm_is_named(tmp_path: Path, code: str) -> None:
    error = DeviceError("cuInit failed", {"code": code})
    assert explained(error, tmp_path) == "cuInit failed"  # no kernel module at all
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    assert explained(error, tmp_path) == (
        "cuInit failed; /dev/nvidia-uvm is missing: run `nvidia-modprobe -c0 -u` as root"
    )
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia-uvm").touch()
    assert explained(error, tmp_path) == "cuInit failed"


def test_a_driver_that_fails_is_a_warning_and_none_at_all_is_not(
    gpus: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for code, level in (("CUDA_ERROR_SYSTEM_NOT_READY", "WARNING"), ("CUDA_ERROR_NO_DEVICE", "INFO")):
            caplog.clear()
            gpus.fail("init", code)
            assert choose("auto") == Choice([], [])
            assert caplog.records[-1].levelname == level
            assert code in caplog.records[-1].message


def test_a_gpu_that_does_not_tell_its_uuid_hides_no_other_from_loaders(gpus: Driver) -> None:
    gpus.gpus = UUIDS
    gpus.fail("uuid", CODES[999], times=1)
    assert cuda_driver.ordinal_of(SECOND) == 1
    gpus.fail("uuid", CODES[999], times=1)
    with pytest.raises(DeviceError, match=f"{FIRST} is not visible to this process"):
        cuda_driver.ordinal_of(FIRST)
