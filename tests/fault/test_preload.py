"""Preloads of what is hostile: files outside of model_roots, malformed ones, pipes, and those that vanish or hang."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support import checkpoints, malformed
from support.daemon import Daemon, eventually
from support.descriptors import open_descriptors
from weightd.errors import InvalidReferenceError, NotFoundError, PermissionDeniedError
from weightd_daemon.operations import model_roots
from weightd_daemon.operations.model_roots import on_thread, open_below

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return checkpoints.write_random(tmp_path / "outside" / "model.safetensors", 2, MIB)


def test_nothing_outside_of_the_roots_is_loaded(start_daemon: StartDaemon, root: Path, outside: Path) -> None:
    (root / "link.safetensors").symlink_to(outside)
    (root / "folder").mkdir()
    (root / "folder" / "model.safetensors").symlink_to(outside)
    (root / "linked").symlink_to(outside.parent)
    tries = [
        outside, outside.parent, root / "link.safetensors", root / "folder", root / "linked",
        root / "linked" / "model.safetensors", f"{root}/../outside", f"{root}-not/x",
    ]  # fmt: skip
    daemon = start_daemon(model_roots=root, preload=",".join(map(str, tries)))
    eventually(lambda: daemon.logged().count("preload of ") == len(tries))
    refused = re.findall(r"preload of (\S+) failed: .* lies below none of model_roots \(", daemon.logged())
    assert set(refused) == {str(path) for path in tries}
    client = daemon.connect()
    assert client.checkpoints() == []
    daemon.command("load", outside)  # a client opens its files itself, wherever they are


def test_a_symlink_that_is_turned_after_it_was_looked_at(
    root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = checkpoints.write_random(root / "a.safetensors", 2, MIB)
    link = root / "link.safetensors"
    link.symlink_to(inside)
    open_below(str(link), [str(root)]).files.close()

    def turned(*arguments: object) -> object:
        link.unlink()
        link.symlink_to(outside)
        return opening(*arguments)  # type: ignore[arg-type]  # passed through

    opening = model_roots.open_sources
    monkeypatch.setattr(model_roots, "open_sources", turned)
    before = open_descriptors()
    with pytest.raises(PermissionDeniedError, match="lies below none of model_roots"):
        open_below(str(link), [str(root)])
    assert open_descriptors() == before


def test_what_lies_outside_is_not_even_opened(root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "link.safetensors").symlink_to(outside)
    monkeypatch.setattr(model_roots, "open_sources", lambda _: pytest.fail("opened"))
    with pytest.raises(PermissionDeniedError, match=r"link\.safetensors is .*/outside/model\.safetensors, which lies"):
        open_below(str(root / "link.safetensors"), [str(root)])


def test_a_root_may_itself_be_a_symlink_or_the_whole_system(root: Path, tmp_path: Path) -> None:
    inside = checkpoints.write_random(root / "a.safetensors", 1, 1000)
    (tmp_path / "alias").symlink_to(root)
    for roots, reference in (
        ([str(tmp_path / "alias")], inside),
        ([str(root)], tmp_path / "alias" / "a.safetensors"),
        (["/nonexistent", "/"], inside),
    ):
        with open_below(str(reference), roots).files as files:
            assert len(files.fds) == 1
    with pytest.raises(PermissionDeniedError):
        open_below(str(inside), [])


def test_no_checkpoint_has_so_many_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 4):
        checkpoints.write_random(root / f"model-{number}-of-3.safetensors", 1, 100)
    monkeypatch.setattr(model_roots, "MAX_SOURCES", 2)
    with pytest.raises(InvalidReferenceError, match="has 3 files; a checkpoint may have 2"):
        open_below(str(root), [str(root)])


def test_hostile_files_fail_alone(start_daemon: StartDaemon, root: Path) -> None:
    os.mkfifo(root / "pipe.safetensors")
    (root / "piped").mkdir()
    os.mkfifo(root / "piped" / "model.safetensors")
    (root / "bad.safetensors").write_bytes(malformed.CORPUS["overlap"][0])
    (root / "device.safetensors").symlink_to("/dev/zero")
    (root / "loop.safetensors").symlink_to("loop.safetensors")
    names = ["pipe.safetensors", "piped", "bad.safetensors", "device.safetensors", "loop.safetensors"]
    good = checkpoints.write_random(root / "good.safetensors", 2, MIB)
    daemon = start_daemon(model_roots=root, preload=",".join([*(str(root / name) for name in names), str(good)]))
    client = daemon.connect()
    eventually(lambda: daemon.logged().count("preload of ") == len(names))
    eventually(lambda: [c.state for c in client.checkpoints()] == ["resident"], what="the good one is resident")
    assert [c.name for c in client.checkpoints()] == [str(good)]
    failures = dict(re.findall(r"preload of \S+/(\S+) failed: (.*)", daemon.logged()))
    assert set(failures) == set(names)
    for name in ("pipe.safetensors", "piped"):
        assert "not a regular file" in failures[name]
    assert "is /dev/zero, which lies below none of model_roots" in failures["device.safetensors"]
    assert "overlap" in failures["bad.safetensors"]
    assert "symbolic links" in failures["loop.safetensors"]


def test_a_file_that_vanishes_between_the_look_and_the_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.write_random(root / "a.safetensors", 1, 1000)

    def vanishing(*arguments: object) -> object:
        path.unlink()
        return opening(*arguments)  # type: ignore[arg-type]  # passed through

    opening = model_roots.open_sources
    monkeypatch.setattr(model_roots, "open_sources", vanishing)
    with pytest.raises(NotFoundError, match="no such file"):
        open_below(str(path), [str(root)])


def test_a_call_that_hangs_holds_up_neither_the_loop_nor_its_end() -> None:
    """What a FUSE file may do to `open`: the daemon's loop turns, and ends while the call still hangs."""
    released = threading.Event()

    async def test() -> str:
        hanging = asyncio.create_task(on_thread(released.wait))
        answer = await on_thread(lambda: "answered")
        assert not hanging.done()
        hanging.cancel()
        return answer

    try:
        assert asyncio.run(test()) == "answered"
        (thread,) = [t for t in threading.enumerate() if t.name == "weightd-files"]
        assert thread.daemon
    finally:
        released.set()
    thread.join(60)
    assert not thread.is_alive()
