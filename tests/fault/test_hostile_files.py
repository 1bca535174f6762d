"""Files that are malformed, lie or change under the reader: an error that names the fault, and nothing stays behind."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import weightd
from support import checkpoints, gguf_files, malformed
from support.background import background
from support.daemon import Daemon, eventually
from support.launch import launcher
from support.loader import PIECE, STOP, resume, wait_stopped
from support.malformed import build, entry
from weightd._references.files import ReferencedFile
from weightd.resolve import Resolved

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20


@pytest.fixture
def stopping(start_daemon: StartDaemon) -> Daemon:
    """A daemon whose loaders stop where a piece begins with STOP, and read one piece after the other."""
    return start_daemon(argv=launcher(loader="stopping"), pool=0, reader_threads=1, budget="16MiB")


def nothing_left(client: weightd.Client, used: int = 0) -> bool:
    (device,) = client.stats().devices
    return not device.in_flight_bytes and device.used_bytes == used and not client.checkpoints()


@pytest.mark.parametrize(
    ("corpus", "suffix"),
    [(malformed.CORPUS, ".safetensors"), (gguf_files.CORPUS, ".gguf")],
    ids=["safetensors", "gguf"],
)
def test_every_malformed_file(
    start_daemon: StartDaemon, tmp_path: Path, corpus: dict[str, tuple[bytes, str]], suffix: str
) -> None:
    daemon = start_daemon(pool=0)
    client = daemon.connect()
    good = checkpoints.write_random(tmp_path / "good.safetensors", 3, 5000, seed="good")
    assert len(corpus) >= 40
    loaders: set[int] = set()
    for case, (content, fragment) in corpus.items():
        path = tmp_path / f"{case}{suffix}"
        path.write_bytes(content)
        with pytest.raises(weightd.FormatError) as caught:
            client.load(path)
        message = str(caught.value)
        assert fragment in message, case
        assert path.name in message, case
        assert message.isprintable(), case  # one line, and nothing that moves the cursor
        assert len(message) < 2000, case
        loaders.update(daemon.loaders())
    eventually(lambda: nothing_left(client), what="no byte is left")
    # They cost their load, not the loader. Where one is not idle again when the next load begins, another is started.
    assert len(loaders) <= 3
    client.load(good, name="good")
    with client.attach("good") as attachment:
        assert attachment.buffer("t2") == checkpoints.random_bytes(("good", 2), 5000)


@pytest.mark.parametrize("case", ["empty", "overlap", "raw_pickle"])
def test_command_on_a_malformed_file(daemon: Daemon, tmp_path: Path, case: str) -> None:
    content, fragment = malformed.CORPUS[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    failed = daemon.command("load", path, check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert fragment in " ".join(failed.stderr.split())
    assert "Traceback" not in failed.stderr
    assert daemon.command("ls", "-q").stdout == ""


def test_one_bad_shard_fails_the_whole(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(pool=0)
    client = daemon.connect()
    checkpoints.write_random(tmp_path / "unet" / "model.safetensors", 3, MIB)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(malformed.CORPUS["overlap"][0])
    with pytest.raises(weightd.FormatError, match=r"overlap") as caught:
        client.load(checkpoints.describe_pipeline(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/vae/model.safetensors: ")
    eventually(lambda: nothing_left(client), what="no byte is left")


def test_hostile_indexes(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """The loader reads the index as it came, whatever the client has made of it."""
    daemon = start_daemon(pool=0)
    client = daemon.connect()
    paths = [checkpoints.write_random(tmp_path / f"{n}.safetensors", 1, MIB, seed=n) for n in "ab"]
    index = tmp_path / "index"
    resolved = Resolved(
        "m", (*(ReferencedFile("", p.name, p) for p in paths), ReferencedFile("", "index", index, is_index=True))
    )
    maps = {
        b"{": "not valid JSON",
        b"[" * 100_000: "not valid JSON",
        b'{"weight_map": {"t0": "../a.safetensors"}}': "leads out of the folder",
        b'{"weight_map": {"t0": "c.safetensors"}}': "tensor 't0' is in another file too, and the index says",
        b'{"weight_map": {"x": "a.safetensors"}}': "does not say whose counts",
    }
    for content, words in maps.items():
        index.write_bytes(content)
        with pytest.raises(weightd.FormatError, match=words):
            client.load(resolved)
    os.truncate(index, 1 << 40)
    with pytest.raises(weightd.FormatError, match=r"index: over the limit"):
        client.load(resolved)
    eventually(lambda: nothing_left(client), what="no byte is left")
    checkpoints.index(tmp_path, {"t0": "b.safetensors"}, "index")
    with client.attach(resolved) as attachment:
        assert attachment.buffer("t0") == checkpoints.random_bytes(("b", 0), MIB)


def test_mutated_files(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """What loads is what the safetensors package reads; whatever else is a FormatError."""
    daemon = start_daemon()
    client = daemon.connect()
    whole = build(
        {"a": entry("F32", [2], [0, 8]), "b": entry("U8", [3], [8, 11]), "__metadata__": {"k": "v"}}, b"abcdefghijk"
    )
    outcomes: list[bool] = []
    path = tmp_path / "m.safetensors"

    @settings(max_examples=40, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(
            st.tuples(st.integers(0, len(whole)), st.integers(0, 3), st.binary(max_size=3)), min_size=0, max_size=3
        )
    )
    def check(edits: list[tuple[int, int, bytes]]) -> None:
        content = bytearray(whole)
        for at, cut, new in edits:
            content[at : at + cut] = new
        path.write_bytes(content)
        try:
            client.load(path, name="mutated")
        except weightd.FormatError:
            outcomes.append(False)
            return
        outcomes.append(True)
        theirs = dict(safetensors.deserialize(bytes(content)))
        with client.attach("mutated") as attachment:
            ours = {key.name: bytes(attachment.buffer(key.name)) for key in attachment.tensors}
        assert ours == {name: bytes(tensor["data"]) for name, tensor in theirs.items()}

    check()
    assert set(outcomes) == {True, False}


def marked(folder: Path) -> Path:
    """Four tensors of 2 MiB; the loader stops in the middle of "t1"."""
    tensors = {}
    for i in range(4):
        data = checkpoints.random_bytes(i, 2 * MIB)
        tensors[f"t{i}"] = ("U8", (2 * MIB,), data[:PIECE] + STOP + data[PIECE + len(STOP) :] if i == 1 else data)
    return checkpoints.write(folder / "marked.safetensors", tensors)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - MIB)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def change_unread(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"changed")


def change_read(path: Path) -> None:
    """What has been read already: only the file's times can tell."""
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (shrink, "shrank while it was read"),
        (empty, "shrank while it was read"),
        (grow, "changed while it was read"),
        (change_unread, "changed while it was read"),
        (change_read, "changed while it was read"),
    ],
)
def test_file_changes_while_it_is_read(
    stopping: Daemon, tmp_path: Path, change: Callable[[Path], None], fragment: str
) -> None:
    path = marked(tmp_path)
    client = stopping.connect()
    future = background(client.load_report, path)
    (pid,) = wait_stopped(stopping)
    time.sleep(0.01)  # past a tick of the file's times
    change(path)
    resume(pid)
    with pytest.raises(weightd.FormatError, match=f"marked.safetensors: {fragment}.*load it again"):
        future.result(60)
    eventually(lambda: nothing_left(client), what="no byte is left")


