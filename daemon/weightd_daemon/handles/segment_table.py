"""Maps components and tensors of a manifest to segments, for clients that attach a few tensors of many.

A manifest is not decoded to answer that: it would take as long as the checkpoint has tensors, on the loop.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from typing import TYPE_CHECKING

from weightd.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from weightd_daemon.core.checkpoint import Content

_NO_SEGMENT = (1 << 32) - 1


class HandleSegmentTable:
    """Which segments' handles a client needs: segments by component, and by hash of component and tensor name.

    Segments go by their place in the manifest.

    It takes 12 bytes a tensor. Two tensors of one hash get each other's segment as well, and a name that the checkpoint
    lacks may, once in 2^64 times, have the hash of one that it has. The client has the names, and sees what is missing.
    Python's hash has a key that is this process's own: nobody can make names that collide.
    """

    def __init__(self, rows: Iterable[tuple[str, str, int | None]]) -> None:
        """`rows` are component, name and segment of each tensor; None for a tensor without bytes."""
        found: dict[str, set[int]] = {}
        # Sorted in parts: to sort 100,000 at once takes 0.1 s, in which no other thread runs, the loop's neither.
        parts: list[list[tuple[int, int]]] = [[] for _ in range(256)]
        for component, name, segment in rows:
            segments = found.setdefault(component, set())
            if segment is not None:
                segments.add(segment)
            one = hash((component, name))
            parts[(one >> 56) + 128].append((one, _NO_SEGMENT if segment is None else segment))
        self._components = {component: sorted(segments) for component, segments in found.items()}
        self._hashes = array("q")
        self._segments = array("I")
        for part in parts:
            part.sort()
            self._hashes.extend(one for one, _ in part)
            self._segments.extend(segment for _, segment in part)

    @classmethod
    def of(cls, content: Content) -> HandleSegmentTable:
        """The table of a content that is to be sealed."""
        places = {segment: place for place, segment in enumerate(content.segments)}
        return cls(
            (entry.component, entry.name, None if blob is None else places[blob.segment])
            for entry, blob in zip(content.entries, content.blobs, strict=True)
        )

    def find(self, components: Collection[str], tensors: Iterable[tuple[str, str]]) -> list[int]:
        """The segments that hold all of these components, and these tensors by component and name; each once, sorted.

        Errors: NotFoundError.
        """
        wanted: set[int] = set()
        for component in set(components):
            if component not in self._components:
                there = ", ".join(map(repr, sorted(self._components)))
                raise NotFoundError(f"component {component!r} is not in the checkpoint; it has {there}")
            wanted.update(self._components[component])
        hashes, segments, count = self._hashes, self._segments, len(self._hashes)
        for component, name in tensors:
            one = hash((component, name))
            at = bisect_left(hashes, one)
            if at == count or hashes[at] != one:
                inside = f" of component {component!r}" if component else ""
                raise NotFoundError(f"tensor {name!r}{inside} is not in the checkpoint")
            while at < count and hashes[at] == one:
                wanted.add(segments[at])
                at += 1
        wanted.discard(_NO_SEGMENT)
        return sorted(wanted)
