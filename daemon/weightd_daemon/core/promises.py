"""What the books of a device keep for open loads: bytes that were promised to them, and which of them are ending."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class ArenaHoles(NamedTuple):
    """Bytes of a domain's populated holes: those that only the domain can use, and those that any load can have.

    The latter can go back to the system: whole segments, and single pages where segments are sparse.
    """

    own: int
    common: int


class PromisedMemory:
    """Bookkeeping of the bytes promised to open loads, each in its sharing domain."""

    def __init__(self) -> None:
        self._promised: dict[int, tuple[str, int]] = {}
        self.ending: set[int] = set()
        """Loads that ask for nothing more, and that memory is expected of."""

    def make(self, load: int, domain: str, size: int) -> None:
        """Promise `size` bytes to a load."""
        self._promised[load] = (domain, size)

    def spend(self, load: int, size: int) -> int:
        """The load gets `size` bytes, whether they were promised or not. Returns how many of them were."""
        domain, left = self._promised.get(load, ("", 0))
        if spent := min(left, size):
            self._promised[load] = (domain, left - spent)
        return spent

    def restore(self, load: int, size: int) -> None:
        """The load has not got `size` bytes that `spend` took from its promise, which holds again if there is one."""
        if load in self._promised:
            domain, left = self._promised[load]
            self._promised[load] = (domain, left + size)

    def clear(self) -> None:
        """The memory is gone: nothing is promised, and nothing expected."""
        self._promised.clear()
        self.ending.clear()

    def withdraw(self, load: int) -> bool:
        """Promise and expect nothing any more. Returns whether memory was expected of the load."""
        self._promised.pop(load, None)
        expected = load in self.ending
        self.ending.discard(load)
        return expected

    def expect(self, load: int) -> None:
        """The load is ending."""
        self._promised.pop(load, None)
        self.ending.add(load)

    def others(self, load: int | None) -> dict[str, int]:
        """Bytes that are promised to other loads, by domain."""
        others: dict[str, int] = {}
        for number, (domain, size) in self._promised.items():
            if number != load:
                others[domain] = others.get(domain, 0) + size
        return others

    def shares(self, domain: str, load: int | None, free: int, holes: Mapping[str, ArenaHoles]) -> tuple[int, int]:
        """What may become new segments of a load, and all that it may take, where `free` bytes are not used.

        The promises to others are kept for them: a domain's own holes serve those to its loads first.
        """
        others = self.others(load)
        spare = free + sum(there.common for there in holes.values())
        for name, size in others.items():
            spare -= max(0, size - holes[name].own) if name in holes else size
        own = holes[domain].own if domain in holes else 0
        return spare, spare + max(0, own - others.get(domain, 0))
