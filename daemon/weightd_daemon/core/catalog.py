"""The catalog: names that point to contents, the owners of names, and the resolution of references."""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightd.errors import InvalidReferenceError, NotFoundError, PermissionDeniedError

from .checkpoint import CheckpointKey
from .events import CatalogNameChanged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .checkpoint import Checkpoint, LostCheckpoint
    from .events import Event
    from .lease import LeasePeer
    from .limits import UserLimits
    from .principal import Principal
    from .store import ContentStore

_DIGEST = re.compile(r"(sha256:)?([0-9a-f]{6,64})")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""What no name may contain: a terminal would obey it."""
_LIKE_DIGEST = re.compile(r"sha256:[0-9a-f]*|[0-9a-f]{12,64}")
"""What `weightd ls` prints of a digest must not be another checkpoint's name."""
NAME_BYTES = 1024
"""Longest name."""
_SHOWN = 80
"""Characters that are shown of what is too long to be anything."""


def check_reference(reference: str) -> None:
    """Refuse a reference that is longer than any name, before it is looked for. Errors: InvalidReferenceError."""
    if len(reference) > NAME_BYTES or len(reference.encode(errors="replace")) > NAME_BYTES:
        size = len(reference.encode(errors="replace"))
        raise InvalidReferenceError(
            f"reference {reference[:_SHOWN] + '…'!r}: has {size} bytes, and may have {NAME_BYTES}; "
            "give a name or a digest"
        )


@dataclass(frozen=True, slots=True)
class CatalogTag:
    """The checkpoint that a name points to, and the name's owner."""

    content_digest: str
    owner: int | None
    is_default: bool = False
    """Whether nobody has chosen it: it was only the path that was loaded, and goes when its content does."""


