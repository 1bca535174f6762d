"""What a test runs on: host memory, CUDA memory of the double (tests/fakecuda), or a real GPU.

A test that can run on a GPU runs on the double when there is none, which then poses as one: what only the device could
tell is not known, so that no such test asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from support import fakecuda


@dataclass(frozen=True)
class Backend:
    """One kind of memory. `library` is the double's folder; None for host memory and for a real GPU.

    A double that `poses` as hardware tells no test what is alive on its device.
    """

    name: str
    kind: str
    library: Path | None = None
    knobs: dict[str, object] = field(default_factory=dict)
    poses: bool = False

    @property
    def is_host(self) -> bool:
        return self.kind == "host"

    @property
    def is_real_gpu(self) -> bool:
        return not self.is_host and self.library is None

    @property
    def device(self) -> str:
        """What clients call the device."""
        return "host" if self.is_host else "cuda:0"

    @property
    def uuid(self) -> str:
        """What the daemon calls it."""
        if self.is_host:
            return "host"
        if self.library is not None:
            return fakecuda.uuid(0)
        from weightd._mapping import cuda_driver

        return cuda_driver.uuid_of(0)

    @property
    def page(self) -> int:
        """Bytes of the smallest piece of memory that it hands out."""
        return 4096 if self.is_host else 2 << 20

    @property
    def settings(self) -> dict[str, object]:
        """The settings of a daemon that serves it alone."""
        return {"device": "host"} if self.is_host else {"device": "cuda:0", "transport": self.kind}

    @property
    def environment(self) -> dict[str, str]:
        """What every process on it needs in its environment."""
        if self.library is None:
            return {}
        return fakecuda.environment(self.library, **self.knobs)

    def with_knobs(self, **knobs: object) -> Backend:
        """The same with other knobs of the double (support/fakecuda.py)."""
        return replace(self, knobs={**self.knobs, **knobs})

    def device_bytes(self) -> int | None:
        """Bytes alive on the double's device, over all processes; None where only the device could tell."""
        return None if self.poses else self.bytes_on_double()

    def bytes_on_double(self) -> int | None:
        """The same for leak checks, which ask the double also where it poses as hardware."""
        if self.library is None:
            return None
        nodes = self.knobs.get("nodes")
        return fakecuda.device_bytes(0, nodes if isinstance(nodes, Path) else None)


HOST = Backend("host", "host")
CUDA = ("cuda_vmm", "cuda_ipc")
EVERY = ("host", *CUDA)
