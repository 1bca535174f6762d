"""The content digest: on what it depends, and on what it must not."""

from __future__ import annotations

import hashlib

import pytest

from weightd_daemon.core.digest import BlobIdentity
from weightd_daemon.core.manifest import _SORTED_AT_ONCE, ContentFile, ContentTensor, _in_order, content_digest

FILE = ContentFile("", "model.safetensors", None)
ROWS = [
    (ContentTensor("", "a", "F32", (2, 2), 0, 16), BlobIdentity(b"a" * 16, 16, 0)),
    (ContentTensor("", "b", "F32", (4,), 0, 16), BlobIdentity(b"b" * 16, 16, 0)),
]


def digest_of(rows: list[tuple[ContentTensor, BlobIdentity]], *files: ContentFile) -> str:
    return content_digest([entry for entry, _ in rows], [blob for _, blob in rows], files or (FILE,))


def test_it_looks_like_a_digest() -> None:
    kind, _, digits = digest_of(ROWS).partition(":")
    assert kind == "sha256"
    assert len(bytes.fromhex(digits)) == 32


def test_it_is_pinned() -> None:
    """Digests are written down by users and by other daemons: a change of the encoding needs a new prefix."""

    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    number = [value.to_bytes(8, "little") for value in range(17)]
    encoded = b"weightd-content-v1\0" + number[2]
    encoded += (
        text("") + text("a") + text("F32") + number[2] + number[2] + number[2] + b"a" * 16 + number[16] + number[0]
    )
    encoded += text("") + text("b") + text("F32") + number[1] + number[4] + b"b" * 16 + number[16] + number[0]
    assert digest_of(ROWS) == f"sha256:{hashlib.sha256(encoded).hexdigest()}"


def test_order_does_not_matter() -> None:
    assert digest_of(ROWS[::-1]) == digest_of(ROWS)


def test_the_order_of_many_does_not_matter_either() -> None:
    """They are sorted in parts: of each component apart, and of many tensors some at a time."""
    count = 2 * _SORTED_AT_ONCE + 100
    numbers = [7919 * number % 9973 for number in range(count)]  # 9973 is a prime: no number comes twice
    rows = [
        (ContentTensor("b" if number % 3 else "a", f"{number:x}", "F32", (4,), 0, 16), ROWS[number % 2][1])
        for number in numbers
    ]
    expected = sorted(rows, key=lambda row: row[0][:2])
    assert [rows[at] for at in _in_order([entry for entry, _ in rows])] == expected
    assert digest_of(rows) == digest_of(expected) == digest_of(rows[::-1])


def test_files_and_their_names_do_not_matter() -> None:
    split = [(entry._replace(file=at), blob) for at, (entry, blob) in enumerate(ROWS)]
    shards = (ContentFile("", "model-1.safetensors", None), ContentFile("", "model-2.safetensors", None))
    assert digest_of(split, *shards) == digest_of(ROWS)


def test_equal_metadata_of_shards_counts_once() -> None:
    one, two = ContentFile("", "1", {"format": "pt"}), ContentFile("", "2", {"format": "pt"})
    assert digest_of(ROWS, one, two) == digest_of(ROWS, one)


def test_the_order_of_metadata_does_not_matter() -> None:
    one, two = ContentFile("", "f", {"x": "1", "y": "2"}), ContentFile("", "f", {"y": "2", "x": "1"})
    assert digest_of(ROWS, one) == digest_of(ROWS, two)


ENTRY, BLOB = ROWS[0]


@pytest.mark.parametrize(
    ("entry", "blob"),
    [
        (ENTRY._replace(component="text_encoder"), BLOB),
        (ENTRY._replace(name="c"), BLOB),
        (ENTRY._replace(dtype="I32"), BLOB),
        (ENTRY._replace(shape=(4,)), BLOB),
        (ENTRY._replace(shape=(2, 2, 1)), BLOB),
        (ENTRY, BLOB._replace(digest=b"c" * 16)),
        (ENTRY, BLOB._replace(variant=1)),
        (ENTRY, BLOB._replace(length=20)),
    ],
    ids=["component", "name", "dtype", "shape", "rank", "bytes", "variant", "length"],
)
def test_everything_that_a_tensor_is_matters(entry: ContentTensor, blob: BlobIdentity) -> None:
    assert digest_of([(entry, blob), ROWS[1]]) != digest_of(ROWS)


def test_metadata_matters_and_to_which_component_it_belongs() -> None:
    files = [
        ContentFile("", "f", None),
        ContentFile("", "f", {}),
        ContentFile("", "f", {"a": "bc"}),
        ContentFile("", "f", {"ab": "c"}),
        ContentFile("unet", "f", {"a": "bc"}),
    ]
    assert len({digest_of(ROWS, file) for file in files}) == len(files)


def test_names_cannot_run_into_each_other() -> None:
    left = [(ENTRY._replace(component="ab", name="c"), BLOB)]
    right = [(ENTRY._replace(component="a", name="bc"), BLOB)]
    assert digest_of(left) != digest_of(right)
