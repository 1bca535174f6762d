"""The result of a load as a message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightd._proto.v1 import checkpoint_pb2

if TYPE_CHECKING:
    from weightd_daemon.loads.request import LoadOutcome


def result_to(name: str, outcome: LoadOutcome, device: str) -> checkpoint_pb2.LoadResult:
    """What a load brought to a device, without what became of its groups. `name` is the name given; may be empty."""
    return checkpoint_pb2.LoadResult(
        name=name,
        content_digest=outcome.content_digest,
        tensors=outcome.tensors,
        total_bytes=outcome.total_bytes,
        unique_bytes=outcome.unique_bytes,
        shared_bytes=outcome.total_bytes - outcome.unique_bytes,
        read_bytes=outcome.read_bytes,
        seconds=outcome.seconds,
        device=device,
        evicted=outcome.evicted,
        evicted_others=outcome.evicted_others,
    )
