"""What a read-only connection may ask: there is a decision for every frame and every call."""

from __future__ import annotations

import pytest

from weightd._proto.v1 import checkpoint_pb2, daemon_pb2, handles_pb2, inspection_pb2, lease_pb2
from weightd.errors import PermissionDeniedError
from weightd_daemon.handles.read_only import ALLOWED, WITHOUT_TOKEN, check_allowed

REFUSED = {
    *("attach", "ack", "offer", "detach", "reclaim"),
    *(f"/weightd.v1.CheckpointService/{call}" for call in ("Load", "Pin", "Unpin", "Remove", "Verify")),
    *(f"/weightd.v1.DaemonService/{call}" for call in ("Drain", "Undrain")),
}


def everything() -> set[str]:
    """Every frame of the handle socket, and every method of our services."""
    methods = {
        f"/{service.full_name}/{method.name}"
        for proto in (checkpoint_pb2, daemon_pb2, inspection_pb2, lease_pb2)
        for service in proto.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    return methods | {field.name for field in handles_pb2.HandleRequest.DESCRIPTOR.oneofs_by_name["body"].fields}


def test_everything_is_decided() -> None:
    assert everything() == ALLOWED | REFUSED, "decide whether what is new changes anything"
    assert not ALLOWED & REFUSED


def test_what_changes_anything_is_refused_by_name() -> None:
    for request in sorted(REFUSED):
        with pytest.raises(PermissionDeniedError, match=rf"^{request.rpartition('/')[2]} is refused: .*read-only"):
            check_allowed(request)


def test_what_is_not_known_is_refused() -> None:
    for request in ("/weightd.v1.CheckpointService/Lend", "/weightd.v2.DaemonService/GetStats", "", "lend"):
        with pytest.raises(PermissionDeniedError):
            check_allowed(request)


def test_what_needs_no_token_is_allowed_with_one() -> None:
    for request in (*ALLOWED, *(f"{begin}Anything" for begin in WITHOUT_TOKEN)):
        check_allowed(request)
