"""The attached tensors as a mapping over a manifest's columns: most programs want tensors, and no row of them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import cached_property
from typing import TYPE_CHECKING

from .types import TensorInfo, TensorKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._manifest import Manifest, StoredRow


class TensorRows(Mapping[TensorKey, TensorInfo]):
    """Tensors of a manifest, all or those of some rows, by (component, name) in file order.

    Rows are made when they are asked for: one by its key, all of them by `values` or `items`.
    """

    def __init__(self, manifest: Manifest, rows: Sequence[int] | None = None) -> None:
        self._manifest = manifest
        self._rows = rows
        self._made: dict[TensorKey, TensorInfo] = {}

    def __getitem__(self, key: TensorKey) -> TensorInfo:
        info = self._made.get(key)
        if info is None:
            info = self._made[key] = self._manifest.row(self._numbers[key])
        return info

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def __iter__(self) -> Iterator[TensorKey]:
        return iter(self._numbers)

    def __reversed__(self) -> Iterator[TensorKey]:
        return reversed(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"<TensorRows of {len(self)} tensors>"

    def keys(self) -> KeysView[TensorKey]:
        """Every key."""
        return self._numbers.keys()

    def values(self) -> ValuesView[TensorInfo]:
        """Every row."""
        return self._all.values()

    def items(self) -> ItemsView[TensorKey, TensorInfo]:
        """Every key with its row."""
        return self._all.items()

    @cached_property
    def components(self) -> frozenset[str]:
        """The components of these tensors."""
        if len(self._manifest.components) == 1 and self._rows is None:
            return frozenset(self._manifest.components)
        return frozenset(key.component for key in self._numbers)

    def stored(self, component: str) -> Iterator[StoredRow]:
        """What it takes to make the tensors of a component, in file order."""
        if self.components == {component}:
            return self._manifest.stored(self._rows)
        return self._manifest.stored([row for key, row in self._numbers.items() if key.component == component])

    @cached_property
    def copies(self) -> Mapping[TensorKey, int]:
        """For names whose bytes lie where an earlier name's lie: which further mapping of the segment is theirs."""
        segments, offsets, lengths = self._manifest.places(self._rows)
        if len(set(zip(segments, offsets, strict=True))) == len(segments):
            return {}
        seen: dict[tuple[int, int], int] = {}
        copies: dict[TensorKey, int] = {}
        keys = self._manifest.keys(self._rows)
        for key, segment, offset, length in zip(keys, segments, offsets, lengths, strict=True):
            if length:
                number = seen.get((segment, offset), 0)
                seen[segment, offset] = number + 1
                if number:
                    copies[key] = number
        return copies

    @cached_property
    def _numbers(self) -> dict[TensorKey, int]:
        """The number of each tensor's row."""
        rows = range(len(self._manifest)) if self._rows is None else self._rows
        return dict(zip(self._manifest.keys(self._rows), rows, strict=True))

    @cached_property
    def _all(self) -> dict[TensorKey, TensorInfo]:
        return dict(zip(self._manifest.keys(self._rows), self._manifest.rows(self._rows), strict=True))
