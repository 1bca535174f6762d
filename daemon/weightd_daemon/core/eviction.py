"""The eviction policy: it chooses, the store evicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Usage(Protocol):
    """What the policy looks at: when a checkpoint was last used (seconds since the epoch), its pin, what it shares."""

    last_used: float

    @property
    def pinned(self) -> bool:
        """Whether it is kept from eviction."""

    @property
    def gives_back(self) -> bool:
        """Whether any bytes go when it is evicted."""


T = TypeVar("T", bound=Usage)


def least_recently_used(checkpoints: Iterable[T], is_leased: Callable[[T], bool]) -> Iterator[T]:
    """Checkpoints that may go, least recently used first: those neither pinned nor leased."""
    for checkpoint in sorted(checkpoints, key=lambda c: c.last_used):
        if not checkpoint.pinned and not is_leased(checkpoint):
            yield checkpoint


def choose(checkpoints: Iterable[T], is_leased: Callable[[T], bool]) -> T | None:
    """The one to evict: the least recently used that gives something back.

    Where none does, because what they have is shared, the least recently used: then the next will.
    """
    first: T | None = None
    for checkpoint in least_recently_used(checkpoints, is_leased):
        if checkpoint.gives_back:
            return checkpoint
        first = first or checkpoint
    return first
