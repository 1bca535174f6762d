"""The command `web` before it serves: what it needs, and how it opens a browser."""

from __future__ import annotations

import importlib.util
import webbrowser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.fake_client import FakeClient
from weightd.cli import main

browsing = pytest.importorskip("weightd.cli.browsing")


def test_without_aiohttp_it_names_the_extra(
    fake: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["web"]) == 1
    assert "pip install '.[web]'" in capsys.readouterr().err
    assert fake.calls == []


@pytest.mark.parametrize(
    ("arguments", "variables", "opens"),
    [
        ([], {}, False),
        ([], {"DISPLAY": ":0"}, False),  # no terminal
        (["--open"], {}, True),
        (["--no-open"], {"DISPLAY": ":0"}, False),
    ],
)
def test_it_opens_a_browser_where_that_is_wanted(
    fake: FakeClient,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    variables: dict[str, str],
    opens: bool,
) -> None:
    asked: list[tuple[int, bool]] = []

    async def serve(client: object, port: int, browser: bool) -> None:
        asked.append((port, browser))

    monkeypatch.setattr(browsing, "_serve", serve)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert main(["web", "--port", "8080", *arguments]) == 0
    assert asked == [(8080, opens)]


def test_the_address_reaches_the_browser_in_a_private_file(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    with browsing._opened('http://127.0.0.1:1/#token="&'):
        (address,) = opened
        file = Path(urlsplit(address).path)
        assert "token" not in address
        assert file.parent.stat().st_mode & 0o77 == 0
        assert '"0;url=http://127.0.0.1:1/#token=&quot;&amp;"' in file.read_text()
    assert not file.exists()
