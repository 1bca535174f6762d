"""Who shares with whom: the resident blobs, grouped by the checkpoints that use them.

A *part* is one component of a resident checkpoint. Blobs that the same parts use have one `BlobUsers`, so a question
about sharing goes through these few sets and not through the blobs. The sets follow the checkpoints with a delay: a
seal or an eviction is one step of the loop and only notes the change here; `go_on` works notes off, a bounded piece a
call. The sets are right whenever nothing is noted (`behind`).

A set lists its parts, and each part its sets: at most one entry for each use of a blob, so no pattern of sharing takes
more memory than its tensors are charged for (`checkpoint.BYTES_OF_TENSOR`).
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from xxhash import xxh3_128_intdigest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .blob import Blob
    from .checkpoint import Checkpoint, CheckpointKey

WORK_IN_A_STEP = 2000
"""The most blobs of one step of the loop. A set that changes counts as one blob, and as one more for each part."""


class Part:
    """One component of a resident checkpoint, and the sets that it is in. No two parts of a device have one number."""

    __slots__ = ("component", "key", "sets", "sharer")

    def __init__(self, number: int, sharer: Sharer, component: str) -> None:
        self.key = xxh3_128_intdigest(number.to_bytes(8, "little"))
        """What it adds to the key of a set (BlobUsers.key)."""
        self.sharer = sharer
        self.component = component
        self.sets: set[BlobUsers] = set()


class Sharer:
    """A resident checkpoint as the index knows it. `pinned` and `leased` are as last noted.

    `number` is above 0; of two checkpoints the one with the lower came first.
    """

    __slots__ = ("checkpoint", "exclusive_bytes", "leased", "name_bytes", "number", "parts", "pinned")

    def __init__(self, number: int, checkpoint: Checkpoint, *, pinned: bool, leased: bool) -> None:
        self.number = number
        self.checkpoint = checkpoint
        self.parts: list[Part] = []
        self.name_bytes = 0
        """Bytes of the names of its components."""
        self.exclusive_bytes = 0
        """Bytes of blobs that no other checkpoint uses."""
        self.pinned = pinned
        self.leased = leased

    @property
    def most_shared_bytes(self) -> int:
        """An upper bound of what it can have in common with another: more only by what it has twice."""
        return self.checkpoint.total_bytes - self.exclusive_bytes


class BlobUsers:
    """A set of parts, ordered by when they came, and what exactly these use: how many `blobs`, of what `length` in all.

    The parts of one checkpoint follow each other. `sharers` counts the checkpoints, `pinned` and `leased` the parts of
    those that are pinned or leased. `key` is the exclusive or of the parts' keys: equal sets have equal keys, and it
    takes a moment to say which key a set will have without a part.
    """

    __slots__ = ("blobs", "key", "leased", "length", "parts", "pinned", "sharers")

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.key = self.sharers = self.pinned = self.leased = self.blobs = self.length = 0

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that use the blobs, each once."""
        return [sharer.checkpoint for sharer, _ in groupby(self.parts, attrgetter("sharer"))]

    def add(self, part: Part) -> None:
        """The blobs have one more user, the latest of all."""
        sharer = part.sharer
        self.sharers += not self.parts or self.parts[-1].sharer is not sharer
        self.pinned += sharer.pinned
        self.leased += sharer.leased
        self.key ^= part.key
        self.parts.append(part)
        part.sets.add(self)

    def remove(self, part: Part) -> None:
        """The blobs have one user less."""
        sharer, parts = part.sharer, self.parts
        at = parts.index(part)
        del parts[at]
        self.sharers -= not any(other.sharer is sharer for other in parts[max(at - 1, 0) : at + 1])
        self.pinned -= sharer.pinned
        self.leased -= sharer.leased
        self.key ^= part.key


