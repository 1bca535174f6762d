"""What the driver and NVML say of the GPUs and of themselves, for `weightd doctor`: nothing here makes a context.

Call neither library where its device files are missing: it would have nvidia-modprobe, a setuid program, make them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from weightd._mapping import cuda_driver as driver
from weightd.errors import WeightdError

from .cuda_errors import code_of, explained
from .cuda_modes import forbidden_by
from .cuda_node import DEV, GPUS, missing_uvm

_CONTROL = "nvidiactl"
_NODE = re.compile(r"nvidia\d+")


def nodes(dev: Path = DEV, gpus: Path = GPUS) -> dict[str, Any]:
    """The device files: `denied` are those that this user may not open, `missing` those that are not there.

    `advice` is empty unless nvidia-uvm is missing. `nvswitch` is whether the machine has NVSwitches.
    """
    found = {path.name for path in dev.glob("nvidia*")}
    shown = sorted(name for name in found if _NODE.fullmatch(name) or name in (_CONTROL, "nvidia-uvm"))
    missing = [name for name in (_CONTROL, "nvidia-uvm") if name not in found]
    # A container may be given fewer GPUs than the driver has.
    if gpus.exists() and any(gpus.iterdir()) and not any(map(_NODE.fullmatch, found)):
        missing.insert(0, "nvidia0")
    return {
        "shown": shown,
        "missing": missing,
        "denied": [name for name in shown if not os.access(dev / name, os.R_OK | os.W_OK)],
        "advice": missing_uvm(),
        "nvswitch": any(name.startswith("nvidia-nvswitch") for name in found),
    }


def driver_facts() -> dict[str, Any]:
    """What libcuda says: `version` as 13000, `gpus` with UUID, compute mode and what that forbids; or an `error`.

    `package` is False where cuda-bindings is not installed. `code` is the driver's name of the error, or empty.
    """
    try:
        driver.initialise()
        version = int(driver.call("cuDriverGetVersion"))
        gpus = [_gpu(ordinal) for ordinal in range(driver.device_count())]
    except WeightdError as error:
        return {"package": "package" not in error.metadata, "error": explained(error), "code": code_of(error)}
    return {"package": True, "version": version, "gpus": gpus}


def _gpu(ordinal: driver.Ordinal) -> dict[str, Any]:
    try:
        uuid, mode = driver.uuid_of(ordinal), driver.compute_mode(ordinal)
    except WeightdError as error:
        return {"ordinal": ordinal, "error": explained(error)}
    return {"ordinal": ordinal, "uuid": uuid, "mode": mode, "forbids": forbidden_by(mode)}


def nvml_facts() -> dict[str, Any]:
    """What NVML says: version of the `driver`, `gpus` with UUID, persistence mode and fabric; or an `error`.

    `package` is False where nvidia-ml-py is not installed. A GPU's answer is None where NVML does not give it.
    """
    try:
        import pynvml
    except ImportError:
        return {"package": False, "error": "the package nvidia-ml-py is not installed"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"package": True, "error": str(error)}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {
            "package": True,
            "driver": _text(_asked(pynvml, pynvml.nvmlSystemGetDriverVersion)),
            "gpus": [
                {
                    "uuid": _text(_asked(pynvml, pynvml.nvmlDeviceGetUUID, handle)),
                    "persistence": _asked(pynvml, pynvml.nvmlDeviceGetPersistenceMode, handle),
                    "fabric": _fabric(pynvml, handle),
                }
                for handle in handles
            ],
        }
    except pynvml.NVMLError as error:
        return {"package": True, "error": str(error)}


def _asked(nvml: Any, function: Any, *arguments: Any) -> Any:
    """An answer of NVML; None where it refuses, or is too old to know the question."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _fabric(nvml: Any, handle: Any) -> int | None:
    """The state of the GPU in its NVLink fabric: 0 none, 1 not started, 2 in progress, 3 completed."""
    if not hasattr(nvml, "nvmlDeviceGetGpuFabricInfo"):
        return None
    info = nvml.c_nvmlGpuFabricInfo_t()
    if _asked(nvml, nvml.nvmlDeviceGetGpuFabricInfo, handle, nvml.byref(info)) is None:
        return None
    return int(info.state)


def _text(answer: Any) -> str | None:
    return answer.decode(errors="replace") if isinstance(answer, bytes) else answer
