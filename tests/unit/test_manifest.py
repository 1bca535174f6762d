"""A manifest as it is read: what the daemon writes comes back, what cannot be is an error, few of many cost little."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.counting import operations
from weightd._manifest import DTYPES, FORM, Manifest
from weightd._proto.v1 import handles_pb2
from weightd._tensor_rows import TensorRows
from weightd.errors import NotFoundError, ServerError
from weightd.types import CheckpointFile, TensorInfo, TensorKey
from weightd_daemon.core.blob import Blob, BlobKey
from weightd_daemon.core.checkpoint import Content
from weightd_daemon.core.digest import EMPTY_DIGEST
from weightd_daemon.core.manifest import ContentFile, ContentTensor
from weightd_daemon.handles.manifest_file import encode_manifest

Message = handles_pb2.Manifest
SIZE = 1 << 20
FILES = (ContentFile("a", "one", {"key": "value"}), ContentFile("b", "two", None))


def blob(number: int, segment: int, offset: int, length: int) -> Blob:
    return Blob(number, BlobKey("host", "", bytes([number]) * 16, length), 0, segment, offset, 0)


CONTENT = Content(
    "sha256:" + "7" * 64,
    FILES,
    (
        ContentTensor("a", "w", "F32", (2, 64), 0, 512),
        ContentTensor("a", "empty", "BF16", (0, 3), 0, 0),
        ContentTensor("b", "w", "U8", (), 1, 1),
        ContentTensor("b", "x", "GGML_Q4_0", (32,), 1, 18),
    ),
    (blob(1, 40, 0, 512), None, blob(2, 30, 256, 1), blob(3, 40, 1024, 18)),
)
ROWS = (
    TensorInfo("a", "w", "F32", (2, 64), 1, 0, 512, b"\x01" * 16, 0, 0),
    TensorInfo("a", "empty", "BF16", (0, 3), 0, 0, 0, EMPTY_DIGEST, 0, 0),
    TensorInfo("b", "w", "U8", (), 0, 256, 1, b"\x02" * 16, 0, 1),
    TensorInfo("b", "x", "GGML_Q4_0", (32,), 1, 1024, 18, b"\x03" * 16, 0, 1),
)


def encoded(kind: str = "host") -> bytes:
    return encode_manifest(CONTENT, "GPU-1", kind, {30: SIZE, 40: 2 * SIZE}.__getitem__)


def test_what_is_written_comes_back() -> None:
    manifest = Manifest(encoded("cuda_vmm"))
    assert (manifest.content_digest, manifest.device, manifest.kind) == (CONTENT.content_digest, "GPU-1", "cuda_vmm")
    assert manifest.components == ("a", "b")
    assert manifest.files == (CheckpointFile("a", "one", {"key": "value"}), CheckpointFile("b", "two", None))
    assert manifest.segment_bytes == (SIZE, 2 * SIZE)
    assert manifest.tensors == ROWS
    assert len(manifest) == 4


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_are_read_as_one_message(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    whole = Message.FromString(encoded())
    monkeypatch.setattr("weightd_daemon.handles.manifest_file._ENCODED_AT_ONCE", rows)
    assert len(encoded()) > whole.ByteSize()
    assert Message.FromString(encoded()) == whole


def test_an_older_daemon_says_neither_kind_nor_form() -> None:
    message = Message.FromString(encoded())
    assert message.form == FORM
    message.ClearField("kind")
    message.ClearField("form")
    manifest = Manifest(message.SerializeToString())
    assert manifest.kind == "host"
    assert manifest.tensors == ROWS


def test_every_dtype_has_a_number_and_none_is_that_of_nothing() -> None:
    assert 0 not in DTYPES.values()
    assert set(DTYPES.values()) == set(handles_pb2.DType.values()) - {0}


@pytest.mark.parametrize(
    ("components", "keys", "rows"),
    [
        ([], [], []),
        (["b"], [], [2, 3]),
        (["a", "b"], [], [0, 1, 2, 3]),
        ([], [("b", "w")], [2]),
        ([], [("b", "x"), ("a", "w")], [0, 3]),
        (["a"], [("b", "w")], [0, 1, 2]),
        (["a"], [("a", "empty")], [0, 1]),
    ],
)
def test_a_selection_is_in_the_order_of_the_rows(
    components: list[str], keys: list[tuple[str, str]], rows: list[int]
) -> None:
    found = Manifest(encoded()).select(components, [TensorKey(*key) for key in keys])
    assert found == rows


def test_each_way_to_read_a_row_gives_the_same() -> None:
    manifest = Manifest(encoded())
    assert manifest.rows() == [manifest.row(number) for number in range(4)] == list(ROWS)
    assert manifest.rows([3, 0]) == [ROWS[3], ROWS[0]]
    assert list(manifest.stored()) == [row[1:7] for row in ROWS]
    assert list(manifest.stored([2])) == [ROWS[2][1:7]]
    assert manifest.keys() == [(row.component, row.name) for row in ROWS]
    assert [*zip(*manifest.places([1, 3]), strict=True)] == [row[4:7] for row in (ROWS[1], ROWS[3])]


def test_rows_as_a_mapping() -> None:
    manifest = Manifest(encoded())
    rows = TensorRows(manifest)
    assert rows.components == {"a", "b"}
    assert list(rows.stored("b")) == [row[1:7] for row in ROWS[2:]]
    assert rows["b", "w"] is rows["b", "w"] == ROWS[2]  # type: ignore[index]  # a plain tuple is enough
    assert rows.get(TensorKey("a", "x")) is None
    assert [*rows.values()] == [rows[key] for key in rows] == list(ROWS)
    few = TensorRows(manifest, manifest.select([], [TensorKey("b", "x"), TensorKey("b", "w")]))
    assert (few.components, len(few)) == ({"b"}, 2)
    assert list(few.stored("b")) == [row[1:7] for row in ROWS[2:]]
    assert dict(few) == {TensorKey("b", row.name): row for row in ROWS[2:]}


def test_what_lies_at_one_address_is_found_whatever_its_length() -> None:
    """Law 9: no two names of an attachment share an address."""
    message = Message.FromString(encoded())
    assert TensorRows(Manifest(message.SerializeToString())).copies == {}
    message.segments[3], message.offsets[3] = message.segments[2], message.offsets[2]
    manifest = Manifest(message.SerializeToString())
    assert TensorRows(manifest).copies == {TensorKey("b", "x"): 1}
    assert TensorRows(manifest, [0, 3]).copies == {}


def test_a_tensor_without_bytes_may_lie_anywhere() -> None:
    message = Message.FromString(encoded())
    message.segments[1], message.offsets[1] = 7, 4 * SIZE
    manifest = Manifest(message.SerializeToString())
    assert [row.length for row in manifest.tensors] == [512, 0, 1, 18]


@pytest.mark.parametrize(
    ("components", "keys", "says"),
    [
        (["c"], [], "component 'c' is not in the checkpoint"),
        ([], [("a", "x")], "tensor 'x' of component 'a' is not in the checkpoint"),
        (["b"], [("", "w")], "tensor 'w' is not in the checkpoint"),
    ],
)
def test_what_is_not_there_is_not_found(components: list[str], keys: list[tuple[str, str]], says: str) -> None:
    with pytest.raises(NotFoundError, match=says):
        Manifest(encoded()).select(components, [TensorKey(*key) for key in keys])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: m.lengths.pop(), "columns of different lengths"),
        (lambda m: m.variants.append(0), "columns of different lengths"),
        (lambda m: setattr(m, "digests", m.digests[:-1]), "columns of different lengths"),
        (lambda m: m.names.append("w"), "columns of different lengths"),
        (lambda m: m.dimensions.append(1), "shapes that cannot be"),
        (lambda m: m.dimensions.pop(), "shapes that cannot be"),
        (lambda m: m.dimensions.__setitem__(0, -1), "shapes that cannot be"),
        (lambda m: m.file_indices.__setitem__(0, 2), "a tensor of a file that it does not have"),
        (lambda m: m.segments.__setitem__(0, 2), "a segment or dtype that is not there"),
        (lambda m: m.dtypes.__setitem__(0, 999), "a segment or dtype that is not there"),
        (lambda m: m.dtypes.__setitem__(0, 0), "a segment or dtype that is not there"),
        (lambda m: setattr(m.files[0], "component", 2), "a file of a component that it does not have"),
        (lambda m: m.offsets.__setitem__(0, 2 * SIZE - 511), "places 512 bytes of tensor 'w' beyond their segment"),
        (lambda m: m.offsets.__setitem__(0, -256), "places 512 bytes of tensor 'w' beyond their segment"),
        (lambda m: m.lengths.__setitem__(0, -1), "places -1 bytes of tensor 'w' beyond their segment"),
        (lambda m: setattr(m, "form", FORM + 1), rf"is of form {FORM + 1}; this version of weightd reads up to {FORM}"),
    ],
)
def test_what_cannot_be_is_an_error(edit: Callable[[Message], object], says: str) -> None:
    message = Message.FromString(encoded())
    edit(message)
    for read in (lambda m: m.rows(), lambda m: m.rows([0]), lambda m: m.stored(), lambda m: m.row(0)):
        with pytest.raises(ServerError, match=says):
            read(Manifest(message.SerializeToString()))


def test_bytes_that_are_no_manifest_are_an_error() -> None:
    with pytest.raises(ServerError, match="the manifest cannot be decoded"):
        Manifest(b"\xff" * 99)


def test_what_reading_costs_is_what_is_asked_for() -> None:
    """Counted, not timed. To make a row takes 100 instructions and more, as `row` counts."""
    count = 20_000
    message = Message(
        components=[""], files=[handles_pb2.ManifestFile(file="f")], segment_bytes=[count * 256],
        names=[f"t{number}" for number in range(count)], file_indices=[0] * count, dtypes=[DTYPES["U8"]] * count,
        ranks=[1] * count, dimensions=[256] * count, segments=[0] * count, lengths=[256] * count,
        offsets=[256 * number for number in range(count)], digests=bytes(16 * count), variants=[0] * count,
    ).SerializeToString()  # fmt: skip
    keys = [TensorKey("", "t19999")]

    def cost(read: Callable[[Manifest], object]) -> int:
        return operations(lambda: read(Manifest(message)))

    assert cost(lambda m: m.row(count - 1)) < count, "no loop in Python"
    assert cost(lambda m: m.rows(m.select([], keys))) < count, "no loop in Python"
    assert cost(lambda m: m.stored()) < 20 * count, "one loop, over shapes"