class DeviceSharing:
    """The sets and sums of one device. Sums are bytes of blobs that some checkpoint uses, each counted once."""

    def __init__(self) -> None:
        self.sets: dict[int, BlobUsers] = {}
        """By key. Of different sets with one key it has one, and the others are not merged with what becomes equal."""
        self.sharers: dict[Checkpoint, Sharer] = {}
        self.used_bytes = 0
        self.pinned_bytes = 0
        """Of these, what pinned checkpoints use."""
        self.leased_bytes = 0
        """What leased checkpoints use."""
        self.kept_bytes = 0
        """What pinned or leased checkpoints use."""
        self._parts = 0

    @property
    def evictable_bytes(self) -> int:
        """What is left to evict: bytes of blobs that only checkpoints use which are neither pinned nor leased."""
        return self.used_bytes - self.kept_bytes

    def come(self, sharer: Sharer) -> Iterator[None]:
        """Enter a checkpoint in steps."""
        self.sharers[sharer.checkpoint] = sharer
        for component, blobs in sharer.checkpoint.components.items():
            self._parts += 1
            part = Part(self._parts, sharer, component)
            sharer.parts.append(part)
            sharer.name_bytes += len(component.encode())
            yield from self._come(part, blobs)

    def go(self, sharer: Sharer) -> Iterator[None]:
        """Strike a checkpoint out in steps."""
        for part in sharer.parts:
            yield from self._go(part, sharer.checkpoint.components[part.component])
        del self.sharers[sharer.checkpoint]

    def mark(self, sharer: Sharer, *, pinned: bool, leased: bool) -> Iterator[None]:
        """Count a checkpoint as pinned, as leased, as both or as neither, in steps."""
        pins, leases = pinned - sharer.pinned, leased - sharer.leased
        sharer.pinned, sharer.leased = pinned, leased
        if not pins and not leases:
            return
        for work, users in enumerate((users for part in sharer.parts for users in part.sets), 1):
            self._count(users, -users.length)
            users.pinned += pins
            users.leased += leases
            self._count(users, users.length)
            if work % WORK_IN_A_STEP == 0:
                yield

    def _come(self, part: Part, blobs: list[Blob]) -> Iterator[None]:
        """A part uses these blobs as well: those of a set of which it uses only some leave it for another set."""
        found: dict[BlobUsers | None, BlobUsers] = {}
        for some in _cut(blobs):
            for blob in some:
                before: BlobUsers | None = blob.users
                if before is None or before.parts:  # else the component has this blob twice
                    after = found.get(before)
                    if after is None:
                        after = found[before] = BlobUsers()
                    after.blobs += 1
                    after.length += blob.key.length
                    blob.users = after
            yield
        moved: dict[BlobUsers, BlobUsers | None] = {}
        work = 0
        for before, after in found.items():
            if before is None:
                after.add(part)
                self._enter(after)
            elif after.blobs == before.blobs:
                self._strike(before)
                before.add(part)
                self._enter(before)
                moved[after] = before
            else:
                yield from self._split(before, after)
                after.add(part)
                self._enter(after)
                work += len(after.parts) % WORK_IN_A_STEP
            work += 1
            if work >= WORK_IN_A_STEP:
                work = 0
                yield
        yield from _move(blobs, moved)

    def _split(self, before: BlobUsers, after: BlobUsers) -> Iterator[None]:
        """Some blobs leave a set, in steps: their own has the same parts, for the moment."""
        self._count(before, -after.length)
        before.blobs -= after.blobs
        before.length -= after.length
        for work, part in enumerate(before.parts, 1):
            after.add(part)
            if work % WORK_IN_A_STEP == 0:
                yield

    def _go(self, part: Part, blobs: list[Blob]) -> Iterator[None]:
        """A part does not use these blobs any more: sets that are the same without it become one."""
        moved: dict[BlobUsers, BlobUsers | None] = {}
        work = 0
        for users in list(part.sets):
            work += 1 + len(users.parts)
            self._strike(users)
            users.remove(part)
            same = self.sets.get(users.key)
            if not users.parts:
                moved[users] = None
            elif same is not None and same.parts == users.parts:
                for other in users.parts:
                    other.sets.remove(users)
                same.blobs += users.blobs
                same.length += users.length
                self._count(same, users.length)
                moved[users] = same
            else:
                self._enter(users)
            if work >= WORK_IN_A_STEP:
                work = 0
                yield
        yield from _move(blobs, moved)

    def _enter(self, users: BlobUsers) -> None:
        self.sets.setdefault(users.key, users)
        self._count(users, users.length)

    def _strike(self, users: BlobUsers) -> None:
        if self.sets.get(users.key) is users:
            del self.sets[users.key]
        self._count(users, -users.length)

    def _count(self, users: BlobUsers, length: int) -> None:
        self.used_bytes += length
        self.pinned_bytes += length if users.pinned else 0
        self.leased_bytes += length if users.leased else 0
        self.kept_bytes += length if users.pinned or users.leased else 0
        if users.sharers == 1:
            users.parts[0].sharer.exclusive_bytes += length


