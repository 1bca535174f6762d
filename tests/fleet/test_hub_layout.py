"""Files of a hub's revision, fetched from a peer: huggingface_hub finds them as if it had downloaded them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

from support import checkpoints, hub_cache
from support.agents import Agent, Receiver, agent, published
from weightd.errors import FormatError, InvalidReferenceError, WeightdError
from weightd_fleet.agent.hub_layout import HubRevision
from weightd_fleet.agent.local_blobs import PublishedFiles
from weightd_fleet.agent.sink_files import FilesSink
from weightd_fleet.core.digests import blob_digest
from weightd_fleet.core.manifest import FleetManifest
from weightd_fleet.core.manifest_rows import HubOrigin, SmallFile
from weightd_fleet.publishing.state import PublishedState

REPOSITORY = "org/tuned"


@pytest.fixture
def revision(tmp_path: Path) -> Path:
    """The folder of a revision in the origin's cache, with a file in a subfolder and one that is no link."""
    folder = tmp_path / "upstream"
    checkpoints.write_random(folder / "model.safetensors", 4, 3000)
    (folder / "config.json").write_text("{}")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a b c")
    snapshot = hub_cache.put(tmp_path / "cache", REPOSITORY, folder)
    (snapshot / "note.txt").write_text("of no blob")
    return snapshot


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Agent]:
    with agent(tmp_path / "source") as started:
        yield started


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_hubs_own_package_finds_it(revision: Path, source: Agent, tmp_path: Path) -> None:
    digest = published(tmp_path / "source", revision)
    cache = tmp_path / "received"
    receiver = Receiver(tmp_path / "receiver", hub_cache=cache)
    fetched = receiver.fetch(digest, source.address)
    found = huggingface_hub.snapshot_download(REPOSITORY, cache_dir=cache, local_files_only=True)
    assert found == fetched.folder
    assert contents(Path(found)) == contents(revision)
    assert fetched.name == REPOSITORY
    scanned = huggingface_hub.scan_cache_dir(cache)
    assert scanned.warnings == []
    (repository,) = scanned.repos
    (only,) = repository.revisions
    assert (repository.repo_id, only.commit_hash, only.refs) == (REPOSITORY, hub_cache.COMMIT, {"main"})
    for path in revision.rglob("*"):
        if path.is_symlink():
            there = Path(found) / path.relative_to(revision)
            assert os.readlink(there) == os.readlink(path)
    # What was received is published from the cache as the same checkpoint, with the hub's digests checked.
    assert published(tmp_path / "third", Path(found)) == digest
    again = receiver.fetch(digest)
    assert (again.moved_bytes, again.small_bytes) == (0, 0)


def test_main_is_left_alone(revision: Path, source: Agent, tmp_path: Path) -> None:
    digest = published(tmp_path / "source", revision)
    cache = tmp_path / "received"
    refs = cache / "models--org--tuned" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("f" * 40)
    Receiver(tmp_path / "receiver", hub_cache=cache).fetch(digest, source.address)
    assert (refs / "main").read_text() == "f" * 40
    found = huggingface_hub.snapshot_download(
        REPOSITORY, revision=hub_cache.COMMIT, cache_dir=cache, local_files_only=True
    )
    assert contents(Path(found)) == contents(revision)


def test_a_blob_that_is_not_the_hubs(revision: Path, source: Agent, tmp_path: Path) -> None:
    digest = published(tmp_path / "source", revision)
    state = PublishedState(tmp_path / "source")
    manifest = state.manifest(digest)
    (file,) = manifest.files
    lying = type(manifest).of([file._replace(hub_blob="0" * 64)], manifest.tensors, (), manifest.origin)
    state.put(lying, [], state.sources(digest))
    cache = tmp_path / "received"
    with pytest.raises(FormatError, match="not the hub's"):
        Receiver(tmp_path / "receiver", hub_cache=cache).fetch(lying.name, source.address)
    assert not list(cache.rglob("0" * 64))
    assert not (cache / "models--org--tuned" / "snapshots").exists()


def test_something_else_is_in_the_way(revision: Path, source: Agent, tmp_path: Path) -> None:
    digest = published(tmp_path / "source", revision)
    receiver = Receiver(tmp_path / "receiver", hub_cache=tmp_path / "received")
    link = tmp_path / "received" / "models--org--tuned" / "snapshots" / hub_cache.COMMIT / "config.json"
    link.parent.mkdir(parents=True)
    link.write_text("mine")
    with pytest.raises(InvalidReferenceError, match="other content"):
        receiver.fetch(digest, source.address)
    assert link.read_text() == "mine"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_text("mine")
    with pytest.raises(InvalidReferenceError, match="other content"):
        receiver.fetch(digest, source.address, folder=mine)
    assert (mine / "model.safetensors").read_text() == "mine"


def test_a_blob_that_two_fetches_write_is_whole(tmp_path: Path) -> None:
    """Of two revisions that have the same blob: the other fetch ends in the middle of it."""
    content = b"first half, other half"
    blob = hub_cache.blob_name(content, lfs=False)
    sinks = []
    for commit in ("a" * 40, "b" * 40):
        origin = HubOrigin(REPOSITORY, commit)
        small = SmallFile("config.json", len(content), blob_digest(content), blob)
        manifest = FleetManifest.of([], [], [small], origin)
        sinks.append(FilesSink(manifest, HubRevision(tmp_path, origin), PublishedFiles()))
    ours, theirs = sinks

    def cut_off(put: Callable[[memoryview], None]) -> None:
        put(memoryview(content[:4]))
        raise ConnectionResetError

    def interrupted(put: Callable[[memoryview], None]) -> None:
        put(memoryview(content[:10]))
        with pytest.raises(WeightdError):
            theirs._write("config.json", blob, len(content), cut_off)
        put(memoryview(content[10:]))

    ours._write("config.json", blob, len(content), interrupted)
    assert (tmp_path / "models--org--tuned" / "blobs" / blob).read_bytes() == content
    theirs._write("config.json", blob, len(content), lambda put: put(memoryview(content)))
    assert {path.read_bytes() for path in (tmp_path / "models--org--tuned" / "blobs").glob(blob)} == {content}
