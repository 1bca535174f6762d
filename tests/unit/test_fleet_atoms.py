"""Atoms of a fleet's checkpoints, against sets of blobs."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from weightd_fleet.core.atoms import Atoms, atoms_of, find_atoms

BLOBS = 12
CHECKPOINTS = st.lists(st.lists(st.integers(0, BLOBS - 1), max_size=15), max_size=8)
LENGTHS = st.lists(st.integers(0, 1 << 40), min_size=BLOBS, max_size=BLOBS)


def found(checkpoints: list[list[int]], lengths: list[int]) -> Atoms:
    return find_atoms([np.array(blobs, np.int32) for blobs in checkpoints], np.array(lengths, np.int64))


def patterns(atoms: Atoms) -> dict[tuple[int, ...], int]:
    return {tuple(atoms.holders[atom].tolist()): int(weight) for atom, weight in enumerate(atoms.weights)}


@given(CHECKPOINTS, LENGTHS)
def test_an_atom_is_what_the_very_same_checkpoints_hold(checkpoints: list[list[int]], lengths: list[int]) -> None:
    atoms = found(checkpoints, lengths)
    expected: Counter[tuple[int, ...]] = Counter()
    for blob, length in enumerate(lengths):
        if holders := tuple(at for at, blobs in enumerate(checkpoints) if blob in blobs):
            expected[holders] += length
    assert patterns(atoms) == dict(expected)
    assert len(atoms.weights) == len(expected), "each set of holders is one atom"
    assert patterns(atoms_of(expected, len(checkpoints))) == dict(expected)
    assert atoms.sizes.tolist() == [sum(lengths[blob] for blob in set(blobs)) for blobs in checkpoints]


@given(CHECKPOINTS, LENGTHS)
def test_common_bytes(checkpoints: list[list[int]], lengths: list[int]) -> None:
    atoms = found(checkpoints, lengths)
    sets = [set(blobs) for blobs in checkpoints]
    for first, mine in enumerate(sets):
        sharing = [other for other, theirs in enumerate(sets) if mine & theirs]
        assert atoms.neighbours(first).tolist() == sharing
        expected = [(other, sum(lengths[blob] for blob in mine & sets[other])) for other in sharing]
        assert [(int(other), int(shared)) for other, shared in zip(*atoms.common(first), strict=True)] == expected


@given(CHECKPOINTS, LENGTHS, st.data())
def test_absent_bytes(checkpoints: list[list[int]], lengths: list[int], data: st.DataObject) -> None:
    row = st.lists(st.booleans(), min_size=len(checkpoints), max_size=len(checkpoints))
    resident = data.draw(st.lists(row, max_size=4))
    atoms = found(checkpoints, lengths)
    table = np.array(resident, np.bool_).reshape(len(resident), len(checkpoints))
    for number, blobs in enumerate(checkpoints):
        there = [set().union(*(at for at, held in zip(checkpoints, row, strict=True) if held)) for row in resident]
        expected = [sum(lengths[blob] for blob in set(blobs) - held) for held in there]
        assert atoms.absent(table, number).tolist() == expected
