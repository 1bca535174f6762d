"""Canonical manifests: round trip, independent of the order of rows, and hostile encodings are refused."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightd.errors import FormatError
from weightd_fleet.core import manifest_checks
from weightd_fleet.core.encoding import MAX_MANIFEST_BYTES
from weightd_fleet.core.manifest import FleetManifest
from weightd_fleet.core.manifest_rows import HubOrigin, SmallFile, TensorRow, WeightFile

COMMIT = "0123456789" * 4
SHA256 = "ab" * 32
DIGEST = b"d" * 32
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0\\/"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)


@st.composite
def manifests(draw: st.DrawFn) -> tuple[list[WeightFile], list[TensorRow], list[SmallFile]]:
    """Rows that fit together."""
    paths = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    files, tensors, small = [], [], []
    for path in paths:
        if draw(st.booleans()):
            small.append(SmallFile(path, draw(st.integers(0, 100)), draw(st.binary(min_size=32, max_size=32))))
            continue
        position = frame = 0
        for name in draw(st.lists(NAMES, max_size=4, unique=True)):
            gap, length = draw(st.integers(0, 5)), draw(st.integers(0, 50))
            digest = draw(st.binary(min_size=32, max_size=32))
            tensors.append(TensorRow("", path, f"{path}.{name}", "U8", (length,), position + gap, length, digest))
            position, frame = position + gap + length, frame + gap
        files.append(WeightFile("", path, position + 1, frame + 1, DIGEST))
    return files, tensors, small


@settings(deadline=None)
@given(manifests(), st.randoms())
def test_round_trip_in_any_order(rows: tuple[list[Any], list[Any], list[Any]], chance: random.Random) -> None:
    made = FleetManifest.of(*rows)
    assert FleetManifest.decode(made.encoded) == made
    for some in rows:
        chance.shuffle(some)
    assert FleetManifest.of(*rows).name == made.name


FILES = [WeightFile("unet", "a.safetensors", 108, 100, DIGEST, SHA256), WeightFile("", "b.gguf", 20, 20, DIGEST)]
TENSORS = [
    TensorRow("unet", "a.safetensors", "x", "BF16", (2,), 100, 4, DIGEST),
    TensorRow("unet", "a.safetensors", "y", "F32", (1, 1), 104, 4, DIGEST),
]
SMALL = [SmallFile("config.json", 2, DIGEST, "ab" * 20), SmallFile("unet/config.json", 2, DIGEST)]
ORIGIN = HubOrigin("org/name", COMMIT)
WHOLE = FleetManifest.of(FILES, TENSORS, SMALL, ORIGIN)


def test_the_name_is_of_the_encoding_and_never_changes() -> None:
    assert FleetManifest.decode(WHOLE.encoded) == WHOLE
    assert WHOLE.name == "b3:8656859dbb23c0ffaa151603f4fc3889e45a1947e14c9342da5425812bcefd6d"
    assert WHOLE.tensor_bytes == 8
    assert WHOLE.blobs() == [(DIGEST, 4), (DIGEST, 4)]


@pytest.mark.parametrize(
    "other",
    [
        FleetManifest.of(FILES, TENSORS, SMALL, HubOrigin("org/other", COMMIT)),
        FleetManifest.of(FILES, [TENSORS[0]._replace(digest=b"e" * 32), TENSORS[1]], SMALL, ORIGIN),
        FleetManifest.of(FILES, [TENSORS[0]._replace(dtype="F16"), TENSORS[1]], SMALL, ORIGIN),
        FleetManifest.of(FILES, [TENSORS[0]._replace(counts=False), TENSORS[1]], SMALL, ORIGIN),
        FleetManifest.of([FILES[0]._replace(frame=b"e" * 32), FILES[1]], TENSORS, SMALL, ORIGIN),
        FleetManifest.of(FILES, TENSORS, SMALL[:1], ORIGIN),
    ],
)
def test_whatever_differs_has_another_name(other: FleetManifest) -> None:
    assert other.name != WHOLE.name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": [FILES[0], FILES[0]]}, "twice|one path"),
        ({"files": [FILES[0]._replace(file="../a.safetensors"), FILES[1]], "tensors": []}, "none below a folder"),
        ({"files": [FILES[0]._replace(component="/etc"), FILES[1]], "tensors": []}, "none below a folder"),
        ({"files": [FILES[1]._replace(file="x" * 256)], "tensors": []}, "none below a folder"),
        ({"small_files": [SmallFile("unet", 2, DIGEST)]}, "below another file"),
        ({"small_files": [SmallFile(path, 2, DIGEST) for path in ("d", "d!", "d/e/f")]}, "'d/e/f' lies below another"),
        ({"small_files": [SmallFile("b.gguf", 2, DIGEST)]}, "one path"),
        ({"small_files": [SmallFile("c", 65 << 20, DIGEST)]}, "impossible length"),
        ({"small_files": [SmallFile("c", 2, b"short")]}, "impossible length or digest"),
        ({"small_files": [SmallFile(f"c{at}", 64 << 20, DIGEST) for at in range(9)]}, "bytes together"),
        ({"files": [FILES[0], FILES[1]._replace(size=-1)]}, "'b.gguf' has an impossible size"),
        ({"tensors": [*TENSORS, TENSORS[0]._replace(file="none")]}, "does not list"),
        ({"files": [FILES[0], FILES[1]._replace(frame=b"short")]}, "'b.gguf' has an impossible frame"),
        ({"tensors": [TENSORS[0], TENSORS[1]._replace(offset=102)]}, "overlaps"),
        ({"tensors": [TENSORS[0], TENSORS[1]._replace(offset=106)]}, "overlaps another one or the file's end"),
        ({"tensors": TENSORS[:1]}, "do not come to its size"),
        ({"tensors": [TENSORS[0], TENSORS[1]._replace(name="x")]}, "two tensors of one name"),
        ({"tensors": [TENSORS[0], TENSORS[1]._replace(shape=(2,))]}, "impossible dtype, shape"),
        ({"tensors": [TENSORS[0], TENSORS[1]._replace(digest=b"")]}, "or digest"),
        ({"tensors": [TENSORS[0], TENSORS[1]._replace(shape=(1,) * 33)]}, "impossible dtype, shape"),
        ({"tensors": [TENSORS[0], TENSORS[1]._replace(name="\udc80")]}, "UTF-8"),
        ({"origin": None}, "no revision on a hub"),
        ({"origin": HubOrigin("../../etc", COMMIT)}, "not a repository"),
        ({"origin": HubOrigin("org/name", "main")}, "not a commit"),
        ({"small_files": [SmallFile("c", 2, DIGEST, "../../x")]}, "no SHA-1 or SHA-256"),
    ],
)
def test_rows_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    rows = {"files": FILES, "tensors": TENSORS, "small_files": SMALL, "origin": ORIGIN} | change
    with pytest.raises(FormatError, match=said):
        FleetManifest.of(**rows)


@pytest.mark.parametrize(
    ("limit", "change", "said"),
    [
        ("MAX_FILES", {"small_files": []}, "lists more than 1 files"),
        ("MAX_FILES", {"files": [], "tensors": []}, "lists more than 1 files"),
        ("MAX_TENSORS", {}, "lists more than 1 tensors"),
    ],
)
def test_more_rows_than_a_manifest_may_list_are_refused(
    limit: str, change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_checks, limit, 1)
    rows = {"files": FILES, "tensors": TENSORS, "small_files": SMALL, "origin": ORIGIN} | change
    with pytest.raises(FormatError, match=said):
        FleetManifest.of(**rows)


def test_what_is_cut_off_or_not_canonical_is_refused() -> None:
    encoded = WHOLE.encoded
    for end in range(len(encoded)):
        with pytest.raises(FormatError):
            FleetManifest.decode(encoded[:end])
    with pytest.raises(FormatError, match="canonical"):
        FleetManifest.decode(encoded + b"\0")
    turned = replace(WHOLE, small_files=WHOLE.small_files[::-1])
    with pytest.raises(FormatError, match="canonical"):
        FleetManifest.decode(turned.encoded)
    with pytest.raises(FormatError, match="over the limit"):
        FleetManifest.decode(encoded + bytes(MAX_MANIFEST_BYTES))


def test_no_flipped_bit_keeps_the_name() -> None:
    for at in range(len(WHOLE.encoded)):
        damaged = bytearray(WHOLE.encoded)
        damaged[at] ^= 1 << at % 8
        try:
            assert FleetManifest.decode(bytes(damaged)).name != WHOLE.name
        except FormatError as error:
            assert str(error).startswith("manifest: ")  # noqa: PT017  # either is fine, nothing else is


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_format_error(tail: bytes) -> None:
    try:
        FleetManifest.decode(b"weightd-manifest\x01" + tail)
    except FormatError:
        return
