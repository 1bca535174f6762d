"""What the processes of a soak have in common: where it is, what it loads, and the two files that clients append to."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Plan:
    """Paths are strings, so that a plan can be handed to another process as JSON.

    `pipelines` are folders with the components "unet" and "vae", `files` single files. `pause` is the mean number of
    seconds between two operations of a client, `life` the most seconds that a client lives.
    """

    folder: str
    socket: str
    seed: int
    files: list[str]
    pipelines: list[str]
    pause: float
    life: float
    can_fork: bool
    """A process that uses CUDA may not."""

    @property
    def register(self) -> Path:
        return Path(self.folder) / "versions.jsonl"

    @property
    def operations(self) -> Path:
        return Path(self.folder) / "operations.jsonl"

    @property
    def findings(self) -> Path:
        return Path(self.folder) / "findings.jsonl"

    def save(self) -> Path:
        path = Path(self.folder) / "plan.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Plan:
        return cls(**json.loads(path.read_text()))

    def find(self, what: str, **more: object) -> None:
        """Record what must not happen."""
        _append(self.findings, {"what": what, "seed": self.seed, "pid": os.getpid(), "at": time.time(), **more})

    def record(self, operation: str, refusal: str | None, compared: int, seconds: float) -> None:
        """Record an operation of a client: the class of error that it ended with, and how many bytes it compared."""
        millis = round(1000 * seconds, 1)
        _append(self.operations, {"op": operation, "refusal": refusal, "bytes": compared, "ms": millis})


def _append(path: Path, entry: dict[str, Any]) -> None:
    """Write one line at once: a process that is killed leaves no part of one."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\n")
