"""Who shares with whom: the resident blobs, grouped by the checkpoints that use them.

A *part* is one component of a resident checkpoint. Blobs that the same parts use have one `BlobUsers`, so a question
about sharing goes through these few sets and not through the blobs. The sets follow the checkpoints with a delay: a
seal or an eviction is one step of the loop and only notes the change here; `go_on` works notes off, a bounded piece a
call. The sets are right whenever nothing is noted (`behind`).

A set is a tuple of its parts, which costs 8 bytes for each use of a blob, so no sharing pattern costs more than its
tensors are charged for (`checkpoint.BYTES_OF_TENSOR`).
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .blob import Blob
    from .checkpoint import Checkpoint, CheckpointKey

WORK_IN_A_STEP = 2000
"""The most blobs of one step of the loop. A set that changes counts as one blob, and as one more for each part."""


class Part:
    """One component of a resident checkpoint, and the sets that it is in."""

    __slots__ = ("component", "sets", "sharer")

    def __init__(self, sharer: Sharer, component: str) -> None:
        self.sharer = sharer
        self.component = component
        self.sets: set[BlobUsers] = set()


class Sharer:
    """A resident checkpoint as the index knows it. `pinned` and `leased` are as last noted.

    `number` is above 0; of two checkpoints the one with the lower came first.
    """

    __slots__ = ("checkpoint", "exclusive_bytes", "leased", "number", "parts", "pinned")

    def __init__(self, number: int, checkpoint: Checkpoint, *, pinned: bool, leased: bool) -> None:
        self.number = number
        self.checkpoint = checkpoint
        self.parts: list[Part] = []
        self.exclusive_bytes = 0
        """Bytes of blobs that no other checkpoint uses."""
        self.pinned = pinned
        self.leased = leased


class BlobUsers:
    """The parts that use a blob, ordered by when they came; those of one checkpoint follow each other.

    `sharers` counts their checkpoints, `pinned` and `leased` their parts of such checkpoints. `blobs` and `length` are
    the number and the bytes of the blobs that exactly these parts use.
    """

    __slots__ = ("blobs", "leased", "length", "parts", "pinned", "sharers")

    def __init__(self, parts: tuple[Part, ...], sharers: int, pinned: int, leased: int) -> None:
        self.parts = parts
        self.sharers = sharers
        self.pinned = pinned
        self.leased = leased
        self.blobs = 0
        self.length = 0

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that use the blobs, each once."""
        return [sharer.checkpoint for sharer, _ in groupby(self.parts, attrgetter("sharer"))]


class DeviceSharing:
    """The sets and sums of one device. Sums are bytes of blobs that some checkpoint uses, each counted once."""

    def __init__(self) -> None:
        self.sets: dict[tuple[Part, ...], BlobUsers] = {}
        self.sharers: dict[Checkpoint, Sharer] = {}
        self.used_bytes = 0
        self.pinned_bytes = 0
        """Of these, what pinned checkpoints use."""
        self.leased_bytes = 0
        """What leased checkpoints use."""
        self.kept_bytes = 0
        """What pinned or leased checkpoints use."""

    @property
    def evictable_bytes(self) -> int:
        """What is left to evict: bytes of blobs that only checkpoints use which are neither pinned nor leased."""
        return self.used_bytes - self.kept_bytes

    def come(self, sharer: Sharer) -> Iterator[None]:
        """Enter a checkpoint in steps."""
        self.sharers[sharer.checkpoint] = sharer
        for component, blobs in sharer.checkpoint.components.items():
            part = Part(sharer, component)
            sharer.parts.append(part)
            yield from self._move(blobs, part, self._with)

    def go(self, sharer: Sharer) -> Iterator[None]:
        """Strike a checkpoint out in steps."""
        for part in sharer.parts:
            yield from self._move(sharer.checkpoint.components[part.component], part, self._without)
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

    def _move(
        self, blobs: list[Blob], part: Part, changed: Callable[[BlobUsers | None, Part], BlobUsers | None]
    ) -> Iterator[None]:
        """Give each blob the set that its own is `changed` to by the coming or going of a part."""
        moved: dict[BlobUsers | None, tuple[BlobUsers | None, list[int]]] = {}
        work = 0
        for blob in blobs:
            before: BlobUsers | None = blob.users
            move = moved.get(before)
            if move is None:
                move = moved[before] = changed(before, part), []
                work += 1 + (len(before.parts) if before is not None else 0)
            if move[0] is not before:
                blob.users = move[0]
                move[1].append(blob.key.length)
            work += 1
            if work >= WORK_IN_A_STEP:
                self._settle(moved)
                moved, work = {}, 0
                yield
        self._settle(moved)

    def _settle(self, moved: dict[BlobUsers | None, tuple[BlobUsers | None, list[int]]]) -> None:
        for before, (after, lengths) in moved.items():
            count, length = len(lengths), sum(lengths)
            if before is not None and lengths:
                self._add(before, -count, -length)
            if after is not None and lengths:
                self._add(after, count, length)

    def _with(self, before: BlobUsers | None, part: Part) -> BlobUsers | None:
        """The set with one more part, the latest of all."""
        if before is None:
            return self._interned((part,), 1, part.sharer.pinned, part.sharer.leased)
        last, sharer = before.parts[-1], part.sharer
        if last is part:  # the component has this blob twice
            return before
        return self._interned(
            (*before.parts, part),
            before.sharers + (last.sharer is not sharer),
            before.pinned + sharer.pinned,
            before.leased + sharer.leased,
        )

    def _without(self, before: BlobUsers | None, part: Part) -> BlobUsers | None:
        """The set without a part."""
        if before is None or before not in part.sets:  # the component has this blob twice
            return before
        at, parts, sharer = before.parts.index(part), before.parts, part.sharer
        rest = parts[:at] + parts[at + 1 :]
        if not rest:
            return None
        others = (at and parts[at - 1].sharer is sharer) or (at < len(rest) and rest[at].sharer is sharer)
        return self._interned(
            rest, before.sharers - (not others), before.pinned - sharer.pinned, before.leased - sharer.leased
        )

    def _interned(self, parts: tuple[Part, ...], sharers: int, pinned: int, leased: int) -> BlobUsers:
        users = self.sets.get(parts)
        if users is None:
            users = self.sets[parts] = BlobUsers(parts, sharers, pinned, leased)
            for part in parts:
                part.sets.add(users)
        return users

    def _add(self, users: BlobUsers, blobs: int, length: int) -> None:
        users.blobs += blobs
        users.length += length
        self._count(users, length)
        if users.sharers == 1:
            users.parts[0].sharer.exclusive_bytes += length
        if not users.blobs:
            del self.sets[users.parts]
            for part in users.parts:
                part.sets.remove(users)

    def _count(self, users: BlobUsers, length: int) -> None:
        self.used_bytes += length
        self.pinned_bytes += length if users.pinned else 0
        self.leased_bytes += length if users.leased else 0
        self.kept_bytes += length if users.pinned or users.leased else 0


class SharingIndex:
    """Notes what comes, goes, and is pinned or leased, and keeps the sets of all devices.

    `is_leased` says what the books know of leases. `on_note` is called when there is something to do.
    """

    def __init__(self, is_leased: Callable[[CheckpointKey], bool]) -> None:
        self.on_note: Callable[[], None] = lambda: None
        self.revision = 0
        """How often the sets have changed."""
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

    def sharer(self, checkpoint: Checkpoint) -> Sharer | None:
        """What is known of a checkpoint; None of one that is not resident."""
        return self.on(checkpoint.key.device).sharers.get(checkpoint)
