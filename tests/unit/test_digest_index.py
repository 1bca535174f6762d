"""The digest index: what it remembers, for how long, and what it survives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sqlite3
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.memory import allocated
from weightd.types import FileIdentity
from weightd_daemon.loads.instances import LoadedInstance
from weightd_daemon.persistence import digest_index
from weightd_daemon.persistence.digest_index import FILE_NAME, PersistentDigestIndex, known_digests

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FILE = FileIdentity(device=2049, inode=77, size=4096, mtime_ns=10**18, ctime_ns=10**18 + 5)
INSTANCES = [
    LoadedInstance(8, 1024, b"a" * 16, 0, 12),
    LoadedInstance(1032, (1 << 63) + 1, b"\0" * 16, 3, (1 << 64) - 1),
]


def using(folder: Path, steps: Callable[[PersistentDigestIndex], Awaitable[None]], epoch: str | None = "now") -> None:
    """Open an index, take the steps, close it."""

    async def run() -> None:
        index = PersistentDigestIndex(folder, epoch)
        try:
            await steps(index)
        finally:
            await index.close()

    asyncio.run(run())


async def known(index: PersistentDigestIndex, identity: FileIdentity) -> list[LoadedInstance]:
    return (await index.get([identity])).get(identity, [])


async def remember(index: PersistentDigestIndex) -> None:
    await index.put({FILE: INSTANCES})


async def is_known(index: PersistentDigestIndex) -> None:
    assert await known(index, FILE) == INSTANCES


async def is_unknown(index: PersistentDigestIndex) -> None:
    assert await known(index, FILE) == []


def test_what_was_put_is_got_also_by_another_connection_of_the_epoch(tmp_path: Path) -> None:
    using(tmp_path, is_unknown)
    using(tmp_path, remember)
    using(tmp_path, is_known)


@pytest.mark.parametrize("field", FileIdentity._fields)
def test_a_file_that_differs_in_anything_is_another(tmp_path: Path, field: str) -> None:
    async def steps(index: PersistentDigestIndex) -> None:
        await remember(index)
        assert await known(index, FILE._replace(**{field: getattr(FILE, field) + 1})) == []
        await is_known(index)

    using(tmp_path, steps)


def test_numbers_of_64_bits_without_sign_are_kept(tmp_path: Path) -> None:
    huge = FILE._replace(device=(1 << 64) - 1, inode=1 << 63)

    async def steps(index: PersistentDigestIndex) -> None:
        await index.put({huge: INSTANCES})
        assert await known(index, huge) == INSTANCES

    using(tmp_path, steps)


def test_the_last_word_counts(tmp_path: Path) -> None:
    async def steps(index: PersistentDigestIndex) -> None:
        await remember(index)
        await index.put({FILE: INSTANCES[:1]})
        assert await known(index, FILE) == INSTANCES[:1]

    using(tmp_path, steps)


def test_another_life_of_the_daemon_knows_nothing(tmp_path: Path) -> None:
    """Blob numbers begin anew, so what they meant before must not be believed."""
    using(tmp_path, remember, epoch=None)
    using(tmp_path, is_unknown, epoch=None)
    using(tmp_path, is_unknown, epoch="other")


@pytest.mark.parametrize("damage", [b"not a database at all, " * 100, b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_damaged_index_is_renamed_and_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    (tmp_path / FILE_NAME).write_bytes(damage)

    async def steps(index: PersistentDigestIndex) -> None:
        await is_unknown(index)
        await remember(index)
        await is_known(index)

    using(tmp_path, steps)
    assert (tmp_path / f"{FILE_NAME}.damaged").read_bytes() == damage
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "damaged" in caplog.text


def test_an_index_of_a_strange_shape_is_renamed_and_begun_anew(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("CREATE TABLE files (something TEXT)")
    database.close()
    using(tmp_path, is_unknown)
    assert (tmp_path / f"{FILE_NAME}.damaged").exists()
    using(tmp_path, remember)
    using(tmp_path, is_known)


def test_a_row_that_is_damaged_is_no_row(tmp_path: Path) -> None:
    using(tmp_path, remember)
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("UPDATE files SET instances = x'0102'")
    database.close()
    using(tmp_path, is_unknown)


def test_a_folder_that_cannot_be_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")

    async def steps(index: PersistentDigestIndex) -> None:
        await remember(index)
        await is_unknown(index)

    using(tmp_path / "file" / "state", steps)
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert (tmp_path / "file").read_bytes() == b""


def test_one_line_at_the_start_and_one_for_each_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """However many files there are; it is tried again each time, and a figure counts the failures."""
    caplog.set_level(logging.INFO)
    folder = tmp_path / "state"
    folder.write_bytes(b"")

    async def steps(index: PersistentDigestIndex) -> None:
        index.begin()
        for _ in range(5):
            await remember(index)
            await is_unknown(index)
        assert (index.problem, index.failures) == ("File exists", 10)
        folder.unlink()
        await is_unknown(index)  # that it can be read is not enough
        assert index.problem == "File exists"
        await remember(index)
        await is_known(index)
        assert (index.problem, index.failures) == ("", 10)

    using(folder, steps)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"digest index {folder}/{FILE_NAME} cannot be used: File exists; loads go on, and read more"),
        ("INFO", f"digest index {folder}/{FILE_NAME} can be used again"),
    ]


def test_each_file_that_is_not_remembered_counts_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    async def steps(index: PersistentDigestIndex) -> None:
        for _ in range(200):  # now and then, old files are forgotten, too
            await remember(index)
        assert index.failures == 200

    using(tmp_path / "file", steps)


def test_one_that_fails_is_asked_for_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try may take seconds, and who stops the daemon, or begins another load, waits for all of them."""
    tries: list[str] = []
    execute = PersistentDigestIndex._execute

    def counted(self: PersistentDigestIndex, statement: str, *arguments: Any, **options: Any) -> Any:
        tries.append(statement)
        return execute(self, statement, *arguments, **options)

    async def steps(index: PersistentDigestIndex) -> None:
        assert await index.get([FILE._replace(inode=inode) for inode in range(200)]) == {}
        assert (len(tries), index.failures) == (1, 200)

    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(PersistentDigestIndex, "_execute", counted)
    using(tmp_path / "file", steps)


