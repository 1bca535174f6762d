"""What the seal of a load needs and can be counted before: the seal itself is one step of the loop."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from .arena import without

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from .arena import Extent
    from .blob import Blob
    from .checkpoint import Content


class PreparedSeal(NamedTuple):
    """The blobs that a load brings to a content, their lengths, and what is left of its grants. Sizes are bytes."""

    content: Content
    fresh: list[Blob]
    lengths: Counter[int]
    rest: list[Extent]

    @classmethod
    def of(cls, content: Content, load: int, granted: Iterable[Extent]) -> Self:
        """Count what load number `load`, which was granted these extents, brings to a content."""
        fresh = [blob for blob in content.tally.unique.values() if blob.load == load]
        rest = without(granted, (blob.slot for blob in fresh))
        return cls(content, fresh, Counter(blob.key.length for blob in fresh), rest)
