"""Fixtures that several unit tests have: the client of a command, a daemon that answers as it is told, a leak check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import weightd
from support.answers import Answers
from support.descriptors import open_descriptors
from support.fake_client import FakeClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Answers]:
    """A daemon's end of the handle socket."""
    made = Answers(tmp_path)
    yield made
    made.close()


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    """Those of this process are the same afterwards."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClient:
    """The client of every command that the test runs."""
    client = FakeClient()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def connect(socket: str | None, *, read_only: bool = False) -> FakeClient:
        client.asked, client.read_only = socket, read_only
        unreachable = client.answers.get("connect")
        if unreachable is not None:
            raise unreachable
        return client

    monkeypatch.setattr(pytest.importorskip("weightd.cli.context"), "connect", connect)
    monkeypatch.setattr(weightd, "__version__", "1.2.3", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return client
