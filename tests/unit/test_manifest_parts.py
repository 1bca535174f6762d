"""Rows of a manifest's file, without the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from weightd._manifest import Manifest
from weightd._proto.v1 import handles_pb2
from weightd.errors import ServerError
from weightd_daemon.core.blob import Blob, BlobKey
from weightd_daemon.core.checkpoint import Content
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.handles import manifest_file
from weightd_daemon.handles.manifest_file import encode_manifest, make_manifest
from weightd_daemon.handles.manifest_parts import ManifestParts

TENSORS = 23


def encoded() -> bytes:
    """A manifest of two components, with a long name, a tensor without bytes and scalars."""
    files = (ContentFile("unet", "u", {"format": "pt"}), ContentFile("vae", "v", None))
    entries, blobs = [], []
    for at in range(TENSORS):
        length = 0 if at == 5 else 300 + at
        shape = () if at == 7 else (length,)
        name = f"t{at}" + "x" * (400 if at == 3 else 0)
        entries.append(ContentTensor(files[at % 2].component, name, "U8", shape, at % 2, length))
        key = BlobKey("host", "", bytes([at]) * 16, length)
        blobs.append(Blob(at, key, at % 3, 7, at * 512, 1) if length else None)
    content = Content("sha256:" + "0" * 64, files, tuple(entries), tuple(blobs))
    return encode_manifest(content, "host", "host", lambda _: 1 << 20)


@pytest.fixture(params=[4, 23, 4096])
def descriptor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(manifest_file, "_ENCODED_AT_ONCE", request.param)
    made = make_manifest(encoded())
    yield made
    os.close(made)


def test_any_rows_are_those_of_the_whole(descriptor: int) -> None:
    whole = Manifest(os.pread(descriptor, 1 << 20, 0)).tensors
    parts = ManifestParts(descriptor)
    assert len(parts) == TENSORS
    for start in range(TENSORS):
        for stop in range(start + 1, TENSORS + 1):
            manifest, rows = parts.read(descriptor, start, stop)
            assert tuple(manifest.rows(rows)) == whole[start:stop]
            assert manifest.files == Manifest(encoded()).files


def test_few_rows_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_file, "_ENCODED_AT_ONCE", 4)
    made = make_manifest(encoded())
    manifest, _ = ManifestParts(made).read(made, 9, 11)
    os.close(made)
    assert len(manifest) == 4


def test_a_manifest_in_one_piece_is_read_as_well() -> None:
    at_once = handles_pb2.Manifest.FromString(encoded()).SerializeToString()
    made = make_manifest(at_once)
    manifest, rows = ManifestParts(made).read(made, 4, 9)
    os.close(made)
    assert tuple(manifest.rows(rows)) == Manifest(at_once).tensors[4:9]


@pytest.mark.parametrize("junk", [b"\xff", b"\x32\xff\xff", b"\x0b\x00", b"\x32\x80"])
def test_what_is_no_manifest_is_refused(junk: bytes) -> None:
    made = make_manifest(junk)
    try:
        with pytest.raises(ServerError):
            ManifestParts(made).read(made, 0, 1)
    finally:
        os.close(made)