def _move(blobs: list[Blob], moved: dict[BlobUsers, BlobUsers | None]) -> Iterator[None]:
    """Give the blobs of sets that are no more those that they are in now, in steps."""
    for some in _cut(blobs) if moved else ():
        for blob in some:
            blob.users = moved.get(blob.users, blob.users)
        yield


def _cut(blobs: list[Blob]) -> Iterator[list[Blob]]:
    return (blobs[start : start + WORK_IN_A_STEP] for start in range(0, len(blobs), WORK_IN_A_STEP))


class SharingIndex:
    """Notes what comes, goes, and is pinned or leased, and keeps the sets of all devices.

    `is_leased` says what the books know of leases. `on_note` is called when there is something to do.
    """

    def __init__(self, is_leased: Callable[[CheckpointKey], bool]) -> None:
        self.on_note: Callable[[], None] = lambda: None
        self.revision = 0
        """How often a checkpoint has come or gone, as far as that is known: who shares with whom has changed."""
        self._last = 0
        self._is_leased = is_leased
        self._devices: dict[str, DeviceSharing] = {}
        self._noted: dict[Checkpoint, bool] = {}
        """Checkpoints that have come (True) or gone (False), in that order."""
        self._marked: dict[Checkpoint, None] = {}
        """Checkpoints that were pinned or leased, or are so no longer."""
        self._steps: Iterator[None] | None = None
        self._device = ""
        """The device that `_steps` change."""

    # -- what happens ----------------------------------------------------------------------------------------------

    def came(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is resident."""
        self._noted[checkpoint] = True
        self.on_note()

    def went(self, checkpoint: Checkpoint) -> None:
        """A checkpoint is no longer resident."""
        self._marked.pop(checkpoint, None)
        if not self._noted.pop(checkpoint, False):
            self._noted[checkpoint] = False
            self.on_note()

    def marked(self, checkpoint: Checkpoint) -> None:
        """A resident checkpoint was pinned or leased, or is so no longer."""
        self._marked[checkpoint] = None
        self.on_note()

    def lose(self, device: str) -> None:
        """Everything on a device is gone."""
        self._devices.pop(device, None)
        self._noted = {one: come for one, come in self._noted.items() if one.key.device != device}
        self._marked = {one: None for one in self._marked if one.key.device != device}
        if self._device == device:  # whose blobs it may be going through
            self._steps = None
        self.revision += 1

    # -- catching up -----------------------------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        """Whether `go_on` has anything to do."""
        return self._steps is not None or bool(self._noted) or bool(self._marked)

    def go_on(self) -> bool:
        """Work off a bounded piece of what was noted. Returns whether there is more."""
        if self._steps is None and (self._noted or self._marked):
            self._steps = self._begin()
        if self._steps is not None and next(self._steps, "over") == "over":
            self._steps = None
        return self.behind

    def _begin(self) -> Iterator[None]:
        checkpoint = next(iter(self._noted or self._marked))
        self._device = checkpoint.key.device
        there = self._devices.setdefault(self._device, DeviceSharing())
        pinned, leased = checkpoint.pinned, self._is_leased(checkpoint.key)
        if checkpoint not in self._noted:
            del self._marked[checkpoint]
            return there.mark(there.sharers[checkpoint], pinned=pinned, leased=leased)
        self.revision += 1
        if self._noted.pop(checkpoint):
            self._last += 1
            return there.come(Sharer(self._last, checkpoint, pinned=pinned, leased=leased))
        return there.go(there.sharers[checkpoint])

    # -- questions, which are answered right only when it is not behind ----------------------------------------------

    def of(self, blob: Blob) -> BlobUsers | None:
        """The parts that use a blob; None where no checkpoint does."""
        users: BlobUsers | None = blob.users
        return users

    def on(self, device: str) -> DeviceSharing:
        """The sets and sums of a device."""
        return self._devices.get(device) or DeviceSharing()

    def numbered(self) -> dict[int, Sharer]:
        """Every resident checkpoint by its number."""
        return {one.number: one for there in self._devices.values() for one in there.sharers.values()}

    def exclusive_bytes(self, checkpoint: Checkpoint) -> int:
        """Bytes of blobs that no other checkpoint uses; 0 of one that is not resident."""
        sharer = self.sharer(checkpoint)
        return sharer.exclusive_bytes if sharer else 0

    def sharer(self, checkpoint: Checkpoint) -> Sharer | None:
        """What is known of a checkpoint; None of one that is not resident."""
        return self.on(checkpoint.key.device).sharers.get(checkpoint)
