"""Checks loads, and the leases that wait for their attach, against the limits of the user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd_daemon.core.checkpoint import CheckpointKey

if TYPE_CHECKING:
    from collections.abc import Iterable

    from weightd_daemon.core.limits import UserLimits
    from weightd_daemon.core.principal import Principal
    from weightd_daemon.core.store import ContentStore

    from .flight import InFlightLoad


class LoadQuota:
    """Admits loads within a user's quota: by their figures before anything is read, and again by their content."""

    def __init__(self, store: ContentStore, limits: UserLimits) -> None:
        self._store = store
        self._limits = limits

    def may_lease(self, who: Principal) -> bool:
        """Whether a user may hold one more lease."""
        most = self._limits.most(who, "leases")
        return not most or self._store.leases.held_by(who.uid, most) < most

    def check_leases(self, who: Principal, more: int) -> None:
        """Whether a user may hold so many more leases. Errors: CapacityError."""
        if most := self._limits.most(who, "leases"):
            self._limits.check(who, "leases", self._store.leases.held_by(who.uid, max(0, most - more + 1)), more)

    def admit(
        self, load: InFlightLoad, under_way: Iterable[InFlightLoad], total: int, books: int, tensors: int, content: str
    ) -> None:
        """A load knows its bytes and its number of tensors, and in the end its content. Errors: CapacityError.

        `books` is what it takes of the daemon's own books, which count as bytes do.

        What is resident already costs its user nothing; as long as the content is "", equal figures may mean that.
        """
        who, place = load.request.who, (load.request.device, load.request.who.domain)
        if not self._limits.most(who, "bytes"):
            return
        if content and CheckpointKey(*place, content) in self._store.checkpoints:
            return
        if not content and self._store.index.has_figures(place, total, tensors):
            return
        others = sum(o.announced for o in under_way if o is not load and o.request.who.uid == who.uid)
        self._limits.check(who, "bytes", self._store.index.bytes_of(who.uid) + others, total + books)
        load.announced = total + books
