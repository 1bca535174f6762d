"""What lists and figures cost grows with what there is, not faster."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest

from support.counting import operations
from support.filled import BLOBS, Filled
from weightd._proto.v1 import checkpoint_pb2
from weightd_daemon.api.checkpoint_service import CheckpointService
from weightd_daemon.monitoring.metrics import Metrics
from weightd_daemon.turns import LoopTurn


def finished(call: Coroutine[Any, Any, Any]) -> Any:
    """What a call returns that lets others have their turn now and then, and waits for nothing else."""
    while True:
        try:
            call.send(None)
        except StopIteration as ended:
            return ended.value


def test_a_list_shows_what_goes_while_it_is_made_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of many is made in turns, between which checkpoints go and loads are sealed."""
    parts: Any = Filled(3)
    monkeypatch.setattr(LoopTurn, "is_over", True)
    first = next(iter(parts.store.checkpoints.values()))
    call = CheckpointService(parts).List(checkpoint_pb2.ListCheckpointsRequest(), None)  # type: ignore[arg-type]  # no context
    call.send(None)
    parts.store.evict(first, "capacity")
    answer = finished(call)
    assert len(answer.checkpoints) == 2
    assert first.key.content_digest not in {row.content_digest for row in answer.checkpoints}


def cost(checkpoints: int, what: str) -> int:
    """Instructions of an answer."""
    parts: Any = Filled(checkpoints)
    service, metrics = CheckpointService(parts), Metrics(parts.statistics)

    def listed() -> None:
        answer = finished(service.List(checkpoint_pb2.ListCheckpointsRequest(), None))  # type: ignore[arg-type]  # no context
        assert len(answer.checkpoints) == checkpoints

    def counted() -> None:
        assert f'weightd_checkpoints{{state="resident"}} {checkpoints}.0\n' in metrics.page().decode()

    return operations({"ls": listed, "stats": lambda: parts.statistics.read(), "metrics": counted}[what])


@pytest.mark.parametrize("what", ["ls", "stats", "metrics"])
def test_cost_grows_with_what_there_is(what: str) -> None:
    few, many = cost(50, what), cost(400, what)
    assert many < 9 * few, "eight times as much costs eight times as much; 64 times, if each looks at all others"


def test_figures_are_per_device() -> None:
    parts: Any = Filled(9)
    books = parts.statistics.read()
    assert [device.live_bytes for device in books.devices] == [2 * BLOBS * 4096] + [BLOBS * 4096] * 7
    assert (books.blobs, books.resident_bytes, books.leases) == (9 * BLOBS, 9 * BLOBS * 4096, 9)
