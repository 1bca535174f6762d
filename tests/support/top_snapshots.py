"""What `weightd top` shows in tests: a daemon with five checkpoints, three processes, a load and a refusal."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from support.fake_client import CHECKPOINT, GIB, LOADED, MIB
from weightd.inspection import LoadInfo, SharedComponents, SharedPair
from weightd.top.snapshot import DaemonAnswers, DaemonSnapshot
from weightd.types import CheckpointInfo, DaemonEvent, DeviceStats, LeaseInfo, LoadProgress, Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from textual.strip import Strip

    from weightd.client import Client
    from weightd.top.application import TopApp

NOW = LOADED + timedelta(hours=2)
PATH = "/models/smol/SmolLM2-135M-Instruct.safetensors"
HOST = DeviceStats(
    "host", "host", "host memory", GIB, 736 * MIB, 456 * MIB, 40 * MIB, 240 * MIB, 288 * MIB, 9, 4 * GIB,
    pinned_bytes=200 * MIB, leased_bytes=184 * MIB, evictable_bytes=172 * MIB, hole_bytes=8 * MIB,
)  # fmt: skip


def digest_of(letter: str) -> str:
    """The digest of the checkpoint that a letter stands for."""
    return f"sha256:{letter * 64}"


def checkpoint(letter: str, name: str, alone: int, shared: int, **more: object) -> CheckpointInfo:
    """One checkpoint; sizes are MiB."""
    usual = {"leases": 0, "pinned": False, "last_used_at": NOW - timedelta(seconds=26), "names": (name,)}
    return replace(
        CHECKPOINT, content_digest=digest_of(letter), total_bytes=(alone + shared) * MIB, exclusive_bytes=alone * MIB,
        shared_bytes=shared * MIB, **(usual | more),  # type: ignore[arg-type]  # fields of several types
    )  # fmt: skip


CHECKPOINTS = (
    checkpoint("a", "base", 14, 186, pinned=True, leases=2),
    checkpoint("b", "tuned", 14, 186, leases=1),
    checkpoint("c", "pipelines/sd-a", 40, 30, leases=1),
    checkpoint("d", "pipelines/sd-b", 40, 30),
    checkpoint("e", PATH, 92, 0, last_used_at=NOW - timedelta(days=3)),
)


def pair(one: str, other: str, shared: int, only: int, **parts: int) -> SharedPair:
    """Two checkpoints, by letter and name; sizes are MiB."""
    components = tuple(SharedComponents(part, part, size * MIB) for part, size in parts.items())
    letters = {"base": "a", "tuned": "b", "pipelines/sd-a": "c", "pipelines/sd-b": "d"}
    ends = digest_of(letters[one]), digest_of(letters[other]), one, other
    return SharedPair("host", *ends, shared * MIB, only * MIB, components)


PAIRS = (pair("base", "tuned", 186, 186), pair("pipelines/sd-a", "pipelines/sd-b", 30, 30, vae=10, text_encoder=20))


def lease(number: int, pid: int | None, name: str, command: str, user: str = "ada", **more: object) -> LeaseInfo:
    """A lease that has been held for three minutes."""
    found = LeaseInfo(number, pid, 1000, user, command, name, "host", MIB, NOW - timedelta(minutes=3), waiting=False)
    return replace(found, **more)  # type: ignore[arg-type]  # fields of several types


SERVE, CHAT = "/opt/venv/bin/python serve.py --port 8000", "python chat.py"
LEASES = (
    lease(1, 4242, "base", SERVE),
    lease(2, 4242, "tuned", SERVE),
    lease(3, 99, "base", CHAT, "bob"),
    lease(4, None, digest_of("c"), "", "", waiting=True),
)
LOAD = LoadInfo(
    9, ("/models/big.safetensors",), "/models/big.safetensors", "host", LoadProgress("copying", 96 * MIB, 240 * MIB),
    52e6, 2.9, NOW, 4300, 1000, "eve", "weightd load big", 1,
)  # fmt: skip


def event(kind: str, seconds: int, **more: object) -> DaemonEvent:
    """Something that happened so many seconds ago."""
    nothing = ("sha256:" + "a" * 64, "host", ("base",), 0, 0, 4242, 1000, "ada", SERVE, "", "", 0, 0, 0, 0.0, "", (), 0)
    return replace(DaemonEvent(NOW - timedelta(seconds=seconds), kind, *nothing), **more)  # type: ignore[arg-type]  # fields of several types


REFUSED = event(
    "load_ended", 40, names=("/models/huge.safetensors",), reason="CAPACITY",
    message="900 MiB do not fit on host: 288 MiB free, 172 MiB evictable, 100 MiB pinned, 184 MiB leased, of a budget "
    "of 1.00 GiB; remove or unpin a checkpoint",
)  # fmt: skip
EVENTS = (event("sealed", 60, names=("tuned",)), REFUSED, event("attached", 20, lease=1, total_bytes=200 * MIB))
STATS = Stats((HOST,), 640 * MIB, 456 * MIB, 216 * MIB, 0.32, 5, 300, 4, 0, 2, revision=7)
ANSWERS = DaemonAnswers(STATS, CHECKPOINTS, LEASES, (LOAD,), PAIRS, {4242: 12 * MIB, 99: None})
SNAPSHOT = DaemonSnapshot(NOW, ANSWERS, EVENTS)


class StillReader:
    """A reader that publishes one snapshot, and notes what it is asked."""

    def __init__(self, publish: Callable[[DaemonSnapshot], None], snapshot: DaemonSnapshot = SNAPSHOT) -> None:
        self._publish = publish
        self.snapshot = snapshot
        self.woken: list[frozenset[int]] = []
        self.stopped = False

    def start(self) -> None:
        self._publish(self.snapshot)

    def stop(self) -> None:
        self.stopped = True

    def wake(self, first: Iterable[int] = ()) -> None:
        self.woken.append(frozenset(first))


def strips_of(app: TopApp) -> list[Strip]:
    """The screen on top as it is drawn; textual has no public way to tell."""
    return app.screen._compositor.render_strips()


def lines_of(app: TopApp) -> list[str]:
    """The text of the screen on top, a string for each line."""
    return [strip.text for strip in strips_of(app)]


def client_of(fake: object) -> Client:
    """A fake as what it stands for."""
    return fake  # type: ignore[return-value]  # it answers what is asked here
