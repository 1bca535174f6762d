"""Read a manifest: check its columns and return its tensors as rows. Used by daemon and client; no torch, no grpc.

Columns are checked where they are read. What is right beyond one row, such as whether tensors overlap, only the daemon
asks, when it takes a manifest up.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate, compress
from operator import add, gt, or_
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from ._proto.v1 import handles_pb2
from .errors import NotFoundError, ServerError
from .types import CheckpointFile, TensorInfo, TensorKey

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

FORM: Final = 1
"""The form that the daemon writes. 0 is that of daemons before forms had numbers, and reads the same."""

DTYPES: Final[dict[str, handles_pb2.DType]] = {
    name.removeprefix("DTYPE_"): getattr(handles_pb2, name) for name, number in handles_pb2.DType.items() if number
}
"""Numbers of dtypes, by safetensors' names (and "GGML_…")."""

_NAMES: Final[dict[int, str]] = {number: name for name, number in DTYPES.items()}
_DIGEST_BYTES: Final = 16
_NOT_THERE: Final = "has a tensor of a segment or dtype that is not there"

T = TypeVar("T")
StoredRow = tuple[str, str, tuple[int, ...], int, int, int]
"""A tensor's name, dtype, shape, segment, offset and length."""


class ListedView(NamedTuple):
    """A view as the manifest lists it: component, name, rows of its members, shape."""

    component: str
    name: str
    rows: tuple[int, ...]
    shape: tuple[int, ...]


