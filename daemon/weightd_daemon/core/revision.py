"""The revision of the books: a number by which whoever has seen them knows whether they have changed."""

from __future__ import annotations


class BooksRevision:
    """Counts changes of checkpoints, names, pins, leases, loads (their progress apart), absences of devices and admins.

    Each is counted where it is made, in the same step. So what was read in one step under one number is the same as
    long as the number is.
    """

    def __init__(self) -> None:
        self.number = 0
        """It only grows."""

    def move(self) -> None:
        """Something has changed."""
        self.number += 1
