"""Checkpoints out of resident tensors: what `Client.compose` is told of files and tensors, and its request.

parts = client.load_memory(descriptor, name="part")  # a sealed memfd, in the form of a safetensors file
source = TensorSource(parts.content_digest, "", "weight")
client.compose([CheckpointFile("", "model.safetensors")], [ComposedTensor(0, "weight", "F32", (2, 3), source)])
"""

from __future__ import annotations

import fcntl
from typing import TYPE_CHECKING, NamedTuple

from ._manifest import DTYPES
from ._proto.v1 import composition_pb2
from .errors import InvalidReferenceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .types import CheckpointFile

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""What a memfd must be sealed with before it is loaded: nobody can change its bytes then."""


class TensorSource(NamedTuple):
    """Where a tensor's bytes are: a resident checkpoint ("sha256:" and 64 hex digits), and the tensor's key in it."""

    content_digest: str
    component: str
    name: str


class ComposedTensor(NamedTuple):
    """A tensor of the checkpoint: the index of its file, its name, dtype, shape, and where its bytes are.

    Dtype and shape may be others than in the source, if they take as many bytes. A tensor without bytes needs none.
    """

    file: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorSource | None = None


def compose_request(
    files: Iterable[CheckpointFile], tensors: Iterable[ComposedTensor]
) -> composition_pb2.ComposeRequest:
    """The request's lists. Errors: InvalidReferenceError (a dtype or number that the protocol does not have)."""
    request = composition_pb2.ComposeRequest()
    for file in files:
        metadata = file.metadata
        request.files.add(
            component=file.component, file=file.file, metadata=metadata or {}, has_metadata=metadata is not None
        )
    sources: dict[tuple[str, str], int] = {}
    for row, tensor in enumerate(tensors):
        try:
            request.dtypes.append(DTYPES[tensor.dtype])
            request.names.append(tensor.name)
            request.file_indices.append(tensor.file)
            request.ranks.append(len(tensor.shape))
            request.dimensions.extend(tensor.shape)
        except (KeyError, ValueError):  # the second: a number that is out of range, or text that is no Unicode
            raise InvalidReferenceError(
                f"tensor {tensor.name[:200]!r}: cannot be of type {tensor.dtype!r:.80}, shape {tensor.shape!s:.200} "
                f"and file {tensor.file}"
            ) from None
        if tensor.source is None:
            request.source_indices.append(0)
            continue
        index = sources.setdefault(tensor.source[:2], len(sources))
        request.source_indices.append(index)
        if tensor.source.name != tensor.name:
            request.renamed.append(row)
            request.source_names.append(tensor.source.name)
    for content_digest, component in sources:
        request.sources.add(content_digest=content_digest, component=component)
    return request


def check_sealed(descriptor: int) -> None:
    """Whether nobody can change a memfd's bytes any more. Errors: InvalidReferenceError."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & SEALS != SEALS:
        raise InvalidReferenceError(
            f"descriptor {descriptor}: is no memfd that is sealed against writing, shrinking and growing; add the seals"
        )
