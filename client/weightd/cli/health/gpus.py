"""Judges the GPUs: the driver, its device files, and the modes and services on which sharing and survival depend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from weightd.cli.health.asking import Answer
from weightd.cli.health.finding import Finding, Status
from weightd.cli.health.service import FABRIC, PERSISTENCE, Properties

_NVIDIA, _DISPLAY = "0x10de", "0x03"
_OLDEST_CUDA = 12000
_NOT_READY = "CUDA_ERROR_SYSTEM_NOT_READY"
_NOT_STARTED, _IN_PROGRESS, _COMPLETED = 1, 2, 3
_PROHIBITED = 2
_PACKAGE = "pip install '.[cuda]' in weightd's checkout"

_Facts = Mapping[str, Any]


class Presence(NamedTuple):
    """What the kernel says of NVIDIA's GPUs, without a call of the driver."""

    module: bool
    """The kernel module is loaded."""
    version: str
    """The module's version; empty if it does not tell."""
    cards: int | None
    """GPUs of NVIDIA on the PCI bus; None if it cannot be read."""


def presence(root: Path = Path("/")) -> Presence:
    """Look for a GPU in /proc, /sys and /dev, which do not hang."""
    version = ""
    try:
        line = (root / "proc/driver/nvidia/version").read_text(errors="replace").partition("\n")[0]
        version = next((word for word in line.split() if word[0].isdigit() and "." in word), "")
    except OSError:
        pass
    loaded = (root / "proc/driver/nvidia").exists() or (root / "dev/nvidiactl").exists()
    try:
        devices = os.listdir(root / "sys/bus/pci/devices")
        cards = sum(_is_card(root / "sys/bus/pci/devices" / name) for name in devices)
    except OSError:
        return Presence(loaded, version, None)
    return Presence(loaded, version, cards)


def _is_card(folder: Path) -> bool:
    try:
        return (folder / "vendor").read_text().strip() == _NVIDIA and (folder / "class").read_text()[:4] == _DISPLAY
    except OSError:
        return False


def judge_presence(found: Presence) -> list[Finding]:
    """Judge whether there is a driver; the other checks of GPUs are left out where there is none."""
    if found.module:
        return [
            Finding("gpu", Status.GOOD, f"NVIDIA's kernel module {found.version or 'of unknown version'} is loaded")
        ]
    if found.cards is None:
        return [Finding("gpu", Status.UNKNOWN, "the PCI bus cannot be looked at, and no driver of NVIDIA is loaded")]
    if found.cards:
        told = f"{found.cards} GPU(s) of NVIDIA, and no kernel module is loaded: host memory only"
        return [Finding("gpu", Status.DOUBTFUL, told, "install NVIDIA's driver, or `modprobe nvidia_uvm`")]
    return [Finding("gpu", Status.GOOD, "no GPU of NVIDIA: host memory only")]


class Looks(NamedTuple):
    """The answers about GPUs. `driver` and `nvml` are None if they were not asked: their device files are missing."""

    host: Answer
    driver: Answer | None
    nvml: Answer | None
    units: Mapping[str, Properties]
    """What systemd says of NVIDIA's services."""
    visible: str | None
    """CUDA_VISIBLE_DEVICES of this user."""


def judge_gpus(looks: Looks) -> list[Finding]:
    """Judge the GPUs of a machine where the driver is loaded."""
    driver = looks.driver or _UNASKED
    nvml = looks.nvml or _UNASKED
    return [
        *(looks.host.failed("gpu-nodes") or [_nodes(looks.host.facts["nodes"])]),
        *(driver.failed("gpu-driver", "gpu-visible", "gpu-compute-mode") or _driver(driver.facts, looks.visible)),
        *(looks.host.failed("gpu-mps") or [_mps(looks.host.facts["mps"], driver.facts.get("gpus", ()))]),
        *(nvml.failed("gpu-persistence") or [_persistence(nvml.facts, looks.units)]),
        _fabric(looks, driver.facts, nvml.facts),
    ]


_UNASKED = Answer({}, "not asked: device files are missing, and asking would make them")


def _nodes(nodes: _Facts) -> Finding:
    files = [f"/dev/{name}" for name in nodes["missing"]]
    if files:
        remedy = nodes["advice"] or "as root, run `nvidia-modprobe -c0 -u`; in a container, pass the GPU's device files"
        return Finding("gpu-nodes", Status.BAD, f"missing: {', '.join(files)}", remedy)
    if nodes["denied"]:
        denied = ", ".join(f"/dev/{name}" for name in nodes["denied"])
        remedy = "root adds you to the group that owns them (`usermod -aG video`), and you log in again"
        return Finding("gpu-nodes", Status.BAD, f"this user may not open {denied}", remedy)
    return Finding("gpu-nodes", Status.GOOD, ", ".join(f"/dev/{name}" for name in nodes["shown"]))


