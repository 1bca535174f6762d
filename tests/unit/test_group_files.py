"""Files of remembered groups: what is read back, what is refused, how many there are, and several processes at once."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.daemon import environment
from support.leash import leashed
from weightd import _group_files
from weightd._group_files import MAX_FILE_BYTES, MAX_FILES, UnusableFileError, add, read

KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "weightd" / "groups"
    assert not list(tmp_path.rglob(".*")), "a draft is left"


def test_what_was_added_is_read(folder: Path) -> None:
    assert read(KEY, 9) == []
    assert not _group_files.exist()
    assert not folder.exists(), "reading makes nothing"
    assert add(KEY, 9, [(3, 1), (0, 8, 2)]) == []
    assert read(KEY, 9) == [(3, 1), (0, 8, 2)]
    assert read(OTHER, 9) == []
    assert _group_files.exist()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / f"{KEY}.json").stat().st_mode) == 0o600


def test_what_is_new_goes_first_and_replaces_what_it_overlaps() -> None:
    add(KEY, 9, [(0, 1), (2, 3)])
    assert add(KEY, 9, [(1, 2), (5, 6)]) == [(0, 1), (2, 3)]
    assert read(KEY, 9) == [(1, 2), (5, 6)]
    assert add(KEY, 9, [(7, 8)]) == [(1, 2), (5, 6)]
    assert read(KEY, 9) == [(7, 8), (1, 2), (5, 6)]


def test_what_is_known_is_not_written_again(folder: Path) -> None:
    add(KEY, 9, [(0, 1), (2, 3)])
    before = (folder / f"{KEY}.json").stat().st_ino
    assert add(KEY, 9, [(2, 3)]) == [(0, 1), (2, 3)]
    assert add(KEY, 9, []) == [(0, 1), (2, 3)]
    assert (folder / f"{KEY}.json").stat().st_ino == before


groups = st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=5, unique=True), max_size=8)


@given(groups, groups)
def test_no_tensor_is_in_two_groups_and_no_new_one_is_lost_to_an_old_one(
    first: list[list[int]], second: list[list[int]]
) -> None:
    merged = _group_files._merged(second, _group_files._merged(first, []))
    every = [number for group in merged for number in group]
    assert len(every) == len(set(every))
    taken: set[int] = set()
    for group in second:
        if taken.isdisjoint(group):
            assert tuple(group) in merged
            taken.update(group)
    assert _group_files._merged(merged, merged) == merged


# -- damage and malice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is damaged"),
        (b'{"format":1,"groups":[[0,', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"format":1,"groups":[[' + b"9" * 5000 + b"]]}", "is damaged"),
        (b'{"format":1,"groups":[[0,9]]}', "is damaged"),
        (b'{"format":1,"groups":[[0,-1]]}', "is damaged"),
        (b'{"format":1,"groups":[[true,1]]}', "is damaged"),
        (b'{"format":1,"groups":[[0.0,1]]}', "is damaged"),
        (b'{"format":1,"groups":[{"0":1}]}', "is damaged"),
        (b'{"format":1,"groups":{"0":1}}', "is damaged"),
        (b'{"format":1}', "is damaged"),
        (b'{"format":2,"groups":[]}', "is of another format"),
        (b"[]", "is of another format"),
        (b'{"format":1,"groups":[]}' + b" " * MAX_FILE_BYTES, f"has more than {MAX_FILE_BYTES} bytes"),
    ],
    ids=range(15),
)
def test_a_damaged_file_is_none_and_replaced(folder: Path, content: bytes, why: str) -> None:
    add(KEY, 9, [(0, 1)])
    (folder / f"{KEY}.json").write_bytes(content)
    with pytest.raises(UnusableFileError, match=f"{KEY}.json {why}"):
        read(KEY, 9)
    assert add(KEY, 9, [(2, 3)]) == []
    assert read(KEY, 9) == [(2, 3)]


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_whatever_a_file_has_it_is_groups_or_refused(content: bytes | str) -> None:
    encoded = content if isinstance(content, bytes) else f'{{"format":1,"groups":{content}}}'.encode()
    try:
        found = _group_files._decoded(encoded, 9, "file")
    except UnusableFileError:
        return
    assert all(type(number) is int and 0 <= number < 9 for group in found for number in group)


def test_what_is_no_file_is_neither_read_nor_waited_for(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    place = folder / f"{KEY}.json"
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"format": 1, "groups": [[0, 1]]}))
    secret.chmod(0o600)
    place.symlink_to(secret)
    with pytest.raises(UnusableFileError, match="is no file"):
        read(KEY, 9)
    place.unlink()
    os.mkfifo(place, 0o600)
    with pytest.raises(UnusableFileError, match="is no file"):
        read(KEY, 9)
    assert add(KEY, 9, [(2, 3)]) == [], "it is replaced, and what a link names stays as it is"
    assert read(KEY, 9) == [(2, 3)]
    assert json.loads(secret.read_text())["groups"] == [[0, 1]]
    place.unlink()
    place.mkdir()
    with pytest.raises(UnusableFileError, match="is no file"):
        read(KEY, 9)
    with pytest.raises(IsADirectoryError):
        add(KEY, 9, [(2, 3)])


@pytest.mark.parametrize("mode", [0o660, 0o602])
def test_a_file_that_others_may_write_to_is_not_believed(folder: Path, mode: int) -> None:
    add(KEY, 9, [(0, 1)])
    (folder / f"{KEY}.json").chmod(mode)
    with pytest.raises(UnusableFileError, match=f"may be written to by others \\(mode {mode:04o}\\)"):
        read(KEY, 9)
    add(KEY, 9, [(2, 3)])
    assert read(KEY, 9) == [(2, 3)]


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path) -> None:
    add(KEY, 9, [(0, 1)])
    folder.chmod(0o777)
    for call in (lambda: read(KEY, 9), lambda: add(KEY, 9, [(2, 3)])):
        with pytest.raises(UnusableFileError, match="may be written to by others"):
            call()
    folder.chmod(0o755)
    assert read(KEY, 9) == [(0, 1)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("whose", ["file", "folder"])
def test_what_belongs_to_another_user_is_not_believed(folder: Path, whose: str) -> None:
    add(KEY, 9, [(0, 1)])
    os.chown(folder / f"{KEY}.json" if whose == "file" else folder, 12345, 12345)
    with pytest.raises(UnusableFileError, match="belongs to uid 12345"):
        read(KEY, 9)


def test_a_link_in_the_place_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        read(KEY, 9)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        add(KEY, 9, [(0, 1)])
    assert not list((tmp_path / "elsewhere").iterdir())


# -- where -------------------------------------------------------------------------------------------------------------


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert _group_files.folder() == Path("/home/ada/.cache/weightd/groups")
    monkeypatch.setenv("HOME", "~")
    with pytest.raises(UnusableFileError, match="there is no home folder"):
        _group_files.folder()
    assert not _group_files.exist()


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_a_file_holds_the_newest_as_far_as_they_fit() -> None:
    old = [(number, number + 1) for number in range(1_000_000, 1_100_000, 2)]
    add(KEY, 2_000_000, old)
    assert read(KEY, 2_000_000) == old
    new = [(number, number + 1) for number in range(500_000, 520_000, 2)]
    add(KEY, 2_000_000, new)
    found = read(KEY, 2_000_000)
    assert found[: len(new)] == new
    assert len(new) < len(found) < len(new) + len(old)
    assert MAX_FILE_BYTES - 20 < len(_group_files._encoded(found)) <= MAX_FILE_BYTES


def test_the_files_that_were_used_longest_ago_go(folder: Path) -> None:
    keys = [f"{number:064x}" for number in range(MAX_FILES)]
    for at, key in enumerate(keys):
        add(key, 9, [(0, 1)])
        os.utime(folder / f"{key}.json", ns=(at, at))
    os.utime(folder / f"{keys[0]}.json", ns=(0, 0))
    (folder / "README").touch()
    read(keys[0], 9)  # used now
    add(KEY, 9, [(0, 1)])
    assert {path.stem for path in folder.glob("*.json")} == {KEY, *keys} - {keys[1]}
    assert (folder / "README").exists(), "what is not ours stays"


def test_a_draft_of_a_killed_process_goes_in_the_end(folder: Path) -> None:
    add(KEY, 9, [(0, 1)])
    draft = folder / f".{KEY}.{'0' * 16}"
    draft.touch()
    os.utime(draft, ns=(0, 0))
    for number in range(MAX_FILES - 1):
        add(f"{number:064x}", 9, [(0, 1)])
    assert not draft.exists()


# -- several at once ---------------------------------------------------------------------------------------------------

ADD = """
import sys
from weightd import _group_files
key, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for number in range(first, first + count):
    _group_files.add(key, 9999, [(2 * number, 2 * number + 1)])
    for found in (_group_files.read(key, 9999),):
        assert (2 * number, 2 * number + 1) in found
"""


def test_several_processes_lose_nothing_and_see_whole_files_only() -> None:
    each = 20
    adding = [
        subprocess.Popen(
            leashed([sys.executable, "-c", ADD, KEY, str(number * each), str(each)]),
            env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    try:
        for process in adding:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    finally:
        for process in adding:
            process.kill()
    assert set(read(KEY, 9999)) == {(2 * number, 2 * number + 1) for number in range(4 * each)}


def test_a_lock_that_is_never_given_back_holds_nobody_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_group_files, "_LOCK_SECONDS", 0.05)
    add(KEY, 9, [(0, 1)])
    at = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(at, fcntl.LOCK_EX)
        add(KEY, 9, [(2, 3)])
    finally:
        os.close(at)
    assert read(KEY, 9) == [(2, 3), (0, 1)]


def test_a_failed_write_leaves_the_file_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(KEY, 9, [(0, 1)])

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            add(KEY, 9, [(2, 3)])
    assert read(KEY, 9) == [(0, 1)]
    assert len(list(folder.iterdir())) == 1
