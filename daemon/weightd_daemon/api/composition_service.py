"""CompositionService: decodes the lists of tensors that clients compose checkpoints of, and checks them."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING

from weightd._dtypes import tensor_bytes
from weightd._manifest import DTYPES
from weightd._proto.v1 import composition_pb2, composition_pb2_grpc
from weightd.errors import InvalidReferenceError, PermissionDeniedError
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.devices.naming import place
from weightd_daemon.handles.attach import check_files, shown
from weightd_daemon.loads.request import ComposedTensors, LoadComposition, LoadRequest

from .results import result_to

if TYPE_CHECKING:
    from collections.abc import Sequence, Sized

    from weightd_daemon.core.principal import Principal
    from weightd_daemon.handles.connections import HandleSocketConnection

    from .context import GrpcServiceContext
    from .error_mapping import Context

MAX_SOURCES = 1000
"""Sources of one composition: each takes a lease."""
MAX_TENSORS = 200_000
"""Tensors of one composition: the largest mixtures of experts have half as many. More would fit into a request, and
what goes through them in one call to C keeps the loop from its turn."""
MAX_DIMENSIONS = 64
MAX_TENSOR_NAME = 4096
"""Bytes; both as in a safetensors file."""
_INT_LIMIT = 2**63
_DTYPES = {int(number): name for name, number in DTYPES.items()}


class CompositionService(composition_pb2_grpc.CompositionServiceServicer):
    """gRPC service that makes checkpoints of resident tensors."""

    def __init__(self, parts: GrpcServiceContext) -> None:
        self._parts = parts

    async def Compose(  # noqa: N802  # named by the proto
        self, request: composition_pb2.ComposeRequest, context: Context
    ) -> composition_pb2.ComposeResponse:
        """Lease the sources at once; the rest when it is the caller's turn."""
        parts = self._parts
        connection, who = parts.caller(context)
        wish = self._wish(connection, who, request)
        if wish.name:
            parts.catalog.check(who, wish.name)
        load, waiter = parts.loads.compose(wish, LoadComposition(_sources(request), partial(tensors_from, request)))
        try:
            _, outcome = await asyncio.shield(load.done)
            return composition_pb2.ComposeResponse(result=result_to(wish.name, outcome, wish.device))
        finally:
            parts.loads.leave(load, waiter)

    def _wish(
        self, connection: HandleSocketConnection, who: Principal, request: composition_pb2.ComposeRequest
    ) -> LoadRequest:
        device = place(self._parts.devices, self._parts.default_device, request.device)
        self._parts.store.check_present(device)
        if request.pin and who.uid is None:
            raise PermissionDeniedError("your user id is not known here, so you cannot pin")
        return LoadRequest(
            who=who,
            peer=connection.peer,
            sources=(),
            device=device,
            name=request.name,
            pin=request.pin,
            detached=request.detached,
            reference=shown(request.reference),
        )


def _sources(request: composition_pb2.ComposeRequest) -> tuple[tuple[str, str], ...]:
    if len(request.sources) > MAX_SOURCES:
        raise InvalidReferenceError(
            f"the request names {len(request.sources)} sources; a composition may have {MAX_SOURCES}"
        )
    return tuple((source.content_digest, source.component) for source in request.sources)


def tensors_from(request: composition_pb2.ComposeRequest) -> ComposedTensors:
    """The files and tensors of a request. Takes half a second of 100,000. Errors: InvalidReferenceError."""
    columns: list[Sized] = [request.names, request.file_indices, request.dtypes]
    columns += request.ranks, request.source_indices
    count = max(map(len, columns))
    if count > MAX_TENSORS:
        raise InvalidReferenceError(f"the request has {count} tensors; a composition may have {MAX_TENSORS}")
    files, names, ranks = _files(request), list(request.names), list(request.ranks)
    numbers, sources = list(request.file_indices), list(request.source_indices)
    if any(len(column) != len(names) for column in columns) or sum(ranks) != len(request.dimensions):
        raise InvalidReferenceError("the request has columns of different lengths")
    if max(ranks, default=0) > MAX_DIMENSIONS or any(length < 0 for length in request.dimensions):
        raise InvalidReferenceError(f"the request has a shape that cannot be; at most {MAX_DIMENSIONS} dimensions")
    if max(numbers, default=-1) >= len(files):
        raise InvalidReferenceError("the request has a tensor of a file that it does not name")
    entries: list[ContentTensor] = []
    seen: set[tuple[str, str]] = set()
    shapes = iter(request.dimensions)
    for name, number, dtype, rank, source in zip(names, numbers, request.dtypes, ranks, sources, strict=True):
        entry = _entry(files[number].component, name, dtype, tuple(itertools.islice(shapes, rank)), number)
        if entry[:2] in seen:
            raise InvalidReferenceError(f"tensor {name[:200]!r} is named twice; a component has one of a name")
        if entry.length and source >= len(request.sources):
            raise InvalidReferenceError(f"tensor {name[:200]!r} has a source that the request does not name")
        seen.add(entry[:2])
        entries.append(entry)
    return ComposedTensors(files, entries, sources, _source_names(request, names))


def _entry(component: str, name: str, number: int, shape: tuple[int, ...], file: int) -> ContentTensor:
    dtype = _DTYPES.get(number)
    length = None if dtype is None else tensor_bytes(dtype, shape)
    if dtype is None or length is None or length >= _INT_LIMIT:
        called = f"type number {number}" if dtype is None else dtype
        raise InvalidReferenceError(f"tensor {name[:200]!r}: there is none of {called} with the shape {shape!s:.200}")
    if len(name.encode()) > MAX_TENSOR_NAME:
        raise InvalidReferenceError(f"tensor {name[:200]!r}: its name is longer than {MAX_TENSOR_NAME} bytes")
    return ContentTensor(component, name, dtype, shape, file, length)


def _source_names(request: composition_pb2.ComposeRequest, names: Sequence[str]) -> list[str]:
    renamed = list(request.renamed)
    if len(renamed) != len(request.source_names) or max(renamed, default=-1) >= len(names):
        raise InvalidReferenceError("the request renames a tensor that it does not have")
    found = list(names)
    for row, name in zip(renamed, request.source_names, strict=True):
        found[row] = name
    return found


def _files(request: composition_pb2.ComposeRequest) -> list[ContentFile]:
    check_files(request.files)
    return [
        ContentFile(file.component, file.file, dict(file.metadata) if file.has_metadata else None)
        for file in request.files
    ]