def _driver(facts: _Facts, visible: str | None) -> list[Finding]:
    rest = ("gpu-visible", "gpu-compute-mode")
    if not facts["package"]:
        told = "cuda-bindings is not installed, so GPU memory can be neither loaded nor attached"
        return [
            Finding("gpu-driver", Status.BAD, told, _PACKAGE),
            *(Finding(each, Status.UNKNOWN, told) for each in rest),
        ]
    if "error" in facts:
        message, _, advice = facts["error"].partition("; ")
        unknown = [Finding(each, Status.UNKNOWN, "the driver cannot be used") for each in rest]
        return [Finding("gpu-driver", Status.BAD, message, advice or "see `dmesg` and `nvidia-smi`"), *unknown]
    version = facts["version"]
    told = f"libcuda is of CUDA {version // 1000}.{version % 1000 // 10}"
    if version < _OLDEST_CUDA:
        first = Finding("gpu-driver", Status.BAD, f"{told}; weightd needs CUDA 12", "install a newer driver")
    else:
        first = Finding("gpu-driver", Status.GOOD, told)
    return [first, _visible(facts["gpus"], visible), _compute_mode(facts["gpus"])]


def _visible(gpus: list[_Facts], visible: str | None) -> Finding:
    limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    remedy = "unset CUDA_VISIBLE_DEVICES, or name GPUs that exist" if visible is not None else "see `nvidia-smi -L`"
    failed = [f"cuda:{each['ordinal']}: {each['error']}" for each in gpus if "error" in each]
    if not gpus:
        return Finding("gpu-visible", Status.BAD, f"this process sees no GPU{limited}", remedy)
    if failed:
        return Finding("gpu-visible", Status.DOUBTFUL, "; ".join(failed), "see `dmesg` for errors of this GPU (Xid)")
    return Finding("gpu-visible", Status.GOOD, f"{', '.join(each['uuid'] for each in gpus)}{limited}")


def _compute_mode(gpus: list[_Facts]) -> Finding:
    known = [each for each in gpus if "mode" in each]
    forbidding = [each for each in known if each["forbids"]]
    if not known:
        return Finding("gpu-compute-mode", Status.UNKNOWN, "no GPU tells its compute mode")
    if not forbidding:
        return Finding("gpu-compute-mode", Status.GOOD, "several processes may use each GPU")
    status = Status.BAD if any(each["mode"] == _PROHIBITED for each in forbidding) else Status.DOUBTFUL
    told = "; ".join(f"{each['uuid']}: {each['forbids']}" for each in forbidding)
    return Finding("gpu-compute-mode", status, told, "`nvidia-smi -c DEFAULT`, as root")


def _mps(told: str, gpus: Any) -> Finding:
    if not told:
        return Finding("gpu-mps", Status.GOOD, "MPS does not run in its usual place")
    if any(each.get("forbids") for each in gpus):
        remedy = (
            'put the daemon inside or set the compute mode to DEFAULT; see "Compute mode and MPS" in docs/operations.md'
        )
        return Finding("gpu-mps", Status.DOUBTFUL, told, remedy)
    return Finding("gpu-mps", Status.GOOD, told)


def _persistence(facts: _Facts, units: Mapping[str, Properties]) -> Finding:
    check = "gpu-persistence"
    if "error" in facts:
        remedy = "" if facts["package"] else _PACKAGE
        return Finding(check, Status.UNKNOWN, f"NVML does not tell: {facts['error']}", remedy)
    modes = [each["persistence"] for each in facts["gpus"]]
    if not modes or None in modes:
        return Finding(check, Status.UNKNOWN, "NVML does not tell the persistence mode")
    service = units.get(PERSISTENCE, {})
    if all(modes):
        return Finding(check, Status.GOOD, f"persistence mode is on; driver {facts['driver'] or 'of unknown version'}")
    told = "persistence mode is off: what lies on a GPU may not outlive the last process that uses it"
    there = service.get("LoadState") == "loaded"
    remedy = "`systemctl enable --now nvidia-persistenced`" if there else "start nvidia-persistenced, as root"
    return Finding(check, Status.DOUBTFUL, told, remedy)


def _fabric(looks: Looks, driver: _Facts, nvml: _Facts) -> Finding:
    check = "gpu-fabric"
    unit = looks.units.get(FABRIC, {})
    start = "`systemctl enable --now nvidia-fabricmanager`, of exactly the driver's version"
    states = [each["fabric"] for each in nvml.get("gpus", ()) if each["fabric"]]
    switches = bool(looks.host.facts.get("nodes", {}).get("nvswitch"))
    if driver.get("code") == _NOT_READY or _NOT_STARTED in states:
        return Finding(check, Status.BAD, "the NVLink fabric is not ready: no GPU can be used", start)
    if _IN_PROGRESS in states:
        return Finding(check, Status.DOUBTFUL, "the NVLink fabric is being set up", "wait, and look again")
    if _COMPLETED in states or "version" in driver:
        return Finding(check, Status.GOOD, "the NVLink fabric is ready" if states or switches else "there is none")
    if switches and unit.get("ActiveState", "unknown") not in ("active", "unknown"):
        return Finding(check, Status.BAD, f"NVSwitches, and {FABRIC} is {unit['ActiveState']}", start)
    return Finding(check, Status.UNKNOWN, "neither the driver nor NVML tells")
