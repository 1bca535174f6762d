"""The eviction policy: it chooses, the store evicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Usage(Protocol):
    """What the policy looks at: when a checkpoint was last used (seconds since the epoch), and its pin."""

    last_used: float

    @property
    def pinned(self) -> bool:
        """Whether it is kept from eviction."""


T = TypeVar("T", bound=Usage)


def least_recently_used(checkpoints: Iterable[T], is_leased: Callable[[T], bool]) -> Iterator[T]:
    """Checkpoints that may go, least recently used first: those neither pinned nor leased."""
    for checkpoint in sorted(checkpoints, key=lambda c: c.last_used):
        if not checkpoint.pinned and not is_leased(checkpoint):
            yield checkpoint
