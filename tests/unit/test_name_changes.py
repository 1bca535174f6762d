"""Following a name: what is told once, what is told again, and which errors end it."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from weightd import _name_changes
from weightd._name_changes import name_changes
from weightd.errors import DaemonUnreachableError, EventsLostError, InUseError, InvalidReferenceError, LeaseLostError
from weightd.types import NameInfo


def meant(digest: str, state: str = "resident") -> NameInfo:
    return NameInfo("prod", digest, state, 0, "root", is_default=False)


class Streams:
    """A gRPC client of which each stream of changes ends with an error."""

    def __init__(self, *streams: tuple[list[NameInfo | None], Exception]) -> None:
        self.streams = list(streams)
        self.connected = 0

    def connect(self) -> Any:
        self.connected += 1
        return self

    def name_changes(self, name: str) -> Generator[NameInfo | None, None, None]:
        assert name == "prod"
        changes, error = self.streams.pop(0)
        yield from changes
        raise error


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_name_changes, "_AGAIN_SECONDS", 0)


def test_only_what_has_changed_is_told_also_from_one_stream_to_the_next() -> None:
    streams = Streams(
        ([None, meant("a"), meant("a")], DaemonUnreachableError("it restarts")),
        ([meant("a")], EventsLostError("too slow")),
        ([meant("a", "evicted"), meant("a"), None, None], LeaseLostError("it stops")),
        ([meant("b")], InUseError("64 readers")),
    )
    changes = name_changes(streams.connect, "prod")
    for expected in [meant("a"), meant("a", "evicted"), meant("a"), None, meant("b")]:
        assert next(changes) == expected
    with pytest.raises(InUseError):
        next(changes)
    assert streams.connected == 4


def test_a_client_that_is_closed_ends_it() -> None:
    streams = Streams(([meant("a")], LeaseLostError("the client was closed")))
    rpcs = [streams.connect()]

    def connect() -> Any:
        if not rpcs:
            raise InvalidReferenceError("this weightd client is closed")
        return rpcs.pop()

    changes = name_changes(connect, "prod")
    assert next(changes) == meant("a")
    with pytest.raises(InvalidReferenceError, match="closed"):
        next(changes)
