"""Checkpoints that are composed of parts which came through memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import weightd
from support import checkpoints
from support.content import content
from weightd.composing import SEALS, ComposedTensor, TensorSource
from weightd.types import TensorKey


@contextlib.contextmanager
def sealed(tensors: checkpoints.Tensors) -> Iterator[int]:
    """A memfd with a safetensors file, which nobody can change."""
    descriptor = os.memfd_create("part", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.write(descriptor, checkpoints.write(Path(folder) / "part", tensors).read_bytes())
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        yield descriptor
    finally:
        os.close(descriptor)


class Recipe:
    """What an attached checkpoint is, byte for byte, and so what can be composed anew."""

    def __init__(self, attachment: weightd.Attachment) -> None:
        self.content_digest = attachment.content_digest
        self.files = attachment.files
        self.rows = [(one.file, one.component, one.name, one.dtype, one.shape) for one in attachment.tensors.values()]
        self.bytes = [content(attachment, name, component) for _, component, name, *_ in self.rows]
        self.views = set(attachment.views)

    def parts(self, of_row: Sequence[int]) -> Mapping[int, checkpoints.Tensors]:
        """The tensors with bytes by part, `of_row` says which, as plain bytes and under names of their own."""
        found: dict[int, dict[str, tuple[str, tuple[int, ...], bytes]]] = {}
        for row, data in enumerate(self.bytes):
            if data:
                found.setdefault(of_row[row], {})[f"r{row}"] = ("U8", (len(data),), data)
        return found

    def tensors(self, sources: Sequence[TensorSource | None]) -> list[ComposedTensor]:
        """The rows, for a client to compose."""
        rows = zip(self.rows, sources, strict=True)
        return [ComposedTensor(file, name, dtype, shape, source) for (file, _, name, dtype, shape), source in rows]

    def load_parts(self, client: weightd.Client, of_row: Sequence[int]) -> list[TensorSource | None]:
        """Load the parts one by one. Returns where each row's bytes are."""
        digests = {}
        for part, tensors in self.parts(of_row).items():
            with sealed(tensors) as descriptor:
                loaded = client.load_memory(descriptor)
            assert loaded is not None
            digests[part] = loaded.content_digest
        return [
            TensorSource(digests[of_row[row]], "", f"r{row}") if data else None for row, data in enumerate(self.bytes)
        ]


def keys_of(recipe: Recipe) -> list[TensorKey]:
    """The tensors of a recipe, by row."""
    return [TensorKey(component, name) for _, component, name, *_ in recipe.rows]
