"""The command `top` without what it needs: the extra, a terminal, a daemon."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import pytest

from support.fake_client import Terminal
from weightd.cli import main
from weightd.errors import DaemonUnreachableError

if TYPE_CHECKING:
    from support.fake_client import FakeClient

top = pytest.importorskip("weightd.cli.watching")


def be_terminal(monkeypatch: pytest.MonkeyPatch, kind: str = "xterm-256color") -> None:
    """Play a terminal. Not as a fixture: pytest puts streams of its own there between setup and test."""
    monkeypatch.setenv("TERM", kind)
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, Terminal())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    be_terminal(monkeypatch)
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "textual" else find(name))
    assert main(["top"]) == 1
    said = "weightd: top needs textual, which is not installed: pip install '.[top]' in weightd's checkout\n"
    assert capsys.readouterr().err == said
    assert main(["top", "--help"]) == 0


def test_without_a_terminal_other_commands_are_named(
    fake: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top"]) == 1
    assert "top needs a terminal that can move its cursor; use `weightd stats`" in capsys.readouterr().err


@pytest.mark.parametrize("term", ["dumb", "", "unknown"])
def test_a_dumb_terminal_is_refused(
    term: str, fake: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_terminal(monkeypatch, term)
    assert main(["top"]) == 1
    assert "can move its cursor" in capsys.readouterr().err


def test_without_a_daemon_it_ends_as_other_commands_do(
    fake: FakeClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    be_terminal(monkeypatch)
    fake.answers["connect"] = DaemonUnreachableError("no daemon")
    assert main(["top"]) == 69
    assert capsys.readouterr().err == "weightd: no daemon\n"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"LANG": "de_DE.UTF-8"}, True),
        ({"LC_ALL": "C", "LANG": "de_DE.UTF-8"}, False),
        ({"LC_ALL": "C.utf8"}, True),
        ({"LANG": "C"}, False),
        ({}, False),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, False),
        ({"LC_ALL": "C.UTF-8", "LC_CTYPE": "C.UTF-8"}, True),
        ({"LANG": "en_US.ISO-8859-1"}, False),
        ({"LANG": "en_US.UTF-8", "TERM": "linux"}, False),
    ],
)
def test_the_locale_and_the_terminal_decide_on_glyphs(
    said: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert top._has_unicode() is expected
