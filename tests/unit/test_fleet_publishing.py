"""Publishing: what a manifest says is what the files hold, byte for byte, and the hub's digests are checked."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from support import checkpoints, gguf_files, hub_cache
from weightd.errors import FormatError, InvalidReferenceError, NotFoundError, PermissionDeniedError, WeightdError
from weightd_daemon.loader.source import LoaderSource
from weightd_fleet.core.manifest import FleetManifest
from weightd_fleet.core.manifest_rows import HubOrigin
from weightd_fleet.publishing import small_files
from weightd_fleet.publishing.publish import PublishedCheckpoint, publish
from weightd_fleet.publishing.state import PublishedState, state_folder


def tensor(seed: object, size: int = 300) -> tuple[str, tuple[int, ...], bytes]:
    return "U8", (size,), checkpoints.random_bytes(seed, size)


@pytest.fixture
def state(tmp_path: Path) -> PublishedState:
    return PublishedState(tmp_path / "state")


def published(state: PublishedState, reference: Path | str, notes: list[str] | None = None) -> PublishedCheckpoint:
    said: list[str] = [] if notes is None else notes
    return publish(str(reference), state, note=said.append)


def rebuilt(manifest: FleetManifest, state: PublishedState, folder: Path) -> dict[str, bytes]:
    """The files of a manifest, made from its frames, and tensors found in `folder` by their digests."""
    tensors = {}
    for row in manifest.tensors:
        path = folder / row.component / row.file
        with path.open("rb") as file:
            file.seek(row.offset)
            content = file.read(row.length)
        assert blake3(content).digest() == row.digest
        tensors[row] = content
    made = {small.path: state.blob(small.digest) for small in manifest.small_files}
    for file_row in manifest.files:
        frame, content = state.blob(file_row.frame), b""
        for piece in manifest.pieces(file_row):
            assert piece.offset == len(content)
            begin = piece.frame_offset
            content += tensors[piece.row] if piece.row else frame[begin : begin + piece.length]
        assert len(content) == file_row.size
        made[file_row.path] = content
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pipeline(folder: Path) -> Path:
    """A pipeline of two components, with configuration."""
    checkpoints.write(folder / "unet" / "diffusion_pytorch_model.safetensors", {"a": tensor(1), "b": tensor(2, 0)})
    checkpoints.write(folder / "text_encoder" / "model.safetensors", {"a": tensor(3)}, {"format": "pt"})
    (folder / "unet" / "config.json").write_text("{}")
    return checkpoints.describe_pipeline(folder)


def test_a_folder_comes_back_byte_for_byte(tmp_path: Path, state: PublishedState) -> None:
    folder = pipeline(tmp_path / "pipeline")
    found = published(state, folder)
    manifest = state.manifest(found.digest)
    assert manifest.name == found.digest
    assert rebuilt(manifest, state, folder) == contents(folder)
    assert (found.files, found.tensors, found.total_bytes, found.small_files) == (2, 3, 600, 2)
    assert (found.origin, found.checked_files) == (None, 0)
    assert state.names() == [found.digest]
    listed = state.sources(found.digest)["files"]
    assert [(each["component"], each["file"]) for each in listed] == [
        ("text_encoder", "model.safetensors"),
        ("unet", "diffusion_pytorch_model.safetensors"),
    ]
    assert all(each["identity"][1] == os.stat(each["path"]).st_ino for each in listed)


def test_a_gguf_file_comes_back_byte_for_byte(tmp_path: Path, state: PublishedState) -> None:
    path = tmp_path / "model.gguf"
    shapes: gguf_files.Tensors = {
        "a": (gguf_files.F32, (3,), bytes(12)),
        "b": (gguf_files.F32, (5,), checkpoints.random_bytes(1, 20)),
    }
    path.write_bytes(gguf_files.whole(shapes) + b"behind the tensors")
    found = published(state, path)
    manifest = state.manifest(found.digest)
    assert rebuilt(manifest, state, tmp_path) == {"model.gguf": path.read_bytes()}
    assert (found.tensors, found.small_files) == (2, 0)


def test_the_name_is_of_the_bytes_not_of_the_place(tmp_path: Path, state: PublishedState) -> None:
    first, second = (published(state, pipeline(tmp_path / name)) for name in ("one", "two"))
    assert first.digest == second.digest
    assert first.name != second.name
    (tmp_path / "two" / "unet" / "config.json").write_text("{ }")
    assert published(state, tmp_path / "two").digest != first.digest


def test_a_tensor_that_an_index_leaves_to_another_file_does_not_count(tmp_path: Path, state: PublishedState) -> None:
    folder = tmp_path / "sharded"
    checkpoints.write(folder / "model-00001-of-00002.safetensors", {"a": tensor(1), "b": tensor(2)})
    checkpoints.write(folder / "model-00002-of-00002.safetensors", {"b": tensor(3), "c": tensor(4)})
    shards = "model-0000{}-of-00002.safetensors"
    checkpoints.index(folder, {"a": shards.format(1), "b": shards.format(2), "c": shards.format(2)})
    found = published(state, folder)
    manifest = state.manifest(found.digest)
    assert [(row.file[6:11], row.name) for row in manifest.tensors if not row.counts] == [("00001", "b")]
    assert (found.tensors, found.total_bytes) == (3, 900)
    assert rebuilt(manifest, state, folder) == contents(folder)


def test_a_revision_of_a_hub_is_checked_and_named(
    tmp_path: Path, state: PublishedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pipeline(tmp_path / "download")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    snapshot = hub_cache.put(tmp_path / "cache", "org/name", folder)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)  # its word would count
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    found = published(state, "org/name")
    assert found.origin == HubOrigin("org/name", hub_cache.COMMIT)
    assert (found.files, found.small_files, found.checked_files) == (2, 3, 5)
    manifest = state.manifest(found.digest)
    assert rebuilt(manifest, state, snapshot) == contents(folder)
    named = {each.path: each.hub_blob for each in (*manifest.files, *manifest.small_files)}
    assert named == {
        name: hub_cache.blob_name(content, lfs=name.endswith(".safetensors"))
        for name, content in contents(folder).items()
    }
    assert published(state, snapshot).digest == found.digest, "by path it is the same revision"
    detour = folder / ".." / "cache" / snapshot.relative_to(tmp_path / "cache")
    assert published(state, detour).digest == found.digest, "whatever the path"
    assert published(state, folder).digest != found.digest, "a folder of one's own is of no revision"


def test_files_of_a_cache_that_is_named_relatively_are_found_from_elsewhere(
    tmp_path: Path, state: PublishedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache.put(tmp_path / "cache", "org/name", pipeline(tmp_path / "download"))
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)  # its word would count
    monkeypatch.setenv("HF_HUB_CACHE", "cache")
    monkeypatch.chdir(tmp_path)
    found = published(state, "org/name")
    monkeypatch.chdir("/")
    paths = [Path(file["path"]) for file in state.sources(found.digest)["files"]]
    assert len(paths) == 2
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_bytes_that_are_not_the_hubs_are_refused(name: str, tmp_path: Path, state: PublishedState) -> None:
    snapshot = hub_cache.put(tmp_path / "cache", "org/name", pipeline(tmp_path / "download"))
    blob = snapshot / name
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.resolve().write_bytes(content)
    with pytest.raises(FormatError, match=r"its content is not the hub's, .* download it again"):
        published(state, snapshot)
    assert state.names() == []


def test_files_of_a_revision_that_no_digest_names_are_told(tmp_path: Path, state: PublishedState) -> None:
    snapshot = hub_cache.put(tmp_path / "cache", "org/name", pipeline(tmp_path / "download"))
    (snapshot / "unet" / "config.json").unlink()
    (snapshot / "unet" / "config.json").write_text('{"changed": true}')
    notes: list[str] = []
    assert published(state, snapshot, notes).checked_files == 3
    assert notes == [f"{snapshot}/unet/config.json: is no link to a blob of the hub's cache, and was not compared"]


def test_a_link_does_not_publish_a_file_from_elsewhere(tmp_path: Path, state: PublishedState) -> None:
    folder = tmp_path / "model"
    checkpoints.write(folder / "model.safetensors", {"a": tensor(1)})
    (folder / "config.json").write_text("{}")
    (folder / "same.json").symlink_to("config.json")
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "README.md").symlink_to("../id_rsa")
    notes: list[str] = []
    manifest = state.manifest(published(state, folder, notes).digest)
    assert [small.path for small in manifest.small_files] == ["config.json", "same.json"]
    assert notes == [f"{folder}/README.md: is left out, for it is a link to a file outside of the checkpoint"]
    snapshot = hub_cache.put(tmp_path / "cache", "org/name", pipeline(tmp_path / "download"))
    (snapshot / "README.md").symlink_to(tmp_path / "id_rsa")
    manifest = state.manifest(published(state, snapshot).digest)
    assert "README.md" not in {small.path for small in manifest.small_files}


def test_what_travels_and_what_does_not(tmp_path: Path, state: PublishedState, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    checkpoints.write(folder / "model.safetensors", {"a": tensor(1)})
    (folder / "tokenizer").mkdir()
    for name in ("config.json", "tokenizer/vocab.txt", "model.fp16.safetensors", "pytorch_model.bin", "flax.msgpack"):
        (folder / name).write_bytes(b"{}")
    (folder / ".env").write_text("SECRET=1")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "big.txt").write_bytes(bytes(2000))
    os.mkfifo(folder / "pipe")
    monkeypatch.setattr(small_files, "MAX_SMALL_FILE_BYTES", 1000)
    notes: list[str] = []
    manifest = state.manifest(published(state, folder, notes).digest)
    assert [small.path for small in manifest.small_files] == ["config.json", "tokenizer/vocab.txt"]
    assert notes == [f"{folder}/big.txt: is left out, for it has more than 1000 bytes"]
    alone = state.manifest(published(state, folder / "model.safetensors").digest)
    assert alone.small_files == ()


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, state: PublishedState, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pipeline(tmp_path / "pipeline")
    (folder / "secret").mkdir()
    real = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionDeniedError, match="secret: may not be read by this user"):
        published(state, folder)


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, state: PublishedState) -> None:
    path = checkpoints.write(tmp_path / "a.safetensors", {"a": tensor(1, 3 << 20)})
    begun = []

    def change(done: int, total: int) -> None:
        if not begun:
            begun.append(done)
            assert total == path.stat().st_size
            os.utime(path)

    with pytest.raises(FormatError, match="changed while it was read"):
        publish(str(path), state, advance=change)
    assert state.names() == []


def test_every_byte_is_read_once(tmp_path: Path, state: PublishedState, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.write(tmp_path / "a.safetensors", {"a": tensor(1, 3 << 20), "b": tensor(2, 5)})
    size = path.stat().st_size
    header = size - (3 << 20) - 5
    read: list[int] = []
    real = LoaderSource.read_into

    def counted(source: LoaderSource, buffer: memoryview, offset: int) -> None:
        read.append(len(buffer))
        real(source, buffer, offset)

    monkeypatch.setattr(LoaderSource, "read_into", counted)
    seen: list[tuple[int, int]] = []
    publish(str(path), state, advance=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (size, size)
    assert size <= sum(read) <= size + 2 * header, "the header is looked at before"


def test_the_state_folder_is_private_and_checked(tmp_path: Path, state: PublishedState) -> None:
    path = checkpoints.write(tmp_path / "a.safetensors", {"a": np.zeros(4, np.float32)})
    found = published(state, path)
    folder = tmp_path / "state"
    assert sorted(each.name for each in folder.iterdir()) == ["blobs", "manifests", "sources"]
    assert all(each.stat().st_mode & 0o77 == 0 for each in folder.rglob("*"))
    manifest = state.manifest(found.digest)
    digits = found.digest[3:]
    blob = folder / "blobs" / manifest.files[0].frame.hex()
    blob.write_bytes(b"other")
    with pytest.raises(FormatError, match="is not what its name says"):
        state.blob(manifest.files[0].frame)
    (folder / "manifests" / digits).write_bytes(FleetManifest.of([], []).encoded)
    with pytest.raises(FormatError, match="is the manifest of"):
        state.manifest(found.digest)
    (folder / "sources" / f"{digits}.json").write_text(json.dumps([]))
    with pytest.raises(FormatError, match="lists no files"):
        state.sources(found.digest)
    with pytest.raises(NotFoundError, match="not published on this node"):
        state.manifest("b3:" + "0" * 64)
    with pytest.raises(InvalidReferenceError, match="64 hex digits"):
        state.manifest("b3:../../etc/passwd")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "a.safetensors", {"a": np.zeros(4, np.float32)})
    with pytest.raises(WeightdError, match=r"cannot be written: .*; give --state-dir"):
        published(PublishedState(path), path)


def test_where_the_state_folder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    monkeypatch.delenv("WEIGHTD_FLEET_STATE_DIR", raising=False)
    assert state_folder() == Path("/xdg/weightd-fleet")
    monkeypatch.setenv("WEIGHTD_FLEET_STATE_DIR", "/said")
    assert state_folder() == Path("/said")
    assert state_folder("/given") == Path("/given")
