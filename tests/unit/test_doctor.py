"""What `weightd doctor` makes of injected facts: every check in every state that docs/operations.md gives it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from weightd.cli.health import extras, gpus, kernel, reach, rlimits, service, storage
from weightd.cli.health.asking import Answer
from weightd.cli.health.finding import AREAS, CHECKS, EXTRAS, Finding, Status

GOOD, DOUBTFUL, BAD, UNKNOWN = Status.GOOD, Status.DOUBTFUL, Status.BAD, Status.UNKNOWN
MIB, GIB = 1 << 20, 1 << 30
OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
LATE = Answer({}, "did not answer in 5 s", late=True)
ENDED = Answer({}, "the look ended without an answer")
GPU = "GPU-00000000-0000-0000-0000-00000000000a"

# -- facts of a machine where all is well ------------------------------------------------------------------------------


def status(**changes: Any) -> dict[str, Any]:
    usual = {"is_socket": True, "mode": 0o660, "uid": 7, "gid": 7, "owner": "weightd", "group": "weightd"}
    return usual | changes


def socket(**changes: Any) -> list[Finding]:
    usual = {
        "candidates": ["/run/weightd/weightd.sock"], "socket": "/run/weightd/weightd.sock", "path": "/run/weightd",
        "refused": "", "barrier": "", "uid": 1000, "user": "alice", "status": status(), "folder": status(mode=0o750),
    }  # fmt: skip
    return reach.judge_socket(Answer(usual | changes))


DEVICE = {"uuid": "host", "kind": "host", "budget": GIB, "used": 0, "absence": ""}
ANSWERS = {
    "error": "", "message": "", "version": "1.0", "uptime": 5.0, "pid": 42, "uid": 7, "user": "weightd",
    "state": "serving", "devices": [DEVICE], "index": "/var/lib/weightd/digests", "index_problem": "",
}  # fmt: skip


def daemon(**changes: Any) -> list[Finding]:
    return reach.judge_daemon(Answer(ANSWERS | changes), "1.0")


def refused(kind: str) -> list[Finding]:
    return reach.judge_daemon(Answer({"error": kind, "message": "what is wrong; what to do"}), "1.0")


ROOMY: dict[str, tuple[int | None, int | None]] = {
    "nofile": (1024, 65536), "nproc": (None, None), "fsize": (None, None), "as": (None, None), "memlock": (None, None),
}  # fmt: skip


def limits(gpu: bool | None = False, **changes: tuple[int | None, int | None]) -> list[Finding]:
    ours = ROOMY | {name.rstrip("_"): limit for name, limit in changes.items()}
    return rlimits.judge_limits(ours, ours, gpu=gpu)


KERNEL = {
    "overcommit": "0", "mappings": "65530", "memfd_noexec": "0", "pagemap": "", "meminfo": "",
    "shmem_enabled": "always within_size [advise] never deny force",
}  # fmt: skip
HOST: dict[str, Any] = {
    "capacity": 4 * GIB, "available": 3 * GIB, "cgroup": None, "cgroup_known": True, "budget": GIB, "budget_error": "",
    "settings_error": "", "memfd_error": "", "mps": "",
    "nodes": {"shown": ["nvidia0"], "missing": [], "denied": [], "advice": "", "nvswitch": False},
}  # fmt: skip


def memory(running: dict[str, Any] | None = None, without: str = "", **changes: Any) -> list[Finding]:
    texts = KERNEL | {name: value for name, value in changes.items() if name in KERNEL}
    facts = HOST | {name: value for name, value in changes.items() if name in HOST}
    return kernel.judge_memory(Answer(facts), running or {}, {k: v for k, v in texts.items() if k != without})


def strict(committed: int) -> list[Finding]:
    return memory(overcommit="2", meminfo=f"CommitLimit:     {GIB >> 10} kB\nCommitted_AS:  {committed >> 10} kB")


def unit(running: dict[str, Any] | None = None, version: int | None = 254, **changes: str) -> list[Finding]:
    usual = {
        "Id": service.UNIT, "LoadState": "loaded", "ActiveState": "active", "Result": "success", "MainPID": "42",
        "Type": "notify", "FileDescriptorStoreMax": "4096", "NFileDescriptorStore": "7",
        "FileDescriptorStorePreserve": "yes",
    }  # fmt: skip
    shown = "\n".join(f"{name}={value}" for name, value in (usual | changes).items())
    system = Answer({"text": f"{shown}\n\nId={service.FABRIC}\nLoadState=not-found"})
    found = service.Systemd(True, version, system, Answer({"text": ""}))
    return service.judge_service(found, 252, ANSWERS if running is None else running)


def state(**changes: Any) -> list[Finding]:
    usual = {
        "folder": "/var/lib/weightd", "error": "", "exists": True, "is_folder": True, "uid": 7, "mode": 0o700,
        "free": GIB, "writable": True,
    }  # fmt: skip
    return storage.judge_state(Answer(usual | changes), {})


DRIVER: dict[str, Any] = {
    "package": True, "version": 13000, "gpus": [{"ordinal": 0, "uuid": GPU, "mode": 0, "forbids": ""}],
}  # fmt: skip
NVML: dict[str, Any] = {
    "package": True, "driver": "580.1", "gpus": [{"uuid": GPU, "persistence": 1, "fabric": None}],
}  # fmt: skip


def gpu(
    driver: dict[str, Any] | Answer | None = DRIVER,
    nvml: dict[str, Any] | Answer | None = NVML,
    units: dict[str, Any] | None = None,
    nodes: dict[str, Any] | None = None,
    mps: str = "",
) -> list[Finding]:
    host = HOST | {"nodes": HOST["nodes"] | (nodes or {}), "mps": mps}
    answers = (Answer(facts) if isinstance(facts, dict) else facts for facts in (driver, nvml))
    return gpus.judge_gpus(gpus.Looks(Answer(host), *answers, units or {}, None))


def mode(number: int) -> dict[str, Any]:
    return DRIVER | {"gpus": [DRIVER["gpus"][0] | {"mode": number, "forbids": "something"}]}


def shown(**changes: Any) -> dict[str, Any]:
    return NVML | {"gpus": [NVML["gpus"][0] | changes]}


NEEDED = [
    extras.Requirement("", "grpcio", ">=1.71,<2"),
    *(extras.Requirement(extra, f"{extra}-one", ">=1,<2") for extra in EXTRAS),
    *(extras.Requirement(extra, f"{extra}-two", ">=1,<2") for extra in EXTRAS),
    extras.Requirement("transformers", "torch-one", ">=1,<2", own=False),
]
HAVE = {each.package: "1.80" for each in NEEDED}


def packages(gpu: bool | None = False, **changes: str | None) -> list[Finding]:
    have = HAVE | {name.replace("_", "-"): version for name, version in changes.items()}
    return extras.judge_packages(NEEDED, {k: v for k, v in have.items() if v is not None}, gpu=gpu)


# -- every check in every state ----------------------------------------------------------------------------------------

CASES: list[tuple[str, Status, list[Finding]]] = [
    ("socket", GOOD, socket()),
    ("socket", BAD, socket(status=None)),
    ("socket", BAD, socket(status=status(is_socket=False))),
    ("socket", BAD, socket(refused="belongs to uid 5")),
    ("socket", UNKNOWN, socket(status=None, barrier="only root may enter /run/weightd")),
    ("socket-folder", GOOD, socket()),
    ("socket-folder", DOUBTFUL, socket(folder=status(mode=0o1777, uid=0))),
    ("socket-folder", DOUBTFUL, socket(folder=status(mode=0o770))),
    ("socket-folder", DOUBTFUL, socket(folder=status(mode=0o755, uid=5))),
    ("socket-folder", BAD, socket(folder=status(mode=0o777))),
    ("socket-folder", UNKNOWN, socket(folder=None, status=None)),
    ("socket-folder", UNKNOWN, socket(refused="belongs to uid 5")),
    ("access", GOOD, socket()),
    ("access", DOUBTFUL, socket(status=status(mode=0o666), folder=status(mode=0o755))),
    ("access", DOUBTFUL, socket(folder=status(mode=0o700))),
    ("access", BAD, socket(barrier="only user weightd may connect; ask weightd")),
    ("access", UNKNOWN, socket(status=None)),
    ("daemon", GOOD, daemon()),
    ("daemon", DOUBTFUL, daemon(version="0.9")),
    ("daemon", DOUBTFUL, daemon(state="draining")),
    ("daemon", DOUBTFUL, refused("DaemonBusyError")),
    ("daemon", DOUBTFUL, reach.judge_daemon(LATE, "1.0")),
    *(
        ("daemon", BAD, refused(f"{kind}Error"))
        for kind in ("DaemonUnreachable", "PermissionDenied", "ProtocolMismatch")
    ),
    ("daemon", UNKNOWN, reach.judge_daemon(ENDED, "1.0")),
    ("devices", GOOD, daemon()),
    ("devices", DOUBTFUL, daemon(devices=[DEVICE | {"uuid": GPU, "absence": "it does not answer"}])),
    ("devices", UNKNOWN, refused("DaemonUnreachableError")),
    ("descriptors", GOOD, limits()),
    ("descriptors", DOUBTFUL, limits(nofile=(1023, 65536))),
    ("descriptors", BAD, limits(nofile=(63, 65536))),
    ("descriptors", UNKNOWN, rlimits.judge_limits({}, None, gpu=False)),
    ("daemon-descriptors", GOOD, limits(nofile=(1024, None))),
    ("daemon-descriptors", DOUBTFUL, limits(nofile=(1024, 8191))),
    ("daemon-descriptors", BAD, limits(nofile=(63, 63))),
    ("daemon-descriptors", UNKNOWN, rlimits.judge_limits(ROOMY, None, gpu=False)),
    ("processes", GOOD, limits(nproc=(256, 256))),
    ("processes", DOUBTFUL, limits(nproc=(255, 255))),
    ("processes", BAD, limits(nproc=(31, 31))),
    ("processes", UNKNOWN, rlimits.judge_limits(ROOMY, None, gpu=False)),
    ("file-size", GOOD, limits()),
    ("file-size", DOUBTFUL, limits(fsize=(GIB, GIB))),
    ("file-size", BAD, limits(fsize=(GIB - 1, GIB))),
    ("file-size", UNKNOWN, rlimits.judge_limits(ROOMY, None, gpu=False)),
    ("address-space", GOOD, limits()),
    ("address-space", DOUBTFUL, limits(as_=(GIB, None))),
    ("address-space", BAD, limits(as_=(GIB - 1, None))),
    ("address-space", UNKNOWN, rlimits.judge_limits({}, None, gpu=False)),
    ("locked-memory", GOOD, limits(memlock=(8 * MIB, 8 * MIB))),
    ("locked-memory", GOOD, limits(True, memlock=(64 * MIB, 64 * MIB))),
    ("locked-memory", DOUBTFUL, limits(True, memlock=(8 * MIB, 8 * MIB))),
    ("locked-memory", UNKNOWN, limits(None, memlock=(8 * MIB, 8 * MIB))),
    ("budget", GOOD, memory()),
    ("budget", GOOD, memory(ANSWERS | {"devices": []}, settings_error="wrong, and another's")),
    ("budget", GOOD, memory(ANSWERS | {"devices": [DEVICE | {"used": GIB}]}, available=0)),
    ("budget", DOUBTFUL, memory(available=GIB - 1)),
    ("budget", BAD, memory(settings_error="weightd.toml:3: bugdet: no such setting")),
    ("budget", BAD, memory(budget_error="budget = '9TiB': must be at most 4 GiB here")),
    ("budget", UNKNOWN, memory(available=None)),
    ("cgroup", GOOD, memory()),
    ("cgroup", GOOD, memory(cgroup=2 * GIB)),
    ("cgroup", DOUBTFUL, memory(cgroup=GIB)),
    ("cgroup", BAD, memory(cgroup=GIB - 1)),
    ("cgroup", BAD, memory(ANSWERS, cgroup=GIB - 1, budget=MIB)),
    ("cgroup", UNKNOWN, memory(cgroup_known=False)),
    ("cgroup", UNKNOWN, memory(ANSWERS | {"pid": 0}, cgroup=GIB - 1)),
    ("cgroup", UNKNOWN, memory(cgroup=GIB, settings_error="wrong")),
    ("overcommit", GOOD, memory(overcommit="1")),
    ("overcommit", DOUBTFUL, memory(overcommit="2")),
    ("overcommit", DOUBTFUL, strict(GIB // 2)),
    ("overcommit", BAD, strict(GIB - MIB)),
    ("overcommit", BAD, strict(2 * GIB)),
    ("overcommit", UNKNOWN, memory(without="overcommit")),
    ("mappings", GOOD, memory(mappings="1048576")),
    ("mappings", DOUBTFUL, memory(mappings="65529")),
    ("mappings", BAD, memory(mappings="4095")),
    ("mappings", UNKNOWN, memory(without="mappings")),
    ("memfd", GOOD, memory()),
    ("memfd", GOOD, memory(without="memfd_noexec")),
    ("memfd", DOUBTFUL, memory(memfd_noexec="2")),
    ("memfd", BAD, memory(memfd_noexec="2", memfd_error="[Errno 13] Permission denied")),
    ("memfd", UNKNOWN, kernel.judge_memory(ENDED, {}, KERNEL)),
    ("huge-pages", GOOD, memory()),
    ("huge-pages", DOUBTFUL, memory(shmem_enabled="always within_size advise [never] deny force")),
    ("huge-pages", DOUBTFUL, memory(shmem_enabled="always within_size advise never [deny] force")),
    ("huge-pages", UNKNOWN, memory(without="shmem_enabled")),
    ("pagemap", GOOD, memory()),
    ("pagemap", DOUBTFUL, memory(pagemap="Permission denied")),
    ("pagemap", UNKNOWN, memory(without="pagemap")),
    ("systemd", GOOD, unit()),
    ("systemd", DOUBTFUL, unit(version=251)),
    ("systemd", DOUBTFUL, service.judge_service(service.Systemd(False, None, ENDED, ENDED), 252, {})),
    ("systemd", DOUBTFUL, service.judge_service(service.Systemd(True, 254, LATE, LATE), 252, {})),
    ("systemd", UNKNOWN, unit(version=None)),
    ("unit", GOOD, unit()),
    ("unit", DOUBTFUL, unit(LoadState="not-found")),
    ("unit", DOUBTFUL, unit({}, ActiveState="inactive", MainPID="0")),
    ("unit", DOUBTFUL, unit(MainPID="43")),
    ("unit", BAD, unit({}, ActiveState="failed", MainPID="0", Result="exit-code")),
    ("unit", BAD, unit(LoadState="bad-setting")),
    ("unit", UNKNOWN, service.judge_service(service.Systemd(True, 254, ENDED, ENDED), 252, {})),
    ("unit-type", GOOD, unit(Type="notify-reload")),
    ("unit-type", BAD, unit(Type="simple")),
    ("unit-type", UNKNOWN, unit(Type="")),
    ("descriptor-store", GOOD, unit(NFileDescriptorStore="3839")),
    ("descriptor-store", GOOD, unit(version=253, FileDescriptorStorePreserve="no")),
    ("descriptor-store", DOUBTFUL, unit(FileDescriptorStorePreserve="no")),
    ("descriptor-store", DOUBTFUL, unit(NFileDescriptorStore="3840")),
    ("descriptor-store", BAD, unit(NFileDescriptorStore="4096")),
    ("descriptor-store", BAD, unit(FileDescriptorStoreMax="0", NFileDescriptorStore="0")),
    ("descriptor-store", UNKNOWN, unit(NFileDescriptorStore="")),
    ("state-dir", GOOD, state()),
    ("state-dir", GOOD, state(exists=False, mode=0o1777)),
    ("state-dir", DOUBTFUL, state(writable=False)),
    ("state-dir", DOUBTFUL, state(free=64 * MIB - 1)),
    ("state-dir", DOUBTFUL, state(is_folder=False)),
    ("state-dir", DOUBTFUL, storage.judge_state(Answer({}), ANSWERS | {"index_problem": "disk full"})),
    ("state-dir", DOUBTFUL, storage.judge_state(LATE, {})),
    ("state-dir", BAD, state(mode=0o770)),
    ("state-dir", UNKNOWN, state(writable=None)),
    ("state-dir", UNKNOWN, state(error="/root: Permission denied")),
    ("gpu", GOOD, gpus.judge_presence(gpus.Presence(True, "580.1", 1))),
    ("gpu", GOOD, gpus.judge_presence(gpus.Presence(False, "", 0))),
    ("gpu", DOUBTFUL, gpus.judge_presence(gpus.Presence(False, "", 2))),
    ("gpu", UNKNOWN, gpus.judge_presence(gpus.Presence(False, "", None))),
    ("gpu-nodes", GOOD, gpu()),
    ("gpu-nodes", BAD, gpu(nodes={"missing": ["nvidia-uvm"]})),
    ("gpu-nodes", BAD, gpu(nodes={"denied": ["nvidia0"]})),
    ("gpu-nodes", UNKNOWN, gpus.judge_gpus(gpus.Looks(ENDED, None, None, {}, None))),
    ("gpu-driver", GOOD, gpu()),
    ("gpu-driver", BAD, gpu(driver=DRIVER | {"version": 11080})),
    ("gpu-driver", BAD, gpu(driver={"package": True, "error": "cuInit failed; restart", "code": "CUDA_ERROR_UNKNOWN"})),
    ("gpu-driver", BAD, gpu(driver={"package": False, "error": "needs cuda-bindings", "code": ""})),
    ("gpu-driver", DOUBTFUL, gpu(driver=LATE)),
    ("gpu-driver", UNKNOWN, gpu(driver=None)),
    ("gpu-visible", GOOD, gpu()),
    ("gpu-visible", DOUBTFUL, gpu(driver=DRIVER | {"gpus": [*DRIVER["gpus"], {"ordinal": 1, "error": "fell off"}]})),
    ("gpu-visible", BAD, gpu(driver=DRIVER | {"gpus": []})),
    ("gpu-visible", UNKNOWN, gpu(driver=None)),
    ("gpu-compute-mode", GOOD, gpu()),
    ("gpu-compute-mode", DOUBTFUL, gpu(driver=mode(3))),
    ("gpu-compute-mode", BAD, gpu(driver=mode(2))),
    ("gpu-compute-mode", UNKNOWN, gpu(driver=DRIVER | {"gpus": [{"ordinal": 0, "error": "fell off"}]})),
    ("gpu-mps", GOOD, gpu()),
    ("gpu-mps", GOOD, gpu(mps="MPS runs here")),
    ("gpu-mps", DOUBTFUL, gpu(mps="MPS runs here", driver=mode(3))),
    ("gpu-mps", UNKNOWN, gpus.judge_gpus(gpus.Looks(ENDED, None, None, {}, None))),
    ("gpu-persistence", GOOD, gpu()),
    ("gpu-persistence", DOUBTFUL, gpu(nvml=shown(persistence=0))),
    ("gpu-persistence", UNKNOWN, gpu(nvml=shown(persistence=None))),
    ("gpu-persistence", UNKNOWN, gpu(nvml={"package": False, "error": "nvidia-ml-py is not installed"})),
    ("gpu-fabric", GOOD, gpu()),
    ("gpu-fabric", GOOD, gpu(nvml=shown(fabric=3))),
    ("gpu-fabric", DOUBTFUL, gpu(nvml=shown(fabric=2))),
    ("gpu-fabric", BAD, gpu(nvml=shown(fabric=1))),
    ("gpu-fabric", BAD, gpu({"package": True, "error": "cuInit failed", "code": "CUDA_ERROR_SYSTEM_NOT_READY"})),
    ("gpu-fabric", BAD, gpu(None, None, {service.FABRIC: {"ActiveState": "failed"}}, {"nvswitch": True})),
    ("gpu-fabric", UNKNOWN, gpu(None, None)),
    ("base-packages", GOOD, packages()),
    ("base-packages", BAD, packages(grpcio=None)),
    ("base-packages", BAD, packages(grpcio="1.70.3")),
    ("base-packages", UNKNOWN, packages(grpcio="")),
    *((f"extra-{name}", GOOD, packages()) for name in EXTRAS),
    *((f"extra-{name}", GOOD, packages(**{f"{name}_one": None, f"{name}_two": None})) for name in EXTRAS),
    *((f"extra-{name}", DOUBTFUL, packages(**{f"{name}_one": None})) for name in EXTRAS),
    *((f"extra-{name}", DOUBTFUL, packages(**{f"{name}_two": "2.0"})) for name in EXTRAS),
    *((f"extra-{name}", UNKNOWN, packages(**{f"{name}_one": ""})) for name in EXTRAS),
    ("extra-cuda", DOUBTFUL, packages(True, cuda_one=None, cuda_two=None)),
    ("extra-torch", UNKNOWN, extras.judge_packages([], {}, gpu=False)),
]


@pytest.mark.parametrize(("check", "status", "found"), CASES)
def test_facts_are_judged(check: str, status: Status, found: list[Finding]) -> None:
    (finding,) = [each for each in found if each.check == check]
    assert finding.status is status, finding
    assert finding.found
    assert finding.remedy or status in (GOOD, UNKNOWN), "what is not good says what to do"


def test_only_known_checks_are_found_and_each_once() -> None:
    for _, _, found in CASES:
        names = [each.check for each in found]
        assert set(names) <= set(CHECKS)
        assert len(names) == len(set(names))
    assert sum(map(len, AREAS.values())) == len(CHECKS)


def documented() -> dict[str, set[str]]:
    """The states other than good that docs/operations.md gives each check."""
    section = OPERATIONS.read_text().split("\n## Doctor\n")[1].split("\n## ")[0]
    table = section.split("| check | what it looks at | not good |\n")[1]
    found: dict[str, set[str]] = {}
    for line in table.splitlines()[1:]:
        if line.startswith("|"):
            names, _, states = (cell.strip() for cell in line.strip("|").split("|"))
            found |= {name: set(re.findall(r"\b(bad|doubtful)\b", states)) for name in re.findall(r"`([^`]+)`", names)}
    return found


def test_every_check_is_documented_with_its_states() -> None:
    hangs = {"daemon", "gpu-driver", "state-dir", "systemd"}
    tried = {check: {status.value for name, status, found in CASES if name == check} for check in CHECKS}
    assert list(documented()) == list(CHECKS), "in the order of the report"
    for check, states in documented().items():
        late = {"doubtful"} if check in hangs else set()
        assert states | late == tried[check] - {"good", "unknown"}, check
        assert tried[check] >= {"good", "unknown"}, check


@pytest.mark.parametrize("judge", [reach.judge_socket, lambda late: reach.judge_daemon(late, "1.0")])
def test_a_look_that_is_late_is_doubtful_for_all_its_checks(judge: Any) -> None:
    found: Iterable[Finding] = judge(LATE)
    assert {(each.status, each.found) for each in found} == {(DOUBTFUL, "did not answer in 5 s")}


# -- what is read ------------------------------------------------------------------------------------------------------


def test_limits_are_read_of_another_process() -> None:
    text = Path("/proc/self/limits").read_text()
    assert rlimits.read(text) == rlimits.own()
    assert rlimits.read("") == {}


def test_units_are_told_apart() -> None:
    found = service.units("Id=a.service\nLoadState=loaded\nType=notify\n\nId=b.service\nLoadState=not-found\n")
    assert found["a.service"]["Type"] == "notify"
    assert found["b.service"] == {"Id": "b.service", "LoadState": "not-found"}
    assert service.units("") == {}


def test_the_unit_of_the_daemon_that_answers_is_judged() -> None:
    def manager(pid: int, kind: str) -> Answer:
        shown = f"Id={service.UNIT}\nLoadState=loaded\nActiveState=active\nMainPID={pid}\nType={kind}"
        return Answer({"text": shown})

    for pid, kind in ((42, "notify"), (43, "simple")):
        found = service.judge_service(
            service.Systemd(True, 254, manager(42, "notify"), manager(43, "simple")), 252, ANSWERS | {"pid": pid}
        )
        assert next(each.found for each in found if each.check == "unit-type").startswith(f"Type={kind}")


@pytest.mark.parametrize(
    ("version", "wanted", "fit"),
    [
        ("2.13.0+cpu", ">=2.8,<3", True),
        ("2.8", ">=2.8.0,<3", True),
        ("3.0.0rc1", ">=2.8,<3", False),
        ("2.7.9", ">=2.8,<3", False),
        ("1.0", "", True),
        ("1.0", "~=1.0", None),
        ("unknown", ">=1", None),
    ],
)
def test_versions_fit_into_ranges(version: str, wanted: str, fit: bool | None) -> None:
    assert extras.fits(version, wanted) is fit


def test_ranges_come_from_the_project_itself() -> None:
    needed = extras.requirements()
    assert {each.extra for each in needed} == {"", *EXTRAS}
    ranges = {(each.extra, each.package): (each.range, each.own) for each in needed}
    assert ranges["torch", "torch"] == (">=2.8,<3", True)
    assert ranges["diffusers", "torch"] == (">=2.8,<3", False)
    assert ranges["daemon", "typer"][1] is False


def test_ranges_are_read_from_installed_metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = [
        "grpcio<2,>=1.71.2",
        "rich<16,>=13.7; extra == 'cli'",
        'weightd[cli]; extra == "daemon"',
        "xxhash>=3.5; extra == 'daemon'",
    ]
    monkeypatch.setattr(extras.metadata, "requires", lambda _: listed)
    assert extras.requirements(tmp_path / "none.toml") == [
        extras.Requirement("", "grpcio", "<2,>=1.71.2"),
        extras.Requirement("cli", "rich", "<16,>=13.7"),
        extras.Requirement("daemon", "xxhash", ">=3.5"),
        extras.Requirement("daemon", "rich", "<16,>=13.7", own=False),
    ]


def test_a_driver_is_found_without_being_called(tmp_path: Path) -> None:
    assert gpus.presence(tmp_path) == gpus.Presence(False, "", None)
    card = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x10de\n")
    (card / "class").write_text("0x030200\n")
    assert gpus.presence(tmp_path) == gpus.Presence(False, "", 1)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: gcc 12.2.0\n"
    )
    assert gpus.presence(tmp_path) == gpus.Presence(True, "580.65.06", 1)


def test_a_kernel_without_settings_is_read(tmp_path: Path) -> None:
    assert kernel.read(tmp_path) == {"pagemap": "No such file or directory"}
    assert set(kernel.read()) >= {"overcommit", "mappings", "meminfo", "pagemap"}
