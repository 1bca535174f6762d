"""What a read-only connection may do: look, and nothing else.

The table lists what is allowed, so that a request or a call that is added is refused there until somebody has decided
that it changes nothing. `tests/unit/test_read_only.py` has a decision for each.
"""

from __future__ import annotations

from weightd.errors import PermissionDeniedError

ALLOWED = frozenset({
    "hello",
    "/weightd.v1.CheckpointService/List",
    "/weightd.v1.CheckpointService/Get",
    "/weightd.v1.LeaseService/List",
    "/weightd.v1.DaemonService/GetVersion",
    "/weightd.v1.DaemonService/GetStats",
    "/weightd.v1.DaemonService/WatchEvents",
    "/weightd.v1.InspectionService/GetMap",
    "/weightd.v1.InspectionService/ListSharing",
    "/weightd.v1.InspectionService/ListTensors",
    "/weightd.v1.InspectionService/ListLoads",
    "/weightd.v1.InspectionService/GetSettings",
    "/weightd.v1.InspectionService/CheckBooks",
})  # fmt: skip
"""Frames of the handle socket, and gRPC methods: none changes anything, lends memory, or has the daemon read it."""

WITHOUT_TOKEN = ("/weightd.v1.DaemonService/GetVersion", "/grpc.health.", "/grpc.reflection.")
"""How methods begin that are answered without a token, and so with any."""


def check_allowed(request: str) -> None:
    """Refuse what a read-only connection may not ask: a frame, or a gRPC method. Errors: PermissionDeniedError."""
    if request not in ALLOWED and not request.startswith(WITHOUT_TOKEN):
        called = request.rpartition("/")[2]
        raise PermissionDeniedError(f"{called} is refused: this connection is read-only; connect without read_only")
