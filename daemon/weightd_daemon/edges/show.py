"""Times and users, as the services show them."""

from __future__ import annotations

import pwd
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp


def time_to(seconds: float) -> Timestamp:
    """Seconds since the epoch as a Timestamp."""
    stamp = Timestamp()
    stamp.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return stamp


def user_name(uid: int | None) -> str:
    """A user's name, or its number as text; "?" without an identity."""
    if uid is None:
        return "?"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
