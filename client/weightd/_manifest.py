"""Read a manifest: check its columns and return its tensors as rows. Used by daemon and client; no torch, no grpc.

Columns are checked where they are turned into rows. What is right beyond one row, such as whether tensors overlap, only
the daemon asks, when it takes a manifest up.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from google.protobuf.message import DecodeError

from ._proto.v1 import handles_pb2
from .errors import NotFoundError, ServerError
from .types import CheckpointFile, TensorInfo, TensorKey

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

FORM: Final = 1
"""The form that the daemon writes. 0 is that of daemons before forms had numbers, and reads the same."""

DTYPES: Final[dict[str, handles_pb2.DType]] = {
    name.removeprefix("DTYPE_"): getattr(handles_pb2, name) for name, number in handles_pb2.DType.items() if number
}
"""Numbers of dtypes, by safetensors' names (and "GGML_…")."""

_NAMES: Final[dict[int, str]] = {number: name for name, number in DTYPES.items()}
_DIGEST_BYTES: Final = 16


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
        return tuple(self._read())

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

    def select(self, components: Collection[str], keys: Collection[TensorKey]) -> list[TensorInfo]:
        """The tensors of components, and those that keys name, in the order of the rows; no others become rows.

        Errors: NotFoundError.
        """
        for component in components:
            if component not in self.components:
                raise NotFoundError(f"component {component!r} is not in the checkpoint")
        files, names = list(self._message.file_indices), list(self._message.names)
        whole = {number for number, component in enumerate(self._component_of_file) if component in components}
        wanted = {key.name for key in keys}
        columns = enumerate(zip(names, files, strict=True))
        rows = [row for row, (name, file) in columns if name in wanted or file in whole]
        missing, found = set(keys), []
        for info in self._read(rows):
            key = TensorKey(info.component, info.name)
            if key in keys or info.component in components:
                missing.discard(key)
                found.append(info)
        if missing:
            key = min(missing)
            inside = f" of component {key.component!r}" if key.component else ""
            raise NotFoundError(f"tensor {key.name!r}{inside} is not in the checkpoint")
        return found

    def rows(self, rows: Sequence[int]) -> list[TensorInfo]:
        """The tensors of these rows; no others become rows."""
        return self._read(rows)

    def _read(self, rows: Sequence[int] | None = None) -> list[TensorInfo]:
        """Those rows, or all of them, checked."""
        message, sizes, components = self._message, self.segment_bytes, self._component_of_file
        dimensions, digests = list(message.dimensions), message.digests
        starts = list(accumulate(message.ranks, initial=0))
        if starts.pop() != len(dimensions) or min(dimensions, default=0) < 0:
            raise odd("has shapes that cannot be")
        columns: Sequence[Sequence[Any]] = (
            message.names, message.file_indices, message.dtypes, message.ranks, starts, message.segments,
            message.offsets, message.lengths, message.variants,
        )  # fmt: skip
        if rows is not None:
            columns = [[column[row] for row in rows] for column in columns]
        found = []
        try:
            for row, name, file, dtype, rank, start, segment, offset, length, variant in zip(
                range(len(self)) if rows is None else rows, *columns, strict=True
            ):
                if length and (offset < 0 or length < 0 or offset + length > sizes[segment]):
                    raise odd(f"places {length} bytes of tensor {name[:200]!r} beyond their segment")
                digest = digests[_DIGEST_BYTES * row : _DIGEST_BYTES * (row + 1)]
                shape = tuple(dimensions[start : start + rank])
                found.append(
                    TensorInfo(
                        components[file], name, _NAMES[dtype], shape, segment, offset, length, digest, variant, file
                    )
                )
        except (IndexError, KeyError):
            raise odd("has a tensor of a segment or dtype that is not there") from None
        return found


def odd(what: str, advice: str = "that is a bug: please report it") -> ServerError:
    """The error that a manifest cannot be used."""
    return ServerError(f"the manifest {what}; {advice}")


def odd_view(name: str, what: str) -> ServerError:
    """The error that a view of a manifest cannot be used."""
    return odd(f"has a view {name[:200]!r} that {what}")