class Catalog:
    """Checkpoint names by sharing domain. A name is a tag: it can move to new content while leases keep the old.

    One that was chosen outlives an eviction or a loss: nobody else can take it then, and loading the content again
    brings it back. `changed` is told after every change of a name, a pin or another mark of a checkpoint, `on_event` of
    names that are given, moved and dropped.
    """

    def __init__(
        self,
        store: ContentStore,
        limits: UserLimits,
        changed: Callable[[], None] = lambda: None,
        on_event: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._limits = limits
        self._tags: dict[tuple[str, str], CatalogTag] = {}
        self._named: dict[tuple[str, str], list[tuple[bool, str]]] = {}
        """The names of each (domain, content) as they are ranked: every attach asks for the first."""
        self._owned: Counter[int | None] = Counter()
        """How many names a user has."""
        self.renamed: set[tuple[str, str]] = set()
        """The (domain, name) that have changed since the root record was written, which empties this."""
        self.repinned: set[CheckpointKey] = set()
        """Likewise the checkpoints that were pinned or unpinned."""
        self.changed = changed
        self._on_event = on_event

    @property
    def tags(self) -> dict[tuple[str, str], CatalogTag]:
        """Every name, by sharing domain and name."""
        return dict(self._tags)

    def tag(self, domain: str, name: str) -> CatalogTag | None:
        """What a name points to; None where there is no such name."""
        return self._tags.get((domain, name))

    def listed(self, who: Principal) -> list[tuple[str, CatalogTag, str]]:
        """Every name that `who` may see, sorted, and its content's state: "resident", "absent", "lost" or "evicted"."""
        found = [
            (name, tag, self._state(domain, tag.content_digest))
            for (domain, name), tag in self._tags.items()
            if who.admin or domain == who.domain
        ]
        return sorted(found, key=lambda one: one[0])

    def named(self, who: Principal, name: str) -> tuple[CatalogTag, str] | None:
        """What a name that `who` may see points to, and its state as in `listed`; its own domain's come first."""
        domain = who.domain
        if who.admin and (domain, name) not in self._tags:
            domain = next((other for other, called in self._tags if called == name), domain)
        tag = self._tags.get((domain, name))
        return None if tag is None else (tag, self._state(domain, tag.content_digest))

    def restore(self, domain: str, name: str, tag: CatalogTag) -> None:
        """Enter a name that an earlier daemon knew; a default one only if its content is resident."""
        if tag.is_default and not self._is_known(domain, tag.content_digest):
            return
        if (domain, name) in self._tags:
            self._untag(domain, name)
        self._tag(domain, name, tag)

    def check(self, who: Principal, name: str, content_digest: str = "") -> None:
        """Whether `who` may give this name to a content; to the one that has it already, everybody may.

        Without a digest, while the content is not known yet: whether `who` may give it to whatever comes.
        Errors: InvalidReferenceError, PermissionDeniedError, CapacityError.
        """
        tag = self._tags.get((who.domain, name))
        if tag is not None and tag.content_digest == content_digest:
            return
        if not name or len(name.encode()) > NAME_BYTES or CONTROL.search(name):
            raise InvalidReferenceError(
                f"name {name[:80]!r}: must have 1 to {NAME_BYTES} bytes and no control characters"
            )
        if _LIKE_DIGEST.fullmatch(name):
            raise InvalidReferenceError(f"name {name!r}: looks like a digest; choose another")
        if who.uid is None:
            raise PermissionDeniedError(f"name {name!r}: your user id is not known here, so you cannot own a name")
        if tag is not None and tag.owner != who.uid and not who.admin:
            raise PermissionDeniedError(f"name {name!r} belongs to uid {tag.owner}; choose another with --name")
        if tag is None and self._limits.most(who, "names"):
            self._limits.check(who, "names", self._owned[who.uid])

    def set(
        self, who: Principal, name: str, content_digest: str, by: LeasePeer | None = None, *, is_default: bool = False
    ) -> None:
        """Point a name to a content; whose it was first, it stays. `by` is the process. Errors: as in `check`.

        A name that somebody has chosen stays chosen; a default one becomes so when its owner chooses it.
        """
        self.check(who, name, content_digest)
        tag = self._tags.get((who.domain, name))
        if tag is not None and tag.content_digest == content_digest:
            if tag.is_default and not is_default and (who.admin or who.uid == tag.owner):
                self._untag(who.domain, name)
                self._tag(who.domain, name, CatalogTag(content_digest, tag.owner))
                self.changed()
            return
        if tag is not None:
            self._untag(who.domain, name)
            is_default = is_default and tag.is_default
        self._tag(who.domain, name, CatalogTag(content_digest, tag.owner if tag else who.uid, is_default))
        self.changed()
        self._on_event(CatalogNameChanged(who.domain, name, content_digest, tag.content_digest if tag else "", by))

    def names(self, checkpoint: Checkpoint, most: int | None = None) -> list[str]:
        """The names of a checkpoint, or the first `most`: sorted, paths last, for one that somebody chose says more."""
        return [name for _, name in self._names(checkpoint)[:most]]

    def name(self, checkpoint: Checkpoint) -> str:
        """The first of `names`; empty where there is none."""
        return next((name for _, name in self._names(checkpoint)), "")

    def owner(self, checkpoint: Checkpoint) -> int | None:
        """Owner of the first name, or who loaded it."""
        name = self.name(checkpoint)
        return self._tags[checkpoint.key.domain, name].owner if name else checkpoint.owner

    def visible(self, who: Principal) -> list[Checkpoint]:
        """The checkpoints that `who` may see: those of its domain; an admin sees all."""
        return [c for c in self._store.checkpoints.values() if who.admin or c.key.domain == who.domain]

    def lost(self, who: Principal) -> list[LostCheckpoint]:
        """The records of lost checkpoints that `who` may see, as in `visible`."""
        return [lost for lost in self._store.lost.values() if who.admin or lost.checkpoint.key.domain == who.domain]

    def find(self, who: Principal, reference: str, device: str = "") -> Checkpoint:
        """The checkpoint that a name or digest means.

        Errors: NotFoundError, InvalidReferenceError (ambiguous, too long), DeviceError (it was lost).
        """
        check_reference(reference)
        checkpoint = self._find(who, reference, device)
        lost = self._lost(checkpoint)
        if lost is not None:
            raise lost.error(reference)
        return checkpoint

    def check_owner(self, who: Principal, checkpoint: Checkpoint, action: str, name: str = "") -> None:
        """Whether `who` may do `action` to a checkpoint, or to one of its names. Errors: PermissionDeniedError."""
        tag = self._tags.get((checkpoint.key.domain, name))
        owner = tag.owner if tag else self.owner(checkpoint)
        if not who.admin and (who.uid is None or who.uid != owner):
            what = name or checkpoint.key.content_digest[:19]
            whose = "a user without an identity" if owner is None else f"uid {owner}"
            raise PermissionDeniedError(f"checkpoint {what} belongs to {whose}; only it and admins may {action} it")

    def pin(self, who: Principal, checkpoint: Checkpoint, name: str = "") -> None:
        """Keep a checkpoint from eviction in the name of `who`. Errors: PermissionDeniedError, CapacityError."""
        self.check_owner(who, checkpoint, "pin", name)
        self.pin_loaded(who, checkpoint)

    def pin_loaded(self, who: Principal, checkpoint: Checkpoint) -> None:
        """Pin a checkpoint that `who` owns or has loaded. Errors: CapacityError (the user has too much already)."""
        if self._limits.most(who, "bytes") and who.uid not in {*checkpoint.pins, checkpoint.owner}:
            more = checkpoint.total_bytes + checkpoint.books_bytes
            self._limits.check(who, "bytes", self._store.index.bytes_of(who.uid), more)
        self._store.index.pin(checkpoint, who.uid)
        self._store.revision.move()
        self.repinned.add(checkpoint.key)
        self.changed()

    def unpin(self, who: Principal, checkpoint: Checkpoint, name: str = "") -> None:
        """Take back the pin of `who`; an admin takes back everybody's. Errors: PermissionDeniedError."""
        self.check_owner(who, checkpoint, "unpin", name)
        for uid in [*checkpoint.pins] if who.admin else [who.uid]:
            self._store.index.unpin(checkpoint, uid)
        self._store.revision.move()
        self.repinned.add(checkpoint.key)
        self.changed()

    def remove(self, who: Principal, reference: str, device: str = "", by: LeasePeer | None = None) -> int:
        """Drop a name, and the checkpoint with its last; a digest drops all names. Returns the bytes given up.

        Of a lost checkpoint the record goes. Errors: NotFoundError, InvalidReferenceError (ambiguous),
        PermissionDeniedError, InUseError (then nothing has changed).
        """
        check_reference(reference)
        try:
            checkpoint = self._find(who, reference, device)
        except NotFoundError:
            tag = self._tags.get((who.domain, reference))
            if tag is None or (tag.owner != who.uid and not who.admin):
                raise
            self._drop(who.domain, reference, by)  # a name whose content was evicted
            return 0
        named = self._is_named(checkpoint, reference)
        names = [reference] if named else self.names(checkpoint)
        for name in names or [""]:
            self.check_owner(who, checkpoint, "remove", name)
        if len(self._names(checkpoint)) > len(names):
            self._drop(checkpoint.key.domain, reference, by)
            return 0
        if self._lost(checkpoint) is not None:
            del self._store.lost[checkpoint.key]
            self._store.revision.move()
            for name in self._pointless(checkpoint):  # no eviction tells of them
                self._drop(checkpoint.key.domain, name, by)
            self.changed()
            return 0
        return self._store.remove(checkpoint, reference, by=by)

    def forget(self, checkpoint: Checkpoint, *, chosen: bool = True) -> None:
        """Drop the names of a checkpoint that is gone, if they point to nothing now: all, or only those by default."""
        domain = checkpoint.key.domain
        for name in self._pointless(checkpoint):
            if chosen or self._tags[domain, name].is_default:
                self._untag(domain, name)

    def _pointless(self, checkpoint: Checkpoint) -> list[str]:
        """The names of a checkpoint that is gone, unless its content is resident or lost elsewhere."""
        elsewhere = self._is_known(checkpoint.key.domain, checkpoint.key.content_digest)
        return [] if elsewhere else self.names(checkpoint)

    def _is_known(self, domain: str, content_digest: str) -> bool:
        """Whether a content is resident, absent or lost, on any device."""
        return self._state(domain, content_digest) != "evicted"

    def _state(self, domain: str, content_digest: str) -> str:
        keys = self._keys(domain, content_digest)
        there = [self._store.is_absent(c) for key in keys if (c := self._store.checkpoints.get(key)) is not None]
        if there:
            return "absent" if all(there) else "resident"
        return "lost" if any(key in self._store.lost for key in keys) else "evicted"

    def _keys(self, domain: str, content_digest: str, device: str = "") -> list[CheckpointKey]:
        """Under which keys a content of a domain may stand."""
        return [CheckpointKey(uuid, domain, content_digest) for uuid in self._store.memories if device in ("", uuid)]

    def _drop(self, domain: str, name: str, by: LeasePeer | None) -> None:
        previous = self._tags[domain, name].content_digest
        self._untag(domain, name)
        self.changed()
        self._on_event(CatalogNameChanged(domain, name, "", previous, by))

    def _names(self, checkpoint: Checkpoint) -> Sequence[tuple[bool, str]]:
        return self._named.get((checkpoint.key.domain, checkpoint.key.content_digest), ())

    def _tag(self, domain: str, name: str, tag: CatalogTag) -> None:
        self._tags[domain, name] = tag
        insort(self._named.setdefault((domain, tag.content_digest), []), _ranked(name))
        self._owned[tag.owner] += 1
        self.renamed.add((domain, name))
        self._store.revision.move()

    def _untag(self, domain: str, name: str) -> None:
        tag = self._tags.pop((domain, name))
        content = domain, tag.content_digest
        names = self._named[content]
        del names[bisect_left(names, _ranked(name))]
        if not names:
            del self._named[content]
        self._owned[tag.owner] -= 1
        if not self._owned[tag.owner]:
            del self._owned[tag.owner]
        self.renamed.add((domain, name))
        self._store.revision.move()

    def _find(self, who: Principal, reference: str, device: str) -> Checkpoint:
        """As `find`, with the lost checkpoints."""
        match = _DIGEST.fullmatch(reference)
        found = self._find_in_domain(who.domain, reference, device)
        if not found and who.admin:
            found = self._fitting(who, device, lambda c: self._is_named(c, reference))
            found = [c for c in found if c.key.domain == who.domain] or found
        if not found and match:
            digest = f"sha256:{match[2]}"
            found = [c for key in self._keys(who.domain, digest, device) if (c := self._store.checkpoints.get(key))]
            found = found or self._fitting(who, device, lambda c: c.key.content_digest.startswith(digest))
        if not found:
            where = f" on {device}" if device else ""
            raise NotFoundError(
                f"checkpoint {reference!r} is not resident{where}; `weightd ls` shows what is, `weightd load` loads"
            )
        if len(found) > 1:
            places = ", ".join(f"{c.key.content_digest[:19]} on {c.key.device}" for c in found[:4])
            raise InvalidReferenceError(
                f"{reference!r} means more than one checkpoint ({places}); say --device or more digits"
            )
        return found[0]

    def _find_in_domain(self, domain: str, name: str, device: str) -> list[Checkpoint]:
        """What a name of a domain points to: resident checkpoints, or lost ones where none is resident."""
        tag = self._tags.get((domain, name))
        if tag is None:
            return []
        keys = self._keys(domain, tag.content_digest, device)
        resident = [c for key in keys if (c := self._store.checkpoints.get(key)) is not None]
        return resident or [lost.checkpoint for key in keys if (lost := self._store.lost.get(key)) is not None]

    def _fitting(self, who: Principal, device: str, fits: Callable[[Checkpoint], bool]) -> list[Checkpoint]:
        """Resident checkpoints that fit, or lost ones where none is resident."""
        for there in (self.visible(who), [lost.checkpoint for lost in self.lost(who)]):
            found = [c for c in there if fits(c) and (not device or c.key.device == device)]
            if found:
                return found
        return []

    def _lost(self, checkpoint: Checkpoint) -> LostCheckpoint | None:
        """The record of a checkpoint, if it is lost."""
        return self._store.lost.get(checkpoint.key)

    def _is_named(self, checkpoint: Checkpoint, reference: str) -> bool:
        tag = self._tags.get((checkpoint.key.domain, reference))
        return tag is not None and tag.content_digest == checkpoint.key.content_digest


def _ranked(name: str) -> tuple[bool, str]:
    """A name as it stands among others: paths come last."""
    return name.startswith("/"), name
