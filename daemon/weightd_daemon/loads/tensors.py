"""The tensors of a load, as its loader tells of them, and the blobs that they get."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from weightd.errors import FormatError
from weightd_daemon.core.checkpoint import Content
from weightd_daemon.core.digest import EMPTY_DIGEST, BlobIdentity
from weightd_daemon.core.manifest import ContentFile, ContentTensor, content_digest, fused_views
from weightd_daemon.core.sampling import sample
from weightd_daemon.loader.channel import split_digests
from weightd_daemon.loader.indexed import called

from .instances import LoadedInstance

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

    from weightd_daemon.core.blob import Blob
    from weightd_daemon.loader._proto import loader_pb2 as wire


class LoadTensors:
    """Table of a load's tensors, in the order of their numbers; a blob is None until there is one. Sizes are bytes.

    What goes through all of them is for a thread, while nothing else changes here.
    """

    def __init__(self) -> None:
        self.files: list[ContentFile] = []
        self.entries: list[ContentTensor] = []
        self.offsets: list[int] = []
        self.blobs: list[Blob | None] = []
        self.total_bytes = 0
        self._names: set[tuple[str, str]] = set()

    @classmethod
    def of(cls, files: Sequence[ContentFile], entries: Sequence[ContentTensor]) -> Self:
        """The table of tensors that are all known, and checked; none has a blob yet."""
        tensors = cls()
        tensors.files, tensors.entries = [*files], [*entries]
        tensors.blobs = [None] * len(entries)
        tensors.total_bytes = sum(entry.length for entry in entries)
        return tensors

    def add(self, rows: wire.Tensors) -> None:
        """Enter tensors of a file. Errors: FormatError (one of that name is in another file)."""
        file = rows.file
        component = self.files[file].component
        dimensions = iter(rows.dimensions)
        for name, dtype, rank, offset, length in zip(
            rows.names, rows.dtypes, rows.ranks, rows.offsets, rows.lengths, strict=True
        ):
            if (component, name) in self._names:
                where = f" of component {component!r}" if component else ""
                label = called(component, self.files[file].file)
                raise FormatError(f"{label}: tensor {name[:200]!r} is in another file{where} too")
            self._names.add((component, name))
            shape = tuple(itertools.islice(dimensions, rank))
            self.entries.append(ContentTensor(component, name, sys.intern(dtype), shape, file, length))
            self.offsets.append(offset)
            self.blobs.append(None)
            self.total_bytes += length

    def replace(self, replaced: Mapping[int, Blob]) -> None:
        """Give the tensors of some blobs, by number, others."""
        for index, blob in enumerate(self.blobs):
            if blob is not None and blob.number in replaced:
                self.blobs[index] = replaced[blob.number]

    def missing(self) -> Counter[int]:
        """Return the lengths of the tensors with bytes that have no blob yet, and how often each comes."""
        return Counter(
            entry.length for entry, blob in zip(self.entries, self.blobs, strict=True) if blob is None and entry.length
        )

    def sample(self, resident: set[int]) -> list[int]:
        """Return tensors without a blob that show whether the load shares any of the blobs of these lengths."""
        unknown = [index for index, blob in enumerate(self.blobs) if blob is None]
        return [unknown[at] for at in sample([self.entries[index].length for index in unknown], resident)]

    def contents(self, asked: wire.Digests) -> tuple[list[tuple[bytes, int]], list[tuple[tuple[bytes, int], int]]]:
        """Return digest and length of each tensor; and each such pair once, with how often it comes."""
        numbers = zip(asked.tensors, split_digests(asked.digests), strict=True)
        contents = [(digest, self.entries[index].length) for index, digest in numbers]
        # From a generator: of a list, the whole is counted before another thread has the interpreter.
        return contents, list(Counter(content for content in contents).items())

    def content(self) -> Content:
        """Return the content that they are: 120,000 take half a second."""
        digest = content_digest(self.entries, self._identities(), self.files)
        views = fused_views(self.entries, self.blobs)
        return Content(digest, tuple(self.files), tuple(self.entries), tuple(self.blobs), views)

    def instances(self) -> list[list[LoadedInstance]]:
        """Return where each file has which blobs."""
        found: list[list[LoadedInstance]] = [[] for _ in self.files]
        for entry, offset, blob in zip(self.entries, self.offsets, self.blobs, strict=True):
            if blob is not None:
                instance = LoadedInstance(offset, blob.length, blob.key.digest, blob.variant, blob.number)
                found[entry.file].append(instance)
        return found

    def forget(self, most: int) -> Iterator[None]:
        """Let go of all of them, `most` rows a step: to free the list of many takes long."""
        columns: tuple[list[Any], ...] = (self.entries, self.offsets, self.blobs)
        for column in columns:
            while column:
                del column[-most:]
                yield
        while self._names:
            for _ in range(min(most, len(self._names))):
                self._names.pop()
            yield

    def _identities(self) -> list[BlobIdentity]:
        empty = BlobIdentity(EMPTY_DIGEST, 0, 0)
        identities = []
        for entry, blob in zip(self.entries, self.blobs, strict=True):
            if blob is None and entry.length:
                raise RuntimeError(f"the loader left tensor {entry.name!r} without a blob")
            identities.append(blob.identity if blob is not None else empty)
        return identities
