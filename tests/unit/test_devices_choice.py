"""Which GPUs a daemon serves and how: what settings may say, and what happens where something does not work."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from weightd.errors import DeviceAbsentError, DeviceError, DeviceMismatchError, InvalidReferenceError, NotFoundError
from weightd_daemon.config.settings import ConfigError, Settings, TemporaryConfigError
from weightd_daemon.devices import cuda_choice, cuda_opening
from weightd_daemon.devices.budgets import budget_of, check_names, device_meant
from weightd_daemon.devices.driver_thread import AnyThread
from weightd_daemon.devices.naming import meant
from weightd_daemon.devices.served import Devices

GIB = 1 << 30
UUIDS = [
    "GPU-aaaa0000-0000-0000-0000-000000000000",
    "GPU-aaaa0000-1111-0000-0000-000000000000",
    "GPU-cccc0000-0000-0000-0000-000000000000",
]
HOLDING: Any = None  # passed through


class FakeDevice:
    """A GPU by one transport. `broken` (ordinal, kind) cannot make segments at all; `full` ones have no memory left."""

    broken: ClassVar[set[tuple[int, str]]] = set()
    full: ClassVar[set[tuple[int, str]]] = set()
    open: ClassVar[list[FakeDevice]] = []
    page = 2 << 20
    creates_by, releases_by = "cuMemCreate", "cuMemRelease"
    default_share = 0.8
    loader_bytes = 0

    def __init__(self, kind: str, ordinal: int) -> None:
        self.kind = kind
        self.key = (ordinal, kind)
        self.uuid = UUIDS[ordinal]
        self.segments = 0
        self.calls = AnyThread()
        self.open.append(self)

    def capacity(self) -> int:
        return 10 * GIB

    def create(self, size: int) -> int:
        if self.key in self.broken:
            raise DeviceError(f"{self.kind} is not for {self.uuid}", {"code": "CUDA_ERROR_NOT_SUPPORTED"})
        if self.key in self.full:
            raise MemoryError
        assert size == self.page
        self.segments += 1
        return self.segments

    def release(self, segment: int) -> None:
        self.segments -= 1

    def close(self) -> None:
        self.open.remove(self)


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_choice.driver, "initialise", lambda: None)
    monkeypatch.setattr(cuda_choice.driver, "device_count", lambda: len(UUIDS))
    monkeypatch.setattr(cuda_choice.driver, "uuid_of", lambda ordinal: UUIDS[ordinal])
    monkeypatch.setattr(cuda_choice.driver, "compute_mode", lambda _: 0)
    monkeypatch.setattr(cuda_opening, "CudaVmmDevice", lambda ordinal: FakeDevice("cuda_vmm", ordinal))
    monkeypatch.setattr(cuda_opening, "CudaIpcDevice", lambda ordinal, _: FakeDevice("cuda_ipc", ordinal))
    monkeypatch.setattr(cuda_opening, "_refusals", {})
    for name in ("broken", "full", "open"):
        monkeypatch.setattr(FakeDevice, name, type(getattr(FakeDevice, name))())


def opened_for(device: str, **more: str) -> Devices:
    """The devices of a daemon that keeps nothing."""
    served = Devices(Settings(device=device, **more), HOLDING)
    served.open({})
    return served


def served(device: str, **more: str) -> list[tuple[str, str]]:
    """What is served, in order: (name, kind)."""
    names = {"host": "host", **{uuid: f"cuda:{ordinal}" for ordinal, uuid in enumerate(UUIDS)}}
    opened = list(opened_for(device, **more).devices.values())
    assert [made for made in opened if isinstance(made, FakeDevice)] == FakeDevice.open
    assert not any(made.segments for made in FakeDevice.open)
    return [(names[made.uuid], made.kind) for made in opened]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("auto", ["host", "cuda:0", "cuda:1", "cuda:2"]),
        ("host", ["host"]),
        ("cuda", ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda,host", ["host", "cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:2,cuda:0", ["cuda:2", "cuda:0"]),
        ("GPU-cccc0000,host", ["host", "cuda:2"]),
        (f"{UUIDS[1]}", ["cuda:1"]),
    ],
)
def test_what_is_said_is_served(said: str, expected: list[str]) -> None:
    assert [name for name, _ in served(said)] == expected


@pytest.mark.parametrize(
    ("said", "message", "kind"),
    [
        ("cuda:3", "'cuda:3': is not there; the driver shows cuda:0", ConfigError),
        ("GPU-dddd0000", "'GPU-dddd0000': is not there", ConfigError),
        ("GPU-aaaa0000", "means more than one of .*; say more of it", ConfigError),
        ("cuda:2,GPU-cccc0000", r"is cuda:2 \(GPU-cccc.*\), which is named already", ConfigError),
    ],
)
def test_what_does_not_name_one_gpu_is_refused(said: str, message: str, kind: type[ConfigError]) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        served(said)
    assert type(caught.value) is kind
    assert FakeDevice.open == []


def test_without_a_driver_auto_serves_host_memory_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_driver() -> int:
        raise DeviceMismatchError("no CUDA driver can be used here: libcuda is missing")

    monkeypatch.setattr(cuda_choice.driver, "device_count", no_driver)
    with caplog.at_level(logging.INFO):
        assert served("auto") == [("host", "host")]
    assert [record.message for record in caplog.records] == [
        "no GPU is served, only host memory: no CUDA driver can be used here: libcuda is missing"
    ]
    for said in ("cuda", "cuda:0", "host,GPU-cccc0000"):
        with pytest.raises(TemporaryConfigError, match=r"device = .*libcuda is missing"):
            served(said)
    assert served("host") == [("host", "host")]


def test_a_package_that_is_missing_does_not_come_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_choice.driver, "device_count", lambda: cuda_choice.driver.call("cuInit", 0))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(ConfigError, match="needs the package cuda-bindings, which is not installed") as caught:
        served("cuda")
    assert type(caught.value) is ConfigError


def test_a_driver_that_fails_is_a_warning_where_auto_goes_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> int:
        raise DeviceError("cuDeviceGetCount failed", {"code": "CUDA_ERROR_UNKNOWN"})

    monkeypatch.setattr(cuda_choice.driver, "device_count", broken)
    assert served("auto") == [("host", "host")]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "no GPU is served, only host memory: cuDeviceGetCount failed")
    ]


def test_a_gpu_that_does_not_say_its_uuid_is_left_out_by_auto_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def uuid_of(ordinal: int) -> str:
        if ordinal == 1:
            raise DeviceError("cuDeviceGetUuid failed", {"code": "CUDA_ERROR_UNKNOWN"})
        return UUIDS[ordinal]

    monkeypatch.setattr(cuda_choice.driver, "uuid_of", uuid_of)
    assert [name for name, _ in served("auto")] == ["host", "cuda:0", "cuda:2"]
    assert [record.message for record in caplog.records] == ["device cuda:1 is not served: cuDeviceGetUuid failed"]
    FakeDevice.open.clear()
    assert [name for name, _ in served("cuda")] == ["cuda:0", "cuda:2"]
    FakeDevice.open.clear()
    with pytest.raises(TemporaryConfigError, match="device = 'cuda:1': cuDeviceGetUuid failed"):
        served("cuda:1")
    assert [name for name, _ in served("cuda:2")] == ["cuda:2"]  # whatever the others do


def test_cuda_ipc_is_used_where_exporting_fails_and_the_rest_stays() -> None:
    FakeDevice.broken |= {(1, "cuda_vmm")}
    assert served("cuda") == [("cuda:0", "cuda_vmm"), ("cuda:1", "cuda_ipc"), ("cuda:2", "cuda_vmm")]


def test_a_transport_that_is_said_is_the_one_that_is_used() -> None:
    assert served("cuda:0", transport="cuda_ipc") == [("cuda:0", "cuda_ipc")]
    FakeDevice.open.clear()
    FakeDevice.broken |= {(1, "cuda_vmm")}
    with pytest.raises(TemporaryConfigError, match=f"device {UUIDS[1]} cannot be served: cuda_vmm is not for"):
        served("cuda:1", transport="cuda_vmm")
    assert FakeDevice.open == []


def test_a_gpu_that_works_in_no_way_is_left_out_by_auto_and_refused_where_it_was_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    FakeDevice.broken |= {(1, "cuda_vmm"), (1, "cuda_ipc")}
    assert [name for name, _ in served("auto")] == ["host", "cuda:0", "cuda:2"]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"device {UUIDS[1]} is not served: neither transport works: "
        f"cuda_vmm is not for {UUIDS[1]}; cuda_ipc is not for {UUIDS[1]}"
    ]
    FakeDevice.open.clear()
    with pytest.raises(TemporaryConfigError, match=f"device {UUIDS[1]} cannot be served: neither transport works"):
        served("cuda:1")


def test_a_gpu_that_is_full_when_tried_is_served_all_the_same() -> None:
    FakeDevice.full |= {(0, "cuda_vmm")}
    assert served("cuda:0") == [("cuda:0", "cuda_vmm")]


def test_a_budget_for_a_device_that_is_not_served_is_refused() -> None:
    for device, budget, kind in (
        ("host", "cuda:0=1GiB", ConfigError), ("cuda:0", "cuda:1=50%", ConfigError),
        ("cuda", "host=1GiB,cuda=50%", ConfigError), ("auto", "cuda:3=1GiB", TemporaryConfigError),
        ("cuda", "cuda:3=1GiB", TemporaryConfigError), ("auto", "GPU-dddd0000=1GiB", TemporaryConfigError),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"budget = .* is not served") as caught:
            served(device, budget=budget)
        assert type(caught.value) is kind
        FakeDevice.open.clear()
    for device, budget in (("host,cuda:0", "cuda:0=1GiB"), ("cuda:0", "cuda=50%"), ("auto", "GPU-cccc0000=50%")):
        served(device, budget=budget)
        FakeDevice.open.clear()


def test_a_budget_for_a_uuid_that_means_several_devices_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"GPU-aaaa0000 means more than one of {UUIDS[0]}, {UUIDS[1]}; say more of"):
        served("cuda", budget="GPU-aaaa0000=1GiB")
    FakeDevice.open.clear()
    served("cuda:0", budget="GPU-aaaa0000=1GiB")  # only one of those that are served


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", 8 * GIB),
        ("50%", 5 * GIB),
        ("1GiB,cuda=2GiB", 2 * GIB),
        ("1GiB,cuda=2GiB,cuda:0=3GiB", 3 * GIB),
        ("cuda:0=3GiB,GPU-aaaa0000=4GiB", 4 * GIB),
        ("cuda:0=5000000", 4 << 20),
    ],
)
def test_a_budget_is_what_says_most_of_the_device_in_whole_pages(said: str, expected: int) -> None:
    device: Any = FakeDevice("cuda_vmm", 0)
    assert budget_of(Settings(budget=said), device, (UUIDS[0], "cuda:0", "cuda")) == expected


@pytest.mark.parametrize("said", ["11GiB", "1GiB,cuda=11GiB"])
def test_with_auto_a_budget_for_all_is_at_most_what_a_device_has(said: str, caplog: pytest.LogCaptureFixture) -> None:
    """`serve --budget 64GiB` goes on serving host memory when the machine gets a small GPU."""
    device: Any = FakeDevice("cuda_vmm", 0)
    with caplog.at_level(logging.INFO):
        assert budget_of(Settings(budget=said), device, (UUIDS[0], "cuda:0", "cuda")) == 10 * GIB
    assert [record.message for record in caplog.records] == [
        f"budget of {UUIDS[0]}: {10 * GIB} bytes is all that it has, of the {11 * GIB} said"
    ]
    with pytest.raises(ConfigError, match=f"that of {UUIDS[0]} must be from"):
        budget_of(Settings(budget=said, device="cuda"), device, (UUIDS[0], "cuda:0", "cuda"))


def test_a_budget_that_leaves_no_room_for_a_loader_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    device: Any = FakeDevice("cuda_vmm", 0)
    device.loader_bytes = GIB // 2
    budget_of(Settings(budget="9728MiB"), device, (UUIDS[0], "cuda:0", "cuda"))
    assert not caplog.records
    budget_of(Settings(budget="9729MiB"), device, (UUIDS[0], "cuda:0", "cuda"))
    assert [record.message for record in caplog.records] == [
        f"budget of {UUIDS[0]}: 9.50 GiB of 10.0 GiB leave less than the context of a loader may take, 512 MiB"
    ]


@pytest.mark.parametrize("said", ["cuda:0=11GiB", "1GiB,GPU-aaaa0000=11GiB", "1000"])
def test_a_budget_that_the_device_cannot_have_is_refused_by_its_name(said: str) -> None:
    device: Any = FakeDevice("cuda_vmm", 0)
    with pytest.raises(ConfigError, match=f"that of {UUIDS[0]} must be from 2097152 bytes to 10.0 GiB here"):
        budget_of(Settings(budget=said), device, (UUIDS[0], "cuda:0", "cuda"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [("host", "host"), ("cuda:1", UUIDS[1]), ("host,cuda:1", UUIDS[1]), ("cuda", ""), ("auto", "")],
)
def test_a_load_that_names_no_device_goes_to_the_only_gpu_or_the_only_device(said: str, expected: str) -> None:
    assert opened_for(said).default == expected


@pytest.mark.parametrize("said", ["GPU-cccc0000", "gpu-CCCC0000", "MIG-cccc0000", UUIDS[2].replace("GPU-", "MIG-"), ""])
def test_a_request_means_a_gpu_by_the_beginning_of_its_uuid(said: str) -> None:
    devices: Any = {uuid: SimpleNamespace(name="A GPU") for uuid in UUIDS}
    assert meant(devices, said) == (UUIDS[2] if said else "")
    for other in ("GPU-cccc", "MIG-cccc000", "XXX-cccc0000", "MIG-dddd0000"):
        with pytest.raises(NotFoundError, match="this daemon serves GPU-"):
            meant(devices, other)
    with pytest.raises(InvalidReferenceError, match="means more than one of"):
        meant(devices, "MIG-aaaa0000")


SERVED = {"host": ("host",), UUIDS[0]: (UUIDS[0], "cuda:0", "cuda"), UUIDS[1]: (UUIDS[1], "cuda:1", "cuda")}


@pytest.mark.parametrize(
    ("said", "expected"),
    [("host", "host"), ("cuda:1", UUIDS[1]), (UUIDS[0], UUIDS[0]), (UUIDS[1][:14], UUIDS[1]), ("", "default")],
)
def test_a_setting_names_one_of_the_devices_that_are_served(said: str, expected: str) -> None:
    assert device_meant(said, SERVED, "default", ["auto"]) == expected


@pytest.mark.parametrize(
    ("said", "devices", "why", "kind"),
    [("cuda", "auto", "may be one of several", ConfigError), ("GPU-aaaa0000", "auto", "one of several", ConfigError),
     ("", "auto", "'' may be one of several", ConfigError), ("cuda:2", "auto", "is not served", TemporaryConfigError),
     ("cuda:2", "host,cuda", "is not served", TemporaryConfigError),
     ("GPU-c", "cuda:0,cuda:1", "not served", TemporaryConfigError),
     ("cuda:2", "host,cuda:0,cuda:1", "is not served", ConfigError)],
)  # fmt: skip
def test_a_setting_that_names_none_or_several_is_refused(
    said: str, devices: str, why: str, kind: type[ConfigError]
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        device_meant(said, SERVED, "", Settings(device=devices).devices)
    assert type(caught.value) is kind


NUMBERLESS = {"host": ("host",), UUIDS[0]: (UUIDS[0], "cuda")}
"""A GPU is kept, and the driver does not say which number it has now."""


def test_a_number_may_be_that_of_an_absent_gpu_whose_number_is_not_known() -> None:
    for devices in ("auto", "host,cuda:0"):
        with pytest.raises(DeviceAbsentError, match=f"'cuda:0' may be {UUIDS[0]}, which is absent") as caught:
            device_meant("cuda:0", NUMBERLESS, "", Settings(device=devices).devices)
        assert caught.value.metadata == {"device": UUIDS[0]}
        with pytest.raises(ConfigError, match="is not served"):
            device_meant("GPU-cccc0000", NUMBERLESS, "", Settings(device=devices).devices)
    with pytest.raises(ConfigError, match="is not served"):
        device_meant("host", {UUIDS[0]: NUMBERLESS[UUIDS[0]]}, "", ["cuda:0"])


@pytest.mark.parametrize("device", ["cuda:0", "host,cuda:0", "cuda", "auto"])
@pytest.mark.parametrize("said", ["cuda:0", "cuda:2"])
def test_the_budget_of_a_number_waits_with_a_kept_gpu_for_a_driver_that_fails(
    monkeypatch: pytest.MonkeyPatch, device: str, said: str
) -> None:
    settings = Settings(device=device, budget=f"64MiB,{said}=1GiB")
    kept = {UUIDS[0]: "cuda_vmm"}
    with monkeypatch.context() as patch:
        patch.setattr(cuda_choice.driver, "device_count", no_driver)
        served = Devices(settings, HOLDING)
        served.open(kept)
        assert {*served.absent} == {UUIDS[0]}
        check_names(settings, served.names.values())  # as on SIGHUP
    served = Devices(Settings(device=device, budget="64MiB,cuda:9=1GiB"), HOLDING)
    with pytest.raises(ConfigError, match="cuda:9 is not served"):  # the driver shows all GPUs
        served.open(kept)
    served.close()


def no_driver() -> int:
    raise DeviceError("cuInit failed", {"code": "CUDA_ERROR_SYSTEM_NOT_READY"})


def test_a_refusal_that_stays_the_same_is_in_the_log_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An absent GPU is tried again every minute for as long as it is absent."""
    caplog.set_level(logging.INFO)
    says = ["CUDA_ERROR_ECC"]

    def uuid_of(ordinal: int) -> str:
        if ordinal == 1 and says:
            raise DeviceError(f"cuda:1: {says[0]}", {"code": says[0]})
        return UUIDS[ordinal]

    def tries() -> list[str]:
        caplog.clear()
        for _ in range(3):
            cuda_choice._look()
        return [record.getMessage() for record in caplog.records]

    monkeypatch.setattr(cuda_choice.driver, "uuid_of", uuid_of)
    first = "the driver is asked once more for cuda:1: cuda:1: CUDA_ERROR_ECC"
    assert tries() == [first]
    assert tries() == []
    says[0] = "CUDA_ERROR_SYSTEM_NOT_READY"
    assert tries() == ["the driver is asked once more for cuda:1: cuda:1: CUDA_ERROR_SYSTEM_NOT_READY"]
    says.clear()
    assert tries() == []
    says.append("CUDA_ERROR_ECC")
    assert tries() == [first], "it had worked in between"
