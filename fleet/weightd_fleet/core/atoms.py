"""Atoms: blobs that the very same checkpoints hold count as one, with the sum of their bytes.

A fleet has hundreds of thousands of blobs and a few patterns of who holds what, so sums over atoms are short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Ids = NDArray[np.int32]
    Bytes = NDArray[np.int64]
    Table = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, slots=True)
class SparseRows:
    """Rows of numbers, one behind the other in `values`; row i begins at `starts[i]` and ends at `starts[i + 1]`."""

    starts: NDArray[np.int64]
    values: Ids

    @classmethod
    def of(cls, rows: Sequence[Ids]) -> SparseRows:
        """The rows given."""
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return cls(starts, np.concatenate([*rows, np.zeros(0, np.int32)]).astype(np.int32, copy=False))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Ids:
        return self.values[self.starts[row] : self.starts[row + 1]]

    def union(self, rows: Ids | Bytes) -> Ids:
        """The numbers in any of these rows, each once, in ascending order."""
        return np.unique(self.gathered(rows))

    def gathered(self, rows: Ids | Bytes) -> Ids:
        """These rows, one behind the other."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        ends = np.cumsum(lengths)
        inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        found: Ids = self.values[np.repeat(self.starts[rows], lengths) + inside]
        return found

    def transposed(self, columns: int) -> SparseRows:
        """For each of `columns` numbers, the rows that have it, in ascending order."""
        order = np.argsort(self.values, kind="stable")
        rows = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.starts))
        starts = np.zeros(columns + 1, np.int64)
        np.cumsum(np.bincount(self.values, minlength=columns), out=starts[1:])
        return SparseRows(starts, rows[order])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.starts.nbytes + self.values.nbytes


@dataclass(frozen=True, eq=False, slots=True)
class Atoms:
    """The atoms of some checkpoints: their bytes, which ones each checkpoint has, and which checkpoints have each."""

    weights: Bytes
    members: SparseRows
    holders: SparseRows
    sizes: Bytes
    """Bytes of each checkpoint."""

    def neighbours(self, checkpoint: int) -> Ids:
        """The checkpoints that have any byte in common with this one, itself among them unless it is empty."""
        return self.holders.union(self.members[checkpoint])

    def common(self, checkpoint: int) -> tuple[Ids, Bytes]:
        """The neighbours of a checkpoint, and the bytes that it has in common with each."""
        sharing, mine = self.neighbours(checkpoint), self.members[checkpoint]
        return sharing, self._of_those(sharing, mine) @ self.weights[mine]

    def absent(self, resident: Table, checkpoint: int) -> Bytes:
        """The bytes of a checkpoint that are missing in each place, by which checkpoints are resident there.

        `resident` has a row for each place, and at least as many columns as there are checkpoints.
        """
        mine = self.members[checkpoint]
        found = np.full(len(resident), self.sizes[checkpoint], np.int64)
        sharing = self.neighbours(checkpoint)
        places, columns = np.nonzero(resident[:, sharing])
        if len(places):
            begins = np.flatnonzero(np.diff(places, prepend=-1))
            present = np.logical_or.reduceat(self._of_those(sharing, mine)[columns], begins, axis=0)
            found[places[begins]] -= present @ self.weights[mine]
        return found

    def _of_those(self, checkpoints: Ids, atoms: Ids) -> Table:
        """Which of these checkpoints, in ascending order, has which of these atoms: a row for each checkpoint."""
        lengths = self.holders.starts[atoms + 1] - self.holders.starts[atoms]
        columns = np.repeat(np.arange(len(atoms)), lengths)
        holders = self.holders.gathered(atoms)
        rows = np.searchsorted(checkpoints, holders)
        asked = checkpoints[np.minimum(rows, len(checkpoints) - 1)] == holders
        found = np.zeros((len(checkpoints), len(atoms)), np.bool_)
        found[rows[asked], columns[asked]] = True
        return found


def find_atoms(checkpoints: Sequence[Ids], lengths: Bytes) -> Atoms:
    """The atoms of checkpoints, each given by the numbers of its blobs. A blob counts once; `lengths` are its bytes.

    A blob's label stands for the set of checkpoints seen so far that have it. Each checkpoint splits the labels of its
    blobs from the same labels elsewhere, so that at the end one label is one set.
    """
    labels = np.zeros(len(lengths), np.int64)  # 0: in no checkpoint
    following = 1
    for blobs in checkpoints:
        mine = np.unique(blobs)
        old, split = np.unique(labels[mine], return_inverse=True)
        labels[mine] = following + split
        following += len(old)
    used, dense = np.unique(np.concatenate([[0], labels]), return_inverse=True)
    atoms = (dense[1:] - 1).astype(np.int32)  # -1: in no checkpoint
    weights = np.zeros(len(used) - 1, np.int64)
    np.add.at(weights, atoms[atoms >= 0], lengths[atoms >= 0])
    members = SparseRows.of([np.unique(atoms[blobs]) for blobs in checkpoints])
    sizes = np.array([weights[members[row]].sum() for row in range(len(checkpoints))], np.int64)
    return Atoms(weights, members, members.transposed(len(weights)), sizes)


def atoms_of(patterns: Mapping[tuple[int, ...], int], checkpoints: int) -> Atoms:
    """The atoms of `checkpoints` checkpoints from the bytes that each set of them has in common and no other has."""
    rows: list[list[int]] = [[] for _ in range(checkpoints)]
    for atom, holders in enumerate(patterns):
        for checkpoint in holders:
            rows[checkpoint].append(atom)
    weights = np.fromiter(patterns.values(), np.int64, len(patterns))
    members = SparseRows.of([np.array(row, np.int32) for row in rows])
    sizes = np.array([weights[members[row]].sum() for row in range(checkpoints)], np.int64)
    return Atoms(weights, members, members.transposed(len(weights)), sizes)
