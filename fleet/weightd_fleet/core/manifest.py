"""The canonical manifest of a published checkpoint. BLAKE3 over its encoding is the checkpoint's name in a fleet.

It says of every tensor where its bytes lie in which file and what their digest is; of every file the digest of all
other bytes, its *frame*: the header of a safetensors file; of a GGUF file all that is before, between and behind the
tensors. So each file can be made again byte for byte. It lists the small files beside the weights, too, and the
revision on a hub that all of them came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self

from .digests import fleet_name
from .encoding import ManifestReader, ManifestWriter
from .manifest_checks import MAX_DIMENSIONS, MAX_FILES, MAX_TENSORS, check
from .manifest_rows import FilePiece, HubOrigin, SmallFile, TensorRow, WeightFile

if TYPE_CHECKING:
    from collections.abc import Iterable

_MAGIC = b"weightd-manifest\x01"


@dataclass(frozen=True)
class FleetManifest:
    """A checkpoint as a fleet knows it. All rows are sorted, so that equal content has one encoding."""

    files: tuple[WeightFile, ...]
    tensors: tuple[TensorRow, ...]
    small_files: tuple[SmallFile, ...]
    origin: HubOrigin | None = None

    @classmethod
    def of(
        cls,
        files: Iterable[WeightFile],
        tensors: Iterable[TensorRow],
        small_files: Iterable[SmallFile] = (),
        origin: HubOrigin | None = None,
    ) -> Self:
        """The manifest of these rows, in any order. Errors: FormatError for rows that cannot be."""
        made = cls(tuple(sorted(files)), tuple(sorted(tensors)), tuple(sorted(small_files)), origin)
        check(made.files, made.tensors, made.small_files, origin)
        return made

    @cached_property
    def encoded(self) -> bytes:
        """The canonical encoding."""
        writer = ManifestWriter()
        for text in self.origin or ("", ""):
            writer.text(text)
        writer.number(len(self.files))
        for file in self.files:
            writer.text(file.component)
            writer.text(file.file)
            writer.numbers(file.size, file.frame_bytes)
            writer.digest(file.frame)
            writer.text(file.hub_blob)
        writer.number(len(self.tensors))
        numbers = {(file.component, file.file): number for number, file in enumerate(self.files)}
        for row in self.tensors:
            writer.number(numbers[row.component, row.file])
            writer.text(row.name)
            writer.text(row.dtype)
            writer.numbers(len(row.shape), *row.shape, row.offset, row.length, row.counts)
            writer.digest(row.digest)
        writer.number(len(self.small_files))
        for small in self.small_files:
            writer.text(small.path)
            writer.number(small.length)
            writer.digest(small.digest)
            writer.text(small.hub_blob)
        return _MAGIC + writer.content()

    @cached_property
    def name(self) -> str:
        """The checkpoint's name in a fleet: `b3:` and 64 hex digits."""
        return fleet_name(self.encoded)

    @classmethod
    def decode(cls, encoded: bytes) -> Self:
        """The manifest of an encoding from anywhere. Errors: FormatError for anything but a canonical encoding."""
        reader = ManifestReader(encoded, _MAGIC)
        origin = HubOrigin(reader.text(), reader.text())
        files = [
            WeightFile(reader.text(), reader.text(), reader.number(), reader.number(), reader.digest(), reader.text())
            for _ in range(reader.count(MAX_FILES))
        ]
        tensors = [_row(reader, files) for _ in range(reader.count(MAX_TENSORS))]
        small_files = [
            SmallFile(reader.text(), reader.number(), reader.digest(), reader.text())
            for _ in range(reader.count(MAX_FILES))
        ]
        made = cls.of(files, tensors, small_files, origin if any(origin) else None)
        if made.encoded != encoded:
            reader.fail("is not in its canonical form")
        return made

    @cached_property
    def _by_file(self) -> dict[tuple[str, str], list[TensorRow]]:
        found: dict[tuple[str, str], list[TensorRow]] = {}
        for row in self.tensors:
            found.setdefault((row.component, row.file), []).append(row)
        return found

    def rows_of(self, file: WeightFile) -> list[TensorRow]:
        """The tensors of a file."""
        return self._by_file.get((file.component, file.file), [])

    def pieces(self, file: WeightFile) -> list[FilePiece]:
        """The pieces that a file consists of, in order and without holes; none is empty."""
        found: list[FilePiece] = []
        position = framed = 0
        rows = (row for row in self.rows_of(file) if row.length)
        for row in sorted(rows, key=lambda row: row.offset):
            if gap := row.offset - position:
                found.append(FilePiece(position, gap, None, framed))
            framed += gap
            found.append(FilePiece(row.offset, row.length, row, framed))
            position = row.offset + row.length
        if rest := file.size - position:
            found.append(FilePiece(position, rest, None, framed))
        return found

    def blobs(self) -> list[tuple[bytes, int]]:
        """The digest and the length in bytes of each tensor that counts and has bytes: what a catalogue is given."""
        return [(row.digest, row.length) for row in self.tensors if row.counts and row.length]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors that count."""
        return sum(row.length for row in self.tensors if row.counts)


def _row(reader: ManifestReader, files: list[WeightFile]) -> TensorRow:
    number = reader.number()
    if number >= len(files):
        reader.fail("names a file that it does not list")
    name, dtype = reader.text(), reader.text()
    shape = tuple(reader.number() for _ in range(reader.count(MAX_DIMENSIONS)))
    offset, length, counts = reader.number(), reader.number(), reader.number()
    file = files[number]
    return TensorRow(file.component, file.file, name, dtype, shape, offset, length, reader.digest(), counts=counts != 0)
