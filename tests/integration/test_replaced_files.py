"""Files that are replaced by rename while they are loaded: nobody wrote to them, so what stands there now is taken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import weightd
import weightd.client
from support import checkpoints
from support.content import content
from support.daemon import Daemon
from weightd._transport.handle_socket import feed

MIB = 1 << 20


def two(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of 3 MiB, and another that is to take its place."""
    old, new = (checkpoints.write_random(folder / f"{name}.safetensors", 3, MIB, seed=name) for name in ("old", "new"))
    return old, new


def on_feed(monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> list[int]:
    """Take a step once, when files are opened and the loader has none yet. Returns how many were fed, each time."""
    fed: list[int] = []

    def feeding(intake: object, fds: tuple[int, ...], seconds: float) -> None:
        fed.append(len(fds))
        if len(fed) == 1:
            before()
        feed(intake, fds, seconds)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(weightd.client, "feed", feeding)
    return fed


@pytest.mark.parametrize("call", ["load", "attach"])
def test_a_file_that_is_replaced_is_opened_once_more(
    call: str, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = daemon.connect()
    old, new = two(tmp_path)
    fed = on_feed(monkeypatch, lambda: os.rename(new, old))
    if call == "load":
        client.load(old)
    with client.attach(old) as attachment:
        assert [content(attachment, f"t{i}") for i in range(3)] == [
            checkpoints.random_bytes(("new", i), MIB) for i in range(3)
        ]
    assert fed[:2] == [1, 1]


def test_one_that_is_replaced_again_and_again_is_an_error(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = daemon.connect()
    old, _ = two(tmp_path)

    def feeding(intake: object, fds: tuple[int, ...], seconds: float) -> None:
        other = checkpoints.write_random(tmp_path / "next.safetensors", 3, MIB, seed=os.urandom(4).hex())
        os.rename(other, old)
        feed(intake, fds, seconds)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(weightd.client, "feed", feeding)
    with pytest.raises(weightd.InvalidReferenceError, match="is not the file that was announced"):
        client.load(old)


def test_one_that_is_written_to_is_an_error(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = daemon.connect()
    old, _ = two(tmp_path)

    def touch() -> None:
        os.utime(old, (1, 1))

    fed = on_feed(monkeypatch, touch)
    with pytest.raises(weightd.InvalidReferenceError, match="is not the file that was announced"):
        client.load(old)
    assert fed == [1]
