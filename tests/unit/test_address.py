"""Where the daemon listens and clients look, and what in /tmp is not trusted."""

from __future__ import annotations

import os
import socket as sockets
from pathlib import Path

import pytest

from weightd._transport import address
from weightd._transport.address import (
    candidates,
    check_path,
    check_peer,
    find_socket,
    grpc_target,
    handles_path,
    serving_socket,
)
from weightd.errors import InvalidReferenceError, PermissionDeniedError

UID = os.geteuid()


class Places:
    """The folders of the rule, below one that the test owns."""

    def __init__(self, root: Path) -> None:
        self.system = root / "run" / "weightd" / "weightd.sock"
        self.runtime = root / "run" / "user" / str(UID)
        self.session = self.runtime / "weightd" / "weightd.sock"
        self.folder = root / "tmp" / f"weightd-{UID}"
        self.own = self.folder / "weightd.sock"
        for folder in (self.system.parent.parent, self.runtime.parent, self.folder.parent):
            folder.mkdir(exist_ok=True)
        self.folder.parent.chmod(0o1777)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    found = Places(tmp_path)
    for name, value in (
        ("SYSTEM_SOCKET", found.system), ("RUNTIME_FOLDERS", found.runtime.parent), ("TEMPORARY", found.folder.parent),
    ):  # fmt: skip
        monkeypatch.setattr(address, name, value)
    for name in ("XDG_RUNTIME_DIR", "WEIGHTD_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    return found


def touch(path: Path) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch()
    return path


def test_what_is_given_is_the_only_one(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(places.system)
    assert find_socket("/given") == Path("/given")
    monkeypatch.setenv("WEIGHTD_SOCKET", "/set")
    assert candidates() == [find_socket()] == [Path("/set")]


def test_with_a_runtime_folder_it_is_that_or_the_systems(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(places.runtime))
    touch(places.own)
    assert candidates() == [places.session, places.system]
    assert serving_socket() == find_socket() == places.session
    touch(places.system)
    assert find_socket() == places.system
    touch(places.session)
    assert find_socket() == places.session


def test_without_one_it_is_the_systems_where_that_can_be_made(places: Places) -> None:
    assert serving_socket() == find_socket() == places.system
    places.system.parent.mkdir()
    assert serving_socket() == places.system


@pytest.mark.parametrize("session", ["there", "missing", "open to others", "a link"])
def test_without_either_it_is_the_users_own(places: Places, session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in place of the system's folder stands for one that may not be written, which root always may."""
    places.system.parent.write_text("")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != places.system.parent)
    if session == "a link":
        (places.folder.parent / "elsewhere").mkdir(mode=0o700)
        places.runtime.symlink_to(places.folder.parent / "elsewhere")
    elif session != "missing":
        places.runtime.mkdir(mode=0o700)
        places.runtime.chmod(0o700 if session == "there" else 0o750)
    expected = places.session if session == "there" else places.own
    assert serving_socket() == find_socket() == expected
    touch(places.own)
    assert find_socket() == places.own  # of a daemon that was started before the session began


def test_the_systems_daemon_comes_before_the_users_own(places: Places) -> None:
    touch(places.own)
    touch(places.system)
    assert find_socket() == places.system


@pytest.mark.skipif(UID == 0, reason="root may look everywhere")
def test_a_folder_that_hides_its_socket_is_named_unless_another_is_there(places: Places) -> None:
    touch(places.system)
    places.system.parent.chmod(0)
    try:
        assert find_socket() == places.system
        touch(places.own)
        assert find_socket() == places.own
    finally:
        places.system.parent.chmod(0o700)


def squat(places: Places, how: str) -> str:
    """Put what is not ours alone in the place of the user's folder. Returns what is said of it."""
    folder = places.folder
    if how == "link":
        (folder.parent / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(folder.parent / "elsewhere")
        return "is a symlink"
    if how == "file":
        folder.write_text("")
        return "is no folder"
    folder.mkdir(mode=0o700)
    if how == "parent":
        folder.parent.chmod(0o777)
        return "lies where others may rename it"
    if how == "owner":
        os.chown(folder, 54321, 54321)
        return "belongs to uid 54321"
    folder.chmod(int(how, 8))
    return f"lets others in \\(mode {how}\\)"


@pytest.mark.parametrize("how", ["link", "file", "parent", "owner", "0750", "0701", "0722"])
def test_a_squatted_folder_is_refused(places: Places, how: str) -> None:
    if how == "owner" and UID != 0:
        pytest.skip("only root can give a folder away")
    problem = squat(places, how)
    with pytest.raises(
        PermissionDeniedError, match=f"{places.folder}: {problem}, so a socket in it may be anybody's; "
    ):
        find_socket()
    with pytest.raises(PermissionDeniedError, match=problem):
        find_socket(places.own)
    assert find_socket(places.folder.parent / "other.sock") == places.folder.parent / "other.sock"


def test_a_peer_at_the_users_own_address_must_be_the_user(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    with ours, theirs:
        check_peer(ours, places.own)
        own = places.own
        monkeypatch.setattr(os, "geteuid", lambda: UID + 1)
        check_peer(ours, own)  # it is another user's address now, and was given
        with pytest.raises(PermissionDeniedError, match=f"who listens there is uid {UID}, and not you"):
            check_peer(ours, own.parent.with_name(f"weightd-{UID + 1}") / own.name)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/run/weightd/weightd.sock", "unix:/run/weightd/weightd.sock"),
        ("w.sock", "unix:w.sock"),
        ("/a%41/b#c?d e", "unix:/a%2541/b%23c%3Fd%20e"),
        ("//two/slashes", "unix:/two/slashes"),
        (os.fsdecode(b"/\xff"), "unix:/%FF"),
    ],
)
def test_grpc_is_told_the_path_as_it_decodes_it(path: str, target: str) -> None:
    assert grpc_target(Path(path)) == target


def test_a_comma_cannot_be_said() -> None:
    with pytest.raises(InvalidReferenceError, match=r"socket /a,b: has a comma, .*; choose another path"):
        check_path(Path("/a,b"))
    with pytest.raises(InvalidReferenceError, match="has a comma"):
        find_socket("/a,b")


@pytest.mark.parametrize("path", ["/", ".", "//"])
def test_a_path_that_names_no_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for give in (lambda: check_path(Path(path)), lambda: find_socket(path)):
        with pytest.raises(InvalidReferenceError, match=r"socket (/|\.|//): names no file; give the path of a socket"):
            give()
    monkeypatch.setenv("WEIGHTD_SOCKET", path)
    with pytest.raises(InvalidReferenceError, match="names no file"):
        find_socket()


def test_the_handle_socket_lies_beside() -> None:
    assert handles_path(Path("/run/w.sock")) == Path("/run/w.sock.handles")
