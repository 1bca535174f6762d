"""Selects the tensors that show whether a file shares content with resident checkpoints.

Where segments are all or nothing, bytes that were copied before they were found equal leave holes. So there a file that
may share is hashed first, and copied with exactly the memory that it needs. Whether it does share, a few tensors tell:
fine-tunes share most of theirs, or almost none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .blob import OWN_COPY_BELOW

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_MOST = 16
_SHARE = 16
"""A sample is at most one part in so many of all bytes, so that hashing it twice costs little, or one tensor."""


def sample(lengths: Sequence[int], resident: Collection[int]) -> list[int]:
    """Indices of tensors, spread evenly over those that have the length of a resident blob; empty where none has."""
    likely = [i for i, length in enumerate(lengths) if length >= OWN_COPY_BELOW and length in resident]
    if not likely:
        return []
    room = sum(lengths) // _SHARE
    chosen: list[int] = []
    for place in range(min(_MOST, len(likely))):
        index = likely[place * len(likely) // min(_MOST, len(likely))]
        if lengths[index] <= room:
            chosen.append(index)
            room -= lengths[index]
    return chosen or [min(likely, key=lambda i: lengths[i])]
