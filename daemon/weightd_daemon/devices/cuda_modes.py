"""How the driver lets processes share a GPU: its compute mode, and MPS. Both decide who can work beside whom.

A CUDA program becomes a client of MPS, without being asked, if a control daemon answers when the program initialises
the driver. weightd's processes stay outside unless they are told to go in: as a rule MPS serves one user at a time, so
a loader of the service's user would wait until the work of all other users has ended.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from weightd._mapping import cuda_driver as driver
from weightd.errors import WeightdError

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

log = logging.getLogger(__name__)

_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
_NOWHERE = "/dev/null"
"""Where no control daemon can listen. A program that cannot connect to one goes on without MPS."""
_DEFAULT_PIPES = Path("/tmp/nvidia-mps")  # noqa: S108  # NVIDIA's default, and only looked at

_PROHIBITED, _EXCLUSIVE = 2, 3
"""CU_COMPUTEMODE_PROHIBITED, CU_COMPUTEMODE_EXCLUSIVE_PROCESS."""


def stay_outside_mps(environment: MutableMapping[str, str]) -> None:
    """Keep this process, and those that inherit its environment, out of MPS unless a folder of MPS is set."""
    if not environment.get(_PIPES):
        environment[_PIPES] = _NOWHERE


def tell_mps(environment: Mapping[str, str] = os.environ, default: Path = _DEFAULT_PIPES) -> None:
    """Log whether weightd's processes are clients of MPS, where there is reason to ask."""
    if told := mps_told(environment, default):
        log.info("%s", told)


def mps_told(environment: Mapping[str, str] = os.environ, default: Path = _DEFAULT_PIPES) -> str:
    """Whether weightd's processes are clients of MPS; empty where MPS does not run in its usual place."""
    pipes = environment.get(_PIPES, _NOWHERE)
    if pipes != _NOWHERE:
        return f"loaders and holders are clients of MPS, by {_PIPES}={pipes}: clients of the daemon must be of its user"
    if (default / "control").exists():
        return f"MPS runs here ({default}), and loaders and holders stay outside; set {_PIPES} to have them inside"
    return ""


def tell_compute_mode(ordinal: driver.Ordinal, uuid: str, environment: Mapping[str, str] = os.environ) -> None:
    """Log what the compute mode of a GPU forbids, if it forbids anything."""
    try:
        mode = driver.compute_mode(ordinal)
    except WeightdError as error:
        log.debug("the compute mode of %s is not known: %s", uuid, error)
        return
    if what := forbidden_by(mode, environment):
        log.warning("device %s is in compute mode %s", uuid, what)


def forbidden_by(mode: int, environment: Mapping[str, str] = os.environ) -> str:
    """The name of a compute mode and what it forbids; empty if it forbids nothing."""
    pipes = environment.get(_PIPES, _NOWHERE)
    if mode == _PROHIBITED:
        return "PROHIBITED: nothing can be loaded or attached; `nvidia-smi -c DEFAULT` allows it"
    if mode == _EXCLUSIVE and pipes != _NOWHERE:
        return f"EXCLUSIVE_PROCESS: clients must be clients of MPS ({_PIPES}={pipes}), as loaders are"
    if mode == _EXCLUSIVE:
        return (
            "EXCLUSIVE_PROCESS: one process at a time has the GPU, so loads fail while a client is attached, and "
            "clients fail while a loader lives; `nvidia-smi -c DEFAULT` lets all in, and so does MPS"
        )
    return ""
