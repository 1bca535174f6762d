"""Processes with an engine in them, and the environment that they need: no network, little memory, one thread."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from support import plugins
from support.daemon import environment
from support.leash import leashed
from support.worker import Worker


def engine_environment(folder: Path) -> dict[str, str]:
    """Variables for processes with engines. What they cache lies below `folder`, which several processes may share.

    vLLM's plugin of the tests turns oneDNN off in each (`support.plugins`).
    """
    distribution = plugins.install(folder / "plugins")
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], str(distribution)]),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def sglang_environment(folder: Path) -> dict[str, str]:
    """The same for processes with SGLang, which find stand-ins for packages that do not fit a CPU."""
    variables = engine_environment(folder)
    stand_ins = Path(__file__).resolve().parents[1] / "engines" / "stand_ins"
    return variables | {
        "PYTHONPATH": os.pathsep.join([variables["PYTHONPATH"], str(stand_ins)]),
        "SGLANG_USE_CPU_ENGINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


class EngineProcess(Worker):
    """A worker whose processes, children included, all end when it is closed: it leads a group of its own."""

    def __init__(self, socket: Path, folder: Path, more: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            leashed([sys.executable, "-m", "support.worker"]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=environment(socket) | engine_environment(folder) | dict(more or {}),
        )  # fmt: skip

    def close(self) -> None:
        """End it, and kill what it has left."""
        super().close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
