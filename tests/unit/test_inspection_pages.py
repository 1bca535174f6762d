"""Pages: how the daemon reads tokens, and how the client collects what comes page by page."""

from __future__ import annotations

import base64
from typing import Any, cast

import pytest

from weightd._proto.v1 import inspection_pb2
from weightd._transport.inspection_rpc import InspectionRpc
from weightd.errors import InvalidReferenceError
from weightd.inspection import BlobUsers, MapExtent, MapSegment
from weightd_daemon.inspection.pages import MAX_ROWS, position_of, rows_of, token_of

FIRST = (0, "")


def test_rows_of_a_page() -> None:
    assert [rows_of(0), rows_of(1), rows_of(MAX_ROWS)] == [MAX_ROWS, 1, MAX_ROWS]
    for wrong in (-1, MAX_ROWS + 1):
        with pytest.raises(InvalidReferenceError, match=f"page_size {wrong}"):
            rows_of(wrong)


def test_a_token_leads_back_to_its_position() -> None:
    for position in [(7, "sha256:ab"), (0, ""), ((1 << 63) - 1, "ü\n\0")]:
        assert position_of(token_of("GetMap", position), "GetMap", FIRST) == position
    assert position_of("", "GetMap", FIRST) == FIRST


@pytest.mark.parametrize(
    "token",
    [
        "x",
        "ü",
        "====",
        token_of("ListTensors", (1, "a")),
        token_of("GetMap", (1,)),
        token_of("GetMap", (1, "a", 2)),
        token_of("GetMap", ("1", "a")),
        token_of("GetMap", (-1, "a")),
        token_of("GetMap", (1 << 63, "a")),
        token_of("GetMap", (True, "a")),
        token_of("GetMap", (1, "a" * 1024)),
        token_of("GetMap", (1, "\ud800")),  # no error could be told of it, for it cannot be encoded
        *(base64.urlsafe_b64encode(raw).decode() for raw in (b"\xff", b"{}", b"7", b"[" * 700, b'["GetMap",1e3,"a"]')),
    ],
)
def test_a_token_that_nobody_gave_is_refused(token: str) -> None:
    with pytest.raises(InvalidReferenceError, match="page_token"):
        position_of(token, "GetMap", FIRST)


class _Daemon:
    """Answers GetMap in two pages, the second of them with the revisions that it is given, one an attempt."""

    def __init__(self, *revisions: int) -> None:
        self.revisions = list(revisions)
        self.asked: list[str] = []

    def GetMap(self, request: inspection_pb2.GetMapRequest) -> inspection_pb2.GetMapResponse:  # noqa: N802  # the wire's
        self.asked.append(request.page_token)
        names = [inspection_pb2.CheckpointName(content_digest="b", name="B")]
        first = not request.page_token
        if not first:
            names.insert(0, inspection_pb2.CheckpointName(content_digest="a"))
        kind = inspection_pb2.MapExtent.KIND_BLOBS if first else inspection_pb2.MapExtent.KIND_HOLE
        return inspection_pb2.GetMapResponse(
            device="host",
            revision=1 if first else self.revisions.pop(0),
            segments=[inspection_pb2.MapSegment(segment=4, size_bytes=30)],
            extents=[inspection_pb2.MapExtent(segment=4, offset=0 if first else 10, length=10, kind=kind)],
            users=[inspection_pb2.BlobUsers(checkpoints=[0], others=2)],
            checkpoints=names,
            next_page_token="more" if first else "",
        )


def collect(daemon: _Daemon) -> Any:
    return InspectionRpc(cast("Any", daemon), lambda method, request: method(request)).device_map("host")


def test_pages_of_a_map_are_put_together() -> None:
    found = collect(_Daemon(1))
    assert found.segments == (MapSegment(4, 30),)
    assert found.extents == (
        MapExtent(4, 0, 10, "blobs", users=BlobUsers(("b",), 2)),
        MapExtent(4, 10, 10, "hole"),
    )
    assert found.names == {"a": "", "b": "B"}
    assert found.revision == 1


def test_a_map_that_changes_meanwhile_is_asked_for_anew() -> None:
    daemon = _Daemon(2, 1)
    assert collect(daemon).revision == 1
    assert daemon.asked == ["", "more"] * 2
    daemon = _Daemon(2, 2, 2)
    assert collect(daemon).revision is None
    assert daemon.asked == ["", "more"] * 3
