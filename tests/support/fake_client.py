"""A client for tests of the `weightd` command: it answers without a daemon, and records what it is asked."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from weightd.inspection import (
    BlobUsers,
    DeviceMap,
    MapExtent,
    MapSegment,
    SharedComponents,
    SharedPair,
    StoredTensor,
)
from weightd.types import (
    CheckpointDetails,
    CheckpointInfo,
    ComponentInfo,
    DaemonEvent,
    DeviceStats,
    DrainResult,
    FileIdentity,
    LeaseInfo,
    LoadProgress,
    LoadResult,
    SourceFile,
    Stats,
    VerifyProgress,
    VersionInfo,
)

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
MIB = 1 << 20
DIGEST = "ab" * 32
LOADED = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
CHECKPOINT = CheckpointInfo(
    names=("org/base", "base"),
    content_digest=DIGEST,
    device="host",
    tensors=3,
    total_bytes=2 * GIB,
    exclusive_bytes=GIB,
    shared_bytes=50 * MIB,
    leases=2,
    pinned=True,
    loaded_at=LOADED,
    last_used_at=None,
    state="resident",
    owner_uid=1000,
    owner="ada",
)
RESULT = LoadResult("org/base", DIGEST, 3, 2 * GIB, GIB, GIB, 7, 1.25, "host")
TENSOR = StoredTensor(
    "unet", "w", "F32", (2, 3), 24, b"\x01" * 16, 0, 3, 256, "model.safetensors", BlobUsers((f"sha256:{DIGEST}",))
)
MAP = DeviceMap(
    "host", 7, (MapSegment(3, 2 * GIB), MapSegment(5, GIB)),
    (
        MapExtent(3, 0, GIB, "blobs", 2, BlobUsers((f"sha256:{DIGEST}",))),
        MapExtent(3, GIB, GIB // 2, "blobs", 1, BlobUsers((f"sha256:{DIGEST}", "sha256:" + "cd" * 32))),
        MapExtent(3, GIB + GIB // 2, GIB // 2, "hole"),
        MapExtent(5, 0, GIB // 4, "in_flight", load=9),
        MapExtent(5, GIB // 4, GIB - GIB // 4, "hollow"),
    ),
    {f"sha256:{DIGEST}": "org/base", "sha256:" + "cd" * 32: ""},
)  # fmt: skip


class FakeClient:
    """Records its calls; an entry in `answers` replaces an answer, and is raised if it is an exception."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {}
        self.socket = Path("/run/w.sock")
        self.asked: str | None = None
        self.read_only = False
        self.closed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def _answer(self, call: str, default: Any, *arguments: object) -> Any:
        self.calls.append((call, *arguments))
        answer = self.answers.get(call, default)
        if callable(answer):
            answer = answer(*arguments)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def load_report(
        self, reference: str, *, on_progress: Callable[[LoadProgress], None] | None = None, **options: Any
    ) -> Any:
        if on_progress is not None:
            on_progress(LoadProgress("hashing", 1, 2))
            on_progress(LoadProgress("copying", 2, 2))
        return self._answer("load", RESULT, reference, options)

    def checkpoints(self) -> Any:
        return self._answer("checkpoints", [CHECKPOINT])

    def inspect(self, reference: str, device: str | None = None) -> Any:
        source = SourceFile(
            "unet", "model.safetensors", FileIdentity(1, 2, 2 * GIB, LOADED.timestamp().__int__() * 10**9, 0)
        )
        return self._answer(
            "inspect",
            CheckpointDetails(
                CHECKPOINT,
                (ComponentInfo("unet", 3, 2 * GIB, GIB),),
                4,
                (source,),
                "cuda_ipc",
                "clients can write",
                "/models/base",
            ),
            reference,
            device,
        )

    def tensors(self, reference: str, device: str | None = None) -> Any:
        return self._answer("tensors", [TENSOR], reference, device)

    def device_map(self, device: str | None = None) -> Any:
        return self._answer("device_map", MAP, device)

    def leases(self) -> Any:
        lease = LeaseInfo(7, 4242, 1000, "ada", "python serve.py", "org/base", "host", 2 * GIB, LOADED, waiting=False)
        return self._answer("leases", [lease])

    def stats(self) -> Any:
        device = DeviceStats("host", "host", "host memory", 8 * GIB, 3 * GIB, 2 * GIB, GIB, 0, 5 * GIB, 3, 4 * GIB)
        device = replace(device, pinned_bytes=GIB, leased_bytes=GIB, evictable_bytes=MIB, hole_bytes=3 * MIB)
        return self._answer(
            "stats",
            Stats((device,), 4 * GIB, int(2.7 * GIB), int(1.3 * GIB), 0.324, 3, 300, 1, 0, 2, revision=1),
        )

    def loads(self) -> Any:
        return self._answer("loads", [])

    def close(self) -> None:
        self.closed += 1

    def sharing(self, reference: str | None = None, device: str | None = None, *, most: int | None = None) -> Any:
        part = SharedComponents("unet", "unet", 50 * MIB)
        pair = SharedPair("host", DIGEST, "cd" * 32, "org/base", "tuned", 50 * MIB, 20 * MIB, (part,))
        return self._answer("sharing", [pair], reference, device, most)

    def pin(self, reference: str, device: str | None = None) -> Any:
        return self._answer("pin", CHECKPOINT, reference, device)

    def unpin(self, reference: str, device: str | None = None) -> Any:
        return self._answer("unpin", CHECKPOINT, reference, device)

    def remove(self, reference: str, device: str | None = None) -> Any:
        return self._answer("remove", GIB, reference, device)

    def verify(
        self,
        reference: str | None = None,
        device: str | None = None,
        on_progress: Callable[[VerifyProgress], None] | None = None,
    ) -> Any:
        return self._answer("verify", VerifyProgress(300, 300, 3 * GIB, 3 * GIB), reference, device, on_progress)

    def version(self) -> Any:
        return self._answer("version", VersionInfo("9.9", 77, 12.0))

    def events(self, *, follow: bool) -> Any:
        lease = ("org/base",), 0, 7, 4242, 1000, "ada", "python serve.py", "", "", 2 * GIB, 0, 0, 0.0, "", (), 0
        attached = DaemonEvent(LOADED, "attached", DIGEST, "host", *lease)
        return iter(self._answer("events", [attached, replace(attached, kind="drained")], follow))

    def drain(self, *, timeout: float | None, on_holders: Callable[[list[LeaseInfo]], None]) -> Any:
        on_holders(self.leases())
        return self._answer("drain", DrainResult(3, 2 * GIB), timeout)

    def undrain(self) -> Any:
        return self._answer("undrain", None)

    def ping(self) -> Any:
        return self._answer("ping", 0.00125)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True