def test_file_changes_between_hashing_and_copying(stopping: Daemon, tmp_path: Path) -> None:
    """Even where the times do not tell: what is copied is hashed again."""
    client = stopping.connect()
    with weightd.connect(stopping.socket, timeout=60) as other:
        other.load(checkpoints.write_random(tmp_path / "old.safetensors", 5, 2 * MIB, seed="old"))
    path = marked(tmp_path)
    times = path.stat()
    future = background(client.load_report, path)
    (pid,) = wait_stopped(stopping)  # "t0" has been hashed: 8 MiB do not fit beside the 10 that are there
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(b"changed")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    resume(pid)
    with pytest.raises(weightd.FormatError, match=r"changed while it was read \(tensor 't0'\); load it again"):
        future.result(60)
    eventually(lambda: nothing_left(client), what="no byte is left")


def test_sparse_terabyte_is_refused_before_it_is_read(stopping: Daemon, tmp_path: Path) -> None:
    """Its header is honest. The loader would stop at its first byte of data."""
    size = 1 << 40
    header = build({"a": entry("U8", [size], [0, size])}, STOP)
    path = tmp_path / "huge.safetensors"
    path.write_bytes(header)
    os.truncate(path, len(header) - len(STOP) + size)
    client = stopping.connect()
    with pytest.raises(weightd.CapacityError) as caught:
        client.load(path)
    assert caught.value.requested_bytes >= size
    assert nothing_left(client)


def test_gguf_array_of_half_a_terabyte(stopping: Daemon, tmp_path: Path) -> None:
    """The file has room for it: what is refused is to read that much for a header."""
    path = tmp_path / "zeros.gguf"
    path.write_bytes(gguf_files.build(keys=[gguf_files.key("k", gguf_files.ARRAY, struct.pack("<IQ", 0, 1 << 39))]))
    os.truncate(path, 1 << 40)
    with pytest.raises(weightd.FormatError, match=r"zeros.gguf.*'k': an array of .* reaches past byte 100000000"):
        stopping.connect().load(path)


def test_sparse_header_of_the_largest_size(stopping: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "zeros.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000))
    os.truncate(path, 1 << 40)
    with pytest.raises(weightd.FormatError, match=r"zeros.safetensors.*begins with"):
        stopping.connect().load(path)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickles_are_refused_by_name(daemon: Daemon, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(malformed.CORPUS["raw_pickle"][0])
    with pytest.raises((weightd.FormatError, weightd.InvalidReferenceError), match=r"pickle.*convert"):
        daemon.connect().load(path)
    assert daemon.loaders() == []