def test_one_that_can_only_be_read_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    using(tmp_path, remember)

    async def steps(index: PersistentDigestIndex) -> None:
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda path, **more: connect(f"file:{path}?mode=ro", uri=True, **more))
        index.begin()
        await is_known(index)
        assert index.problem == "attempt to write a readonly database"

    using(tmp_path, steps)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    using(tmp_path / "state", remember)
    assert stat.S_IMODE(os.stat(tmp_path / "state" / FILE_NAME).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(tmp_path / "state").st_mode) == 0o700


def test_the_files_of_a_load_are_put_in_one_transaction(tmp_path: Path) -> None:
    files = [FILE._replace(inode=inode) for inode in range(300)]

    def changes() -> int:
        """How often sqlite has changed the file, by its own count (https://sqlite.org/fileformat2.html, 1.3.7)."""
        return int.from_bytes((tmp_path / FILE_NAME).read_bytes()[24:28])

    async def steps(index: PersistentDigestIndex) -> None:
        await remember(index)
        before = changes()
        await index.put(dict.fromkeys(files, INSTANCES))
        assert changes() == before + 1
        assert await index.get([FILE, *files, FILE._replace(inode=300)]) == dict.fromkeys([FILE, *files], INSTANCES)

    using(tmp_path, steps)


def test_old_files_are_forgotten_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_index, "_MAX_FILES", 30)

    async def steps(index: PersistentDigestIndex) -> None:
        for inode in range(100):
            await index.put({FILE._replace(inode=inode): INSTANCES[:1]})

    using(tmp_path, steps)
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        assert database.execute("SELECT count(*) FROM files").fetchone() == (30,)
    database.close()


