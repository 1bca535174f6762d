"""What the books of a device keep for open loads: bytes that were promised to them, and which of them are ending."""

from __future__ import annotations


class PromisedMemory:
    """Bookkeeping of the bytes promised to open loads, each in its sharing domain."""

    def __init__(self) -> None:
        self._promised: dict[int, tuple[str, int]] = {}
        self.ending: set[int] = set()
        """Loads that ask for nothing more, and that memory is expected of."""

    def make(self, load: int, domain: str, size: int) -> None:
        """Promise `size` bytes to a load."""
        self._promised[load] = (domain, size)

    def spend(self, load: int, size: int) -> None:
        """The load has got `size` bytes, if they were promised or not."""
        if load in self._promised:
            domain, left = self._promised[load]
            self._promised[load] = (domain, max(0, left - size))

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
