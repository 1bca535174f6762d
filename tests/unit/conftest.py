"""Fixtures for tests of the `weightd` command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import weightd
from support.fake_client import FakeClient

if TYPE_CHECKING:
    from pathlib import Path


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