def test_its_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """Python's own objects are not counted: they are too small for malloc."""

    async def steps(index: PersistentDigestIndex) -> None:
        async def remember_many(files: range) -> int:
            for inode in files:
                await index.put({FILE._replace(inode=inode): INSTANCES * 10})
            return allocated()

        settled = await remember_many(range(500))
        assert await remember_many(range(500, 2000)) < settled + (200 << 10)

    using(tmp_path, steps)


def test_which_files_are_old_is_no_matter_of_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may have times of a clock that was ahead, as a daemon before this one wrote them."""
    monkeypatch.setattr(digest_index, "_MAX_FILES", 30)

    async def put(index: PersistentDigestIndex, inodes: range) -> None:
        for inode in inodes:
            await index.put({FILE._replace(inode=inode): INSTANCES[:1]})

    using(tmp_path, lambda index: put(index, range(30)))
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute("UPDATE files SET used = 99999999999")
    database.close()
    using(tmp_path, lambda index: put(index, range(100, 200)))
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        assert [inode for (inode,) in database.execute("SELECT inode FROM files ORDER BY inode")] == [*range(170, 200)]
    database.close()


# -- read beside the daemon ------------------------------------------------------------------------------------------

DIGESTS = {FILE: {(each.offset, each.length): each.digest for each in INSTANCES}}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_digests_are_known_whatever_the_epoch(tmp_path: Path) -> None:
    using(tmp_path, remember, epoch=None)
    before = contents(tmp_path)
    assert {name for name, content in before.items() if content} == {FILE_NAME}
    assert known_digests(tmp_path, [FILE, FILE._replace(inode=78)]) == DIGESTS
    assert contents(tmp_path) == before  # nothing is made, nothing is changed


def test_digests_are_known_while_the_daemon_has_the_index_open(tmp_path: Path) -> None:
    async def steps(index: PersistentDigestIndex) -> None:
        await remember(index)
        assert known_digests(tmp_path, [FILE]) == DIGESTS
        await is_known(index)

    using(tmp_path, steps)


def test_a_locked_index_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patience: list[int] = []
    connect = sqlite3.connect

    def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
        database = connect(*arguments, **options)
        patience.append(database.execute("PRAGMA busy_timeout").fetchone()[0])
        return database

    using(tmp_path, remember)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", connected)
        assert known_digests(tmp_path, [FILE])
    assert patience == [0], "milliseconds; sqlite's own are 5,000"
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert known_digests(tmp_path, [FILE]) == {}
        database.rollback()


@pytest.mark.parametrize("damage", [b"not a database at all, " * 100, b"SQLite format 3\0" + b"\xff" * 4080, b""])
def test_a_damaged_index_knows_nothing_and_stays(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(damage)
    assert known_digests(tmp_path, [FILE]) == {}
    assert contents(tmp_path) == {FILE_NAME: damage}


@pytest.mark.parametrize("instances", ["x'0102'", "'text'", "17"])
def test_a_damaged_row_is_not_known(tmp_path: Path, instances: str) -> None:
    using(tmp_path, remember)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as database, database:
        database.execute(f"UPDATE files SET instances = {instances}")
    assert known_digests(tmp_path, [FILE]) == {}


def test_an_index_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert known_digests(tmp_path, [FILE]) == {}
    assert known_digests(tmp_path / "nowhere", [FILE]) == {}
    (tmp_path / FILE_NAME).mkdir()
    assert known_digests(tmp_path, [FILE]) == {}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_an_index_that_was_cut_off_is_left_to_its_owner(tmp_path: Path) -> None:
    using(tmp_path, remember)
    (tmp_path / f"{FILE_NAME}-wal").write_bytes(b"")
    before = contents(tmp_path)
    assert known_digests(tmp_path, [FILE]) == {}
    assert contents(tmp_path) == before


def of_0_1(folder: Path) -> None:
    """An index as weightd 0.1 has left it: its log is in the way, and no row has a checksum."""
    using(folder, remember)
    packed = b"".join(digest_index._ROW.pack(*instance) for instance in INSTANCES)
    with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as database, database:
        database.execute("UPDATE files SET instances = ?", (packed,))
        database.execute("PRAGMA journal_mode = WAL")


def test_an_index_of_weightd_0_1_is_taken_over_by_the_daemon_alone(tmp_path: Path) -> None:
    of_0_1(tmp_path)
    before = contents(tmp_path)
    assert known_digests(tmp_path, [FILE]) == {}
    assert contents(tmp_path) == before
    using(tmp_path, is_unknown)
    using(tmp_path, remember)
    assert known_digests(tmp_path, [FILE]) == DIGESTS


def test_nothing_of_it_is_ever_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an index of 0.1, which has an index of its log in shared memory: who cuts that ends the process."""
    of_0_1(tmp_path)
    seen: list[str] = []
    execute = PersistentDigestIndex._execute

    def looking(self: PersistentDigestIndex, *arguments: Any, **options: Any) -> Any:
        found = execute(self, *arguments, **options)
        seen.append(Path("/proc/self/maps").read_text())
        return found

    monkeypatch.setattr(PersistentDigestIndex, "_execute", looking)

    async def steps(index: PersistentDigestIndex) -> None:
        await is_unknown(index)
        await remember(index)
        await is_known(index)

    using(tmp_path, steps)
    assert len(seen) == 3
    assert not any(FILE_NAME in maps for maps in seen)
    assert not (tmp_path / f"{FILE_NAME}-shm").exists()


