"""A client without a daemon that holds what it is told to, for pages to be drawn of: a few checkpoints or thousands."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import combinations, groupby
from pathlib import Path

from weightd.errors import DaemonUnreachableError
from weightd.inspection import BlobUsers, DeviceMap, LoadInfo, MapExtent, MapSegment, SharedPair, StoredTensor
from weightd.types import (
    CheckpointDetails,
    CheckpointInfo,
    DaemonEvent,
    DeviceStats,
    LeaseInfo,
    LoadProgress,
    Stats,
    VersionInfo,
)

MIB = 1 << 20
GIB = 1 << 30
_SEGMENT = GIB


@dataclass(frozen=True, slots=True)
class _Place:
    segment: int
    offset: int
    length: int


@dataclass(slots=True)
class _Held:
    name: str
    digest: str
    blobs: tuple[tuple[str, int], ...]
    pinned: bool
    holders: int
    loaded: datetime
    used: datetime


@dataclass(slots=True)
class FakeHoldings:
    """Checkpoints of blobs, each a key and a length, on one device. Blobs of one key are shared.

    `asked` counts its calls; those in `errors` raise.
    """

    budget: int = 24 * GIB
    gone: bool = False
    pid: int = 77
    revision: int = 1
    loading: list[LoadInfo] = field(default_factory=list)
    socket: Path = Path("/run/weightd/weightd.sock")
    asked: Counter[str] = field(default_factory=Counter)
    errors: dict[str, Exception] = field(default_factory=dict)
    _held: dict[str, _Held] = field(default_factory=dict)
    _places: dict[str, _Place] = field(default_factory=dict)
    _segments: list[int] = field(default_factory=list)
    _events: list[DaemonEvent] = field(default_factory=list)

    def hold(
        self, name: str, blobs: Iterable[tuple[str, int]], *, pinned: bool = False, holders: int = 0, used: int = 0
    ) -> None:
        """Hold a checkpoint; `used` is seconds ago."""
        listed = tuple(blobs)
        now = datetime.now(UTC)
        digest = "sha256:" + sha256(name.encode()).hexdigest()
        moment = now - timedelta(seconds=used)
        self._held[digest] = _Held(name, digest, listed, pinned, holders, moment, moment)
        for key, length in listed:
            if key not in self._places:
                self._places[key] = self._placed(length)
        self._note("sealed", self._held[digest])

    def remove(self, name: str) -> None:
        """Let a checkpoint go; what only it used becomes holes."""
        held = next(held for held in self._held.values() if held.name == name)
        del self._held[held.digest]
        self._places = {key: place for key, place in self._places.items() if key in self._users()}
        self._note("evicted", held)

    # -- what a client answers ---------------------------------------------------------------------------------------

    def version(self) -> VersionInfo:
        self._answer("version")
        return VersionInfo("9.9", self.pid, 12.0)

    def stats(self) -> Stats:
        self._answer("stats")
        users = self._users()
        live = sum(place.length for place in self._places.values())
        total = sum(self._segments)
        kept = {held.digest for held in self._held.values() if held.pinned or held.holders}
        idle = self._bytes(key for key, by in users.items() if not kept & set(by))
        pinned = self._bytes(key for key, by in users.items() if any(self._held[one].pinned for one in by))
        leased = self._bytes(key for key, by in users.items() if any(self._held[one].holders for one in by))
        device = DeviceStats(
            "host", "host", "host memory", self.budget, total, live, total - live, 0, self.budget - total,
            len(self._segments), 40 * GIB, "", pinned, leased, idle, total - live,
        )  # fmt: skip
        logical = sum(length for held in self._held.values() for _, length in held.blobs)
        ratio = 1 - live / logical if logical else 0.0
        leases = sum(held.holders for held in self._held.values())
        return Stats(
            (device,), logical, live, logical - live, ratio, len(self._held), len(users), leases, 0, 2,
            revision=self.revision,
        )  # fmt: skip

    def checkpoints(self) -> list[CheckpointInfo]:
        self._answer("checkpoints")
        users = self._users()
        return [self._info(held, users) for held in self._held.values()]

    def leases(self) -> list[LeaseInfo]:
        self._answer("leases")
        found = []
        for held in self._held.values():
            for _ in range(held.holders):
                number = len(found) + 1
                size = sum(length for _, length in held.blobs)
                found.append(
                    LeaseInfo(
                        number,
                        4000 + number,
                        1000,
                        "ada",
                        f"python serve.py --model {held.name}",
                        held.name,
                        "host",
                        size,
                        held.used,
                        waiting=False,
                    )
                )
        return found

    def events(self, *, follow: bool = False) -> Iterator[DaemonEvent]:
        assert not follow
        self._answer("events")
        return iter(self._events[-1024:])

    def loads(self) -> list[LoadInfo]:
        self._answer("loads")
        return list(self.loading)

    def device_map(self, device: str | None = None) -> DeviceMap:
        self._answer("device_map")
        users = {key: BlobUsers(tuple(by)) for key, by in self._users().items()}
        extents: list[MapExtent] = []
        for segment, size in enumerate(self._segments, 1):
            inside = sorted(
                (place.offset, place.length, users[key])
                for key, place in self._places.items()
                if place.segment == segment
            )
            extents += _extents(segment, size, inside)
        segments = tuple(MapSegment(number, size) for number, size in enumerate(self._segments, 1))
        names = {held.digest: held.name for held in self._held.values()}
        return DeviceMap("host", self.revision, segments, tuple(extents), names)

    def sharing(
        self, reference: str | None = None, device: str | None = None, *, most: int | None = None
    ) -> list[SharedPair]:
        self._answer("sharing")
        shared: dict[tuple[str, str], int] = defaultdict(int)
        only: dict[tuple[str, str], int] = defaultdict(int)
        for key, by in self._users().items():
            for pair in combinations(by, 2):
                shared[pair] += self._places[key].length
                only[pair] += self._places[key].length if len(by) == 2 else 0
        pairs = [(*pair, size, only[pair]) for pair, size in shared.items()]
        if reference is not None:
            pairs = [
                (one, other, *rest) if one == reference else (other, one, *rest)
                for one, other, *rest in pairs
                if reference in (one, other)
            ]
        names = {held.digest: held.name for held in self._held.values()}
        found = [
            SharedPair("host", one, other, names[one], names[other], size, alone) for one, other, size, alone in pairs
        ]
        return sorted(found, key=lambda pair: -pair.shared_bytes)[:most]

    def tensors(self, reference: str, device: str | None = None) -> list[StoredTensor]:
        self._answer("tensors")
        users = self._users()
        return [
            StoredTensor(
                "",
                f"layers.{at}.{key}",
                "BF16",
                (length // 2,),
                length,
                b"\0" * 16,
                0,
                self._places[key].segment,
                self._places[key].offset,
                "model.safetensors",
                BlobUsers(tuple(users[key])),
            )
            for at, (key, length) in enumerate(self._held[reference].blobs)
        ]

    def inspect(self, reference: str, device: str | None = None) -> CheckpointDetails:
        self._answer("inspect")
        held = self._held[reference]
        segments = len({self._places[key].segment for key, _ in held.blobs})
        return CheckpointDetails(
            self._info(held, self._users()), (), segments, (), "host", "", f"/models/{held.name}"
        )  # fmt: skip

    # -- inside ------------------------------------------------------------------------------------------------------

    def _answer(self, call: str) -> None:
        self.asked[call] += 1
        if call in self.errors:
            raise self.errors[call]
        if self.gone:
            raise DaemonUnreachableError(f"no daemon serves at {self.socket}: start it with `weightd serve`")

    def _users(self) -> dict[str, list[str]]:
        users: dict[str, list[str]] = defaultdict(list)
        for held in self._held.values():
            for key, _ in held.blobs:
                if held.digest not in users[key]:
                    users[key].append(held.digest)
        return users

    def _bytes(self, keys: Iterable[str]) -> int:
        return sum(self._places[key].length for key in keys)

    def _info(self, held: _Held, users: dict[str, list[str]]) -> CheckpointInfo:
        total = sum(length for _, length in held.blobs)
        alone = self._bytes(key for key in dict(held.blobs) if len(users[key]) == 1)
        return CheckpointInfo(
            (held.name,), held.digest, "host", len(held.blobs), total, alone, total - alone, held.holders, held.pinned,
            held.loaded, held.used, "resident", 1000, "ada",
        )  # fmt: skip

    def _placed(self, length: int) -> _Place:
        if not self._segments or self._segments[-1] + length > _SEGMENT:
            self._segments.append(0)
        place = _Place(len(self._segments), self._segments[-1], length)
        self._segments[-1] += length
        return place

    def _note(self, kind: str, held: _Held) -> None:
        self.revision += 1
        size = sum(length for _, length in held.blobs)
        process = 4242, 1000, "ada", "weightd load"
        self._events.append(
            DaemonEvent(
                datetime.now(UTC),
                kind,
                held.digest,
                "host",
                (held.name,),
                0,
                0,
                *process,
                "capacity" if kind == "evicted" else "",
                "",
                size,
                size,
                size,
                0.5,
                "",
                (),
                0,
            )
        )


def family() -> FakeHoldings:
    """A base, an adapter merged into it, a full fine-tune, and two pipelines with one text encoder; one has gone."""
    held = FakeHoldings()
    base = [(f"base{at}", 64 * MIB) for at in range(40)]
    encoder = [(f"encoder{at}", 96 * MIB) for at in range(30)]
    held.hold("org/base", base, pinned=True, holders=2, used=40)
    held.hold("org/removed", [(f"removed{at}", 40 * MIB) for at in range(14)])
    held.hold("org/merged-adapter", [*base[:20], *((f"merged{at}", 64 * MIB) for at in range(20))], used=4000)
    held.hold("org/full-fine-tune", [base[0], *((f"tuned{at}", 64 * MIB) for at in range(39))], used=90000)
    held.hold("pipeline/large", [*encoder, *((f"large{at}", 80 * MIB) for at in range(25))], holders=1, used=5)
    held.hold("pipeline/small", [*encoder, *((f"small{at}", 32 * MIB) for at in range(25))], used=700)
    held.remove("org/removed")
    progress = LoadProgress("copying", 3 * GIB, 7 * GIB)
    begun = datetime.now(UTC) - timedelta(seconds=3)
    held.loading.append(
        LoadInfo(
            9,
            ("org/new",),
            "/models/new",
            "host",
            progress,
            1.1 * GIB,
            3.7,
            begun,
            4711,
            1000,
            "ada",
            "weightd load",
            1,
        )
    )
    return held


def crowd(count: int) -> FakeHoldings:
    """Many small checkpoints, each of which shares one blob with the next, and one with every tenth."""
    held = FakeHoldings(budget=512 * GIB)
    for at in range(count):
        blobs = [(f"own{at}", (8 + at % 13) * MIB), (f"next{at}", 3 * MIB), (f"next{at + 1}", 3 * MIB)]
        held.hold(
            f"org/model-{at:04}", [*blobs, (f"tenth{at % 10}", 5 * MIB)], holders=at % 7 == 0, used=43200 + at * 86400
        )
    return held


def _extents(segment: int, size: int, inside: Sequence[tuple[int, int, BlobUsers]]) -> Iterator[MapExtent]:
    """Cover a segment with runs of blobs of equal users, and holes."""
    runs = []
    end = 0
    for offset, length, users in inside:
        if offset > end:
            runs.append((end, offset - end, None))
        runs.append((offset, length, users))
        end = offset + length
    if size > end:
        runs.append((end, size - end, None))
    for users, group in groupby(runs, key=lambda run: run[2]):
        run = list(group)
        length = sum(each[1] for each in run)
        kind = "hole" if users is None else "blobs"
        yield MapExtent(segment, run[0][0], length, kind, len(run) if users else 0, users)