class Manifest:
    """What a manifest says. `len` is the number of its tensors.

    Errors, here and of every method: ServerError (it is none, of a later form, or its columns do not fit together).
    """

    def __init__(self, encoded: bytes) -> None:
        try:
            self._message = message = handles_pb2.Manifest.FromString(encoded)
        except DecodeError:
            raise odd("cannot be decoded") from None
        if message.form > FORM:
            raise odd(f"is of form {message.form}", f"this version of weightd reads up to {FORM}; use a later one")
        self.content_digest: str = message.content_digest
        self.device: str = message.device
        self.kind: str = message.kind or "host"  # an older daemon does not say, and has nothing else
        self.components: tuple[str, ...] = tuple(message.components)
        self.segment_bytes: tuple[int, ...] = tuple(message.segment_bytes)
        count = len(message.names)
        columns: tuple[Sequence[object], ...] = (
            message.file_indices, message.dtypes, message.ranks, message.segments, message.offsets, message.lengths,
            message.variants,
        )  # fmt: skip
        if any(len(column) != count for column in columns) or len(message.digests) != count * _DIGEST_BYTES:
            raise odd("has columns of different lengths")
        if any(file.component >= len(self.components) for file in message.files):
            raise odd("has a file of a component that it does not have")
        if max(message.file_indices, default=-1) >= len(message.files):
            raise odd("has a tensor of a file that it does not have")
        self._component_of_file = [self.components[file.component] for file in message.files]

    def __len__(self) -> int:
        return len(self._message.names)

    @cached_property
    def files(self) -> tuple[CheckpointFile, ...]:
        """Source files; `TensorInfo.file` is an index into them."""
        return tuple(
            CheckpointFile(component, file.file, dict(file.metadata) if file.has_metadata else None)
            for component, file in zip(self._component_of_file, self._message.files, strict=True)
        )

    @cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor, in the order of the rows."""
        return tuple(self.rows())

    @cached_property
    def views(self) -> tuple[ListedView, ...]:
        """What is listed as fused, unchecked but for the component."""
        found = []
        for view in self._message.views:
            if view.component >= len(self.components):
                raise odd_view(view.name, f"is of component number {view.component} of {len(self.components)}")
            shape = tuple(view.shape)
            found.append(ListedView(self.components[view.component], view.name, tuple(view.members), shape))
        return tuple(found)

    def select(self, components: Collection[str], keys: Collection[TensorKey]) -> list[int]:
        """The numbers of the rows of components, and of the tensors that keys name, in the order of the rows.

        No tensor becomes a row for it. Errors: NotFoundError.
        """
        for component in components:
            if component not in self.components:
                raise NotFoundError(f"component {component!r} is not in the checkpoint")
        of_file = self._component_of_file
        files, names = list(self._message.file_indices), list(self._message.names)
        whole = {number for number, component in enumerate(of_file) if component in components}
        wanted = {key.name for key in keys}
        asked = map(or_, map(wanted.__contains__, names), map(whole.__contains__, files))
        missing, found = set(keys), []
        for row in compress(range(len(names)), asked):
            key = TensorKey(of_file[files[row]], names[row])
            if key in keys or files[row] in whole:
                missing.discard(key)
                found.append(row)
        if missing:
            key = min(missing)
            inside = f" of component {key.component!r}" if key.component else ""
            raise NotFoundError(f"tensor {key.name!r}{inside} is not in the checkpoint")
        return found

    def keys(self, rows: Sequence[int] | None = None) -> list[TensorKey]:
        """Component and name of these tensors, or of all."""
        message = self._message
        components = map(self._component_of_file.__getitem__, _taken(message.file_indices, rows))
        return list(map(TensorKey._make, zip(components, _taken(message.names, rows), strict=True)))

    def row(self, number: int) -> TensorInfo:
        """One tensor; no other becomes a row."""
        message = self._message
        name, file = message.names[number], message.file_indices[number]
        segment, offset, length = message.segments[number], message.offsets[number], message.lengths[number]
        start = self._starts[number]
        try:
            if length and (offset < 0 or length < 0 or offset + length > self.segment_bytes[segment]):
                raise odd(f"places {length} bytes of tensor {name[:200]!r} beyond their segment")
            return TensorInfo(
                self._component_of_file[file],
                name,
                _NAMES[message.dtypes[number]],
                self._dimensions[start : start + message.ranks[number]],
                segment,
                offset,
                length,
                self._digest(number),
                message.variants[number],
                file,
            )
        except (IndexError, KeyError):
            raise odd(_NOT_THERE) from None

    def rows(self, rows: Sequence[int] | None = None) -> list[TensorInfo]:
        """These tensors, or all; no others become rows."""
        files, variants = (_taken(column, rows) for column in (self._message.file_indices, self._message.variants))
        names, dtypes, shapes, segments, offsets, lengths = self._columns(rows)
        components = map(self._component_of_file.__getitem__, files)
        digests = map(self._digest, range(len(self)) if rows is None else rows)
        columns = components, names, dtypes, shapes, segments, offsets, lengths, digests, variants, files
        return list(map(TensorInfo._make, zip(*columns, strict=True)))

    def stored(self, rows: Sequence[int] | None = None) -> Iterator[StoredRow]:
        """What it takes to make these tensors, or all, and no more: name, dtype, shape, segment, offset, length."""
        return zip(*self._columns(rows), strict=True)

    def places(self, rows: Sequence[int] | None = None) -> tuple[list[int], list[int], list[int]]:
        """Segments, offsets and lengths of these tensors, or of all, unchecked."""
        message = self._message
        return _taken(message.segments, rows), _taken(message.offsets, rows), _taken(message.lengths, rows)

    def _columns(
        self, rows: Sequence[int] | None
    ) -> tuple[list[str], list[str], list[tuple[int, ...]], list[int], list[int], list[int]]:
        """The columns of `stored`, checked.

        They are checked as a whole, as a loop over rows takes longer than all else together. If that fails, they are
        checked row by row: that names the tensor, and accepts one without bytes wherever it is said to lie.
        """
        message, sizes, dimensions = self._message, self.segment_bytes, self._dimensions
        starts, ranks = _taken(self._starts, rows), _taken(message.ranks, rows)
        segments, offsets, lengths = self.places(rows)
        try:
            inside = min(offsets, default=0) >= 0 and min(lengths, default=0) >= 0
            inside = inside and not any(map(gt, map(add, offsets, lengths), map(sizes.__getitem__, segments)))
        except IndexError:
            inside = False
        if not inside:
            for row in range(len(self)) if rows is None else rows:
                self.row(row)
        try:
            dtypes = list(map(_NAMES.__getitem__, _taken(message.dtypes, rows)))
        except KeyError:
            raise odd(_NOT_THERE) from None
        shapes = [dimensions[start : start + rank] for start, rank in zip(starts, ranks, strict=True)]
        return _taken(message.names, rows), dtypes, shapes, segments, offsets, lengths

    def _digest(self, row: int) -> bytes:
        return self._digests[_DIGEST_BYTES * row : _DIGEST_BYTES * (row + 1)]

    @cached_property
    def _digests(self) -> bytes:
        return self._message.digests  # protobuf copies it each time

    @cached_property
    def _dimensions(self) -> tuple[int, ...]:
        return tuple(self._message.dimensions)

    @cached_property
    def _starts(self) -> list[int]:
        """Where in `_dimensions` each shape begins."""
        starts = list(accumulate(self._message.ranks, initial=0))
        if starts.pop() != len(self._dimensions) or min(self._dimensions, default=0) < 0:
            raise odd("has shapes that cannot be")
        return starts


def _taken(column: Sequence[T], rows: Sequence[int] | None) -> list[T]:
    """What a column has in these rows, or in all."""
    return list(column[:]) if rows is None else [column[row] for row in rows]


def odd(what: str, advice: str = "that is a bug: please report it") -> ServerError:
    """The error that a manifest cannot be used."""
    return ServerError(f"the manifest {what}; {advice}")


def odd_view(name: str, what: str) -> ServerError:
    """The error that a view of a manifest cannot be used."""
    return odd(f"has a view {name[:200]!r} that {what}")