@pytest.mark.parametrize("field", ["offset", "length", "digest", "variant", "blob"])
def test_a_row_of_which_one_bit_is_wrong_is_not_known(tmp_path: Path, field: str) -> None:
    """A wrong offset could make a tensor that of its neighbour."""
    using(tmp_path, remember)
    place = {"offset": 0, "length": 8, "digest": 16, "variant": 32, "blob": 36}[field]
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as database, database:
        ((packed,),) = database.execute("SELECT instances FROM files").fetchall()
        damaged = bytearray(packed)
        damaged[place] ^= 1
        database.execute("UPDATE files SET instances = ?", (bytes(damaged),))
    assert known_digests(tmp_path, [FILE]) == {}
    using(tmp_path, is_unknown)


def test_a_row_is_of_its_file_and_its_epoch(tmp_path: Path) -> None:
    using(tmp_path, remember)
    for column, value in (("inode", FILE.inode + 1), ("epoch", "other")):
        with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as database, database:
            database.execute(f"UPDATE files SET {column} = ?", (value,))
        assert known_digests(tmp_path, [FILE, FILE._replace(inode=FILE.inode + 1)]) == {}


def damage(path: Path, chance: random.Random) -> None:
    """Cut a file, or write something into it."""
    with contextlib.suppress(OSError), path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if chance.random() < 0.3:
            file.truncate(chance.randrange(size + 1))
        for _ in range(chance.choice([1, 20, 400]) if size else 0):
            file.seek(chance.randrange(size))
            file.write(chance.randbytes(chance.choice([1, 4, 32])))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_cut_or_written_over_while_it_is_open(tmp_path: Path, seed: int) -> None:
    """Either nothing is known, or what was put. Its files are damaged between any two calls."""
    chance = random.Random(seed)

    async def steps(index: PersistentDigestIndex) -> None:
        for number in range(150):
            damage(tmp_path / chance.choice(os.listdir(tmp_path) or [FILE_NAME]), chance)
            assert await known(index, FILE) in ([], INSTANCES), number
            await index.put({FILE: INSTANCES})
            assert known_digests(tmp_path, [FILE]) in ({}, DIGESTS), number
            assert await known(index, FILE) in ([], INSTANCES), number

    using(tmp_path, steps)
    using(tmp_path, remember)
    using(tmp_path, is_known)
