"""Local search on a placement: moves and swaps that place what is left over, or that save bytes.

Every step keeps each device within its budget and each node at one replica of a checkpoint. The search ends when no
step helps, or when its effort is spent: it counts what it looks at and never asks a clock, so that one plan is the same
on every machine.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .books import PlacementBooks


class PlacementSearch:
    """Improves a placement step by step. `unplaced` counts the replicas of each checkpoint that have no device yet.

    `effort` is the number of placements that it may still try.
    """

    def __init__(self, books: PlacementBooks, unplaced: Counter[int], effort: int) -> None:
        self.books = books
        self.unplaced = unplaced
        self.effort = effort
        self._held = [set(device.held) for device in books.devices]

    def place_left_over(self) -> None:
        """Place what is left over, as far as steps help and the effort goes."""
        while self.effort > 0 and self._insert_any():
            pass

    def save_bytes(self) -> None:
        """Improve the placement until no step helps or the effort is spent."""
        while self.effort > 0 and (self._move_any() or self._swap_any() or self._insert_any()):
            pass

    # -- placing what is left over -----------------------------------------------------------------------------------

    def _insert_any(self) -> bool:
        """Place one replica that is left over, the biggest first, if need be after one other has moved."""
        for checkpoint in sorted(self.unplaced, key=lambda left: (-self.books.atoms.sizes[left], left)):
            if self._insert(checkpoint) or self._insert_by_moving(checkpoint) or self._insert_by_swapping(checkpoint):
                self.unplaced[checkpoint] -= 1
                self.unplaced += Counter()  # drops what has come to 0
                return True
        return False

    def _insert(self, checkpoint: int) -> bool:
        """Place a checkpoint where it adds the fewest bytes, if it fits anywhere."""
        device = self._cheapest(checkpoint)
        if device is None:
            return False
        self.books.put(checkpoint, device)
        return True

    def _insert_by_moving(self, checkpoint: int) -> bool:
        """Place a checkpoint on a device that another one leaves for a third device."""
        for device in np.flatnonzero(self.books.allowed(checkpoint)).tolist():
            for other in self._movable(device):
                if self.effort <= 0:
                    return False
                self.books.take(other, device)
                self.effort -= 1
                if self._fits(checkpoint, device):
                    self.books.put(checkpoint, device)
                    if (target := self._cheapest(other, but=device)) is not None:
                        self.books.put(other, target)
                        return True
                    self.books.take(checkpoint, device)
                self.books.put(other, device)
        return False

    def _insert_by_swapping(self, checkpoint: int) -> bool:
        """Place a checkpoint on a device where two others have changed places."""
        for device in np.flatnonzero(self.books.allowed(checkpoint)).tolist():
            for other, target, third in self._pairs(device):
                if third != checkpoint and self._swap(other, device, third, target):
                    if self._fits(checkpoint, device):
                        self.books.put(checkpoint, device)
                        return True
                    self._swap(third, device, other, target)
        return False

    # -- saving bytes ------------------------------------------------------------------------------------------------

    def _move_any(self) -> bool:
        """Move each checkpoint to where it adds fewer bytes than it frees; whether any has moved."""
        moved = False
        for device in range(len(self.books.devices)):
            for checkpoint in self._movable(device):
                if self.effort <= 0:
                    return moved
                before = self.books.total
                self.books.take(checkpoint, device)
                target = self._cheapest(checkpoint)
                cheaper = target is not None and (self.books.total + int(self.books.fresh(checkpoint)[target]) < before)
                self.books.put(checkpoint, target if target is not None and cheaper else device)
                moved |= cheaper
        return moved

    def _swap_any(self) -> bool:
        """Have two checkpoints change places where that saves bytes."""
        for device in range(len(self.books.devices)):
            for checkpoint, target, other in self._pairs(device):
                before = self.books.total
                if self._swap(checkpoint, device, other, target):
                    if self.books.total < before:
                        return True
                    self._swap(other, device, checkpoint, target)
        return False

    # -- steps -------------------------------------------------------------------------------------------------------

    def _pairs(self, device: int) -> Iterator[tuple[int, int, int]]:
        """A checkpoint of a device, another device, and a checkpoint there: all that may change places."""
        books = self.books
        for checkpoint in self._movable(device):
            for target in np.flatnonzero(books.allowed(checkpoint)).tolist():
                for other in self._movable(target):
                    if self.effort <= 0:
                        return
                    if books.allowed(other)[device]:
                        yield checkpoint, target, other

    def _swap(self, checkpoint: int, device: int, other: int, target: int) -> bool:
        """Have two checkpoints change places, if both fit there."""
        books = self.books
        self.effort -= 1
        books.take(checkpoint, device)
        books.take(other, target)
        if self._fits(checkpoint, target) and self._fits(other, device):
            books.put(checkpoint, target)
            books.put(other, device)
            return True
        books.put(checkpoint, device)
        books.put(other, target)
        return False

    def _cheapest(self, checkpoint: int, but: int | None = None) -> int | None:
        """The device where a checkpoint may go and adds the fewest bytes; None if none fits."""
        self.effort -= 1
        return self.books.cheapest(checkpoint, self.books.fresh(checkpoint), but)

    def _fits(self, checkpoint: int, device: int) -> bool:
        return bool(self.books.fits(self.books.fresh(checkpoint))[device])

    def _movable(self, device: int) -> list[int]:
        return sorted(self.books.on_device[device] - self._held[device])
