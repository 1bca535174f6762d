"""formats.gguf and formats.split: what ggml's own reader accepts is accepted and read as the package gguf does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
import xxhash

from support.gguf_files import (
    ARRAY,
    BF16,
    BOOL,
    CORPUS,
    F32,
    FLOAT32,
    INT32,
    INT64,
    Q4_0,
    Q4_K,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    VALID,
    array,
    build,
    entry,
    key,
    nested,
    part,
    smollm2,
    split,
    string,
    u32,
    u64,
    whole,
)
from weightd._proto.v1 import handles_pb2
from weightd.errors import FormatError
from weightd.types import DTYPE_BITS, FileLayout, FilePart, TensorSpec
from weightd_daemon.formats import gguf as ours
from weightd_daemon.formats.split import check_parts


def layout(file: bytes, name: str = "model.gguf") -> FileLayout:
    return ours.read_layout(name, len(file), lambda offset, length: file[offset : offset + length])


def metadata(*keys: bytes) -> dict[str, str]:
    found = layout(build(keys=keys)).metadata
    assert found is not None
    return found


@pytest.mark.parametrize("case", CORPUS)
def test_malformed_file_is_refused_with_its_fault(case: str) -> None:
    file, fragment = CORPUS[case]
    with pytest.raises(FormatError) as caught:
        layout(file)
    message = str(caught.value)
    assert message.startswith("model.gguf: ")
    assert fragment in message
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize("file", [b"", b"GG", b"FUGG" + VALID[4:], b"\x80\x02}q\x00."])
def test_what_is_no_gguf_file(file: bytes) -> None:
    with pytest.raises(FormatError, match=r"not a GGUF file|the magic number reaches past"):
        layout(file)


def test_smallest_file() -> None:
    assert layout(VALID) == FileLayout((TensorSpec("a", "F32", (2,), len(VALID) - 8, 8),), {"k": "1"})
    assert layout(build()) == FileLayout((), {})


@pytest.mark.parametrize("kind", gguf.GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_type(kind: gguf.GGMLQuantizationType) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    data = bytes(range(256)) * 20
    file = whole({"a": (F32, (1,), b"abcd"), "b": (kind, (3, 2 * elements), data[: 6 * size])})
    spec = layout(file).tensors[1]
    assert spec.dtype == (kind.name if elements == 1 else f"GGML_{kind.name}")
    assert (spec.shape, spec.length) == ((3, 2 * elements), 6 * size)
    assert file[spec.offset : spec.offset + spec.length] == data[: 6 * size]


def test_wire_has_the_types_of_the_package() -> None:
    """A type that is new in the package needs a number on the wire; test_unknown_to_us is what happens until then."""
    blocks = {f"GGML_{kind.name}": kind for kind, (elements, _) in gguf.GGML_QUANT_SIZES.items() if elements > 1}
    wire = {name.removeprefix("DTYPE_"): number for name, number in handles_pb2.DType.items() if "GGML" in name}
    assert wire == {name: 1000 + kind for name, kind in blocks.items()}
    plain = {kind.name: 8 * size for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items() if elements == 1}
    assert plain.items() <= DTYPE_BITS.items()


def test_unknown_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    file = whole({"a": (Q4_K, (256,), bytes(144))})
    monkeypatch.setattr(ours, "_DTYPES", ours._DTYPES - {"DTYPE_GGML_Q4_K"})
    with pytest.raises(
        FormatError, match="tensor 'a': has type GGML_Q4_K, which this version of weightd does not know"
    ):
        layout(file)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FormatError, match=r"^model\.gguf: .*pip install '\.\[gguf\]' in weightd's checkout$"):
        layout(VALID)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 5), (0,), (3, 0), (0, 3, 5)])
def test_shapes_are_row_major(shape: tuple[int, ...], tmp_path: Path) -> None:
    count = 1
    for dimension in shape:
        count *= dimension
    file = whole({"a": (F32, shape, bytes(4 * count)), "b": (BF16, (2,), b"abcd")})
    first, second = layout(file).tensors
    assert (first.shape, first.length) == (shape, 4 * count)
    assert file[second.offset : second.offset + 4] == b"abcd"
    (tmp_path / "m.gguf").write_bytes(file)
    theirs = gguf.GGUFReader(tmp_path / "m.gguf").tensors
    assert tuple(theirs[0].shape.tolist()[::-1]) == shape
    assert [tensor.data_offset for tensor in theirs] == [first.offset, second.offset]


@pytest.mark.parametrize("alignment", [1, 2, 8, 32, 64, 4096, 16 << 20])
def test_alignment(alignment: int) -> None:
    file = whole({"a": (F32, (3,), b"x" * 12), "b": (F32, (1,), b"wxyz")}, alignment=alignment)
    for trailing in (file[: len(file) - -4 % alignment], file, file + b"more"):
        first, second = layout(trailing).tensors
        assert first.offset % alignment == second.offset % alignment == 0
        assert (file[first.offset : first.offset + 12], file[second.offset : second.offset + 4]) == (b"x" * 12, b"wxyz")


def test_version_2() -> None:
    assert layout(whole({"a": (F32, (1,), b"wxyz")}, version=2)).tensors[0].name == "a"


@pytest.mark.parametrize("name", ["", "a\0b", "\x1b[2J", "\U0001f600", "n" * 4096])
def test_odd_names_are_names(name: str) -> None:
    assert layout(whole({name: (F32, (1,), b"wxyz")})).tensors[0].name == name


def test_metadata_scalars() -> None:
    found = metadata(
        key("general.name", STRING, "Ünïcode\n\0"),
        key("empty", STRING, ""),
        key("u8", UINT8, 255),
        key("i64", INT64, -(2**63)),
        key("third", FLOAT32, 1 / 3),
        key("small", FLOAT32, 1e-5),
        key("nan", FLOAT32, float("nan")),
        key("yes", BOOL, True),
        string("also yes") + u32(BOOL) + b"\2",
        key("no", BOOL, False),
    )
    assert found == {
        "general.name": "Ünïcode\n\0", "empty": "", "u8": "255", "i64": "-9223372036854775808",
        "third": "0.3333333432674408", "small": "9.999999747378752e-06", "nan": "nan",
        "yes": "true", "also yes": "true", "no": "false",
    }  # fmt: skip


def test_metadata_arrays_are_a_line_with_their_digest() -> None:
    words = [f"token {i}" for i in range(1000)]
    found = metadata(
        key("words", ARRAY, array(STRING, words)),
        key("numbers", ARRAY, array(INT32, [1, -2, 3])),
        key("none", ARRAY, array(FLOAT32, [])),
        key("nested", ARRAY, nested(4)),
        key("raw", ARRAY, u32(STRING) + u64(1) + string(b"\xff")),  # tokens of a vocabulary need not be UTF-8
    )

    def line(elements: str, encoded: bytes) -> str:
        return f"[{elements}] xxh3_128:{xxhash.xxh3_128(encoded).hexdigest()}"

    assert found == {
        "words": line("1000 string", b"".join(map(string, words))),
        "numbers": line("3 int32", array(INT32, [1, -2, 3])[12:]),
        "none": line("0 float32", b""),
        "nested": line("1 array", nested(3)),
        "raw": line("1 string", string(b"\xff")),
    }


def test_metadata_has_a_limit() -> None:
    limit = ours.MAX_METADATA_BYTES
    text = "\u00e9" * (limit // 2 - 4)
    assert metadata(key("k" * 3, STRING, text), key("four", UINT8, 1))["four"] == "1"
    with pytest.raises(FormatError, match=f"'five5': metadata holds more than the {limit} bytes"):
        metadata(key("k" * 3, STRING, text), key("five5", UINT8, 1))


def test_header_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    file = build(keys=[key("k", ARRAY, array(UINT8, [0] * 5000))], data=bytes(5000))
    monkeypatch.setattr(ours, "MAX_HEADER_BYTES", 5000)
    with pytest.raises(FormatError, match="key 'k': an array of 5000 elements reaches past byte 5000"):
        layout(file)
    monkeypatch.setattr(ours, "MAX_HEADER_BYTES", 5100)
    assert layout(file).metadata


def test_values_across_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, however the file is cut into windows, and never more than a window, or one string, at a time."""
    words = ["x" * (i % 50) for i in range(300)]
    keys = [key("words", ARRAY, array(STRING, words)), key("long", STRING, "y" * 300), key("n", UINT32, 7)]
    file = whole({f"t{i}": (F32, (3,), b"abcdefghijkl") for i in range(20)}, keys) + bytes(10_000)
    expected = layout(file)
    for window in (16, 17, 64, 1000):
        monkeypatch.setattr(ours, "_WINDOW", window)
        calls: list[tuple[int, int]] = []

        def read(offset: int, length: int) -> bytes:
            calls.append((offset, length))  # noqa: B023  # called in this turn only
            return file[offset : offset + length]

        assert ours.read_layout("x", len(file), read) == expected
        assert max(length for _, length in calls) <= max(window, 300)
        assert max(offset + length for offset, length in calls) <= expected.tensors[0].offset + window


@pytest.mark.parametrize("kept", [0, 5, 40])
def test_file_that_shrinks_while_it_is_read(kept: int) -> None:
    with pytest.raises(FormatError, match="the file was changed"):
        ours.read_layout("x", len(VALID), lambda offset, length: VALID[:kept][offset : offset + length])


def test_hostile_file_name_in_messages() -> None:
    with pytest.raises(FormatError) as caught:
        layout(b"", name="a\nb\x1b" + "c" * 5000)
    assert str(caught.value).startswith("'a\\nb\\x1bccc")
    assert len(str(caught.value)) < 400


@pytest.mark.timeout(120)
def test_hostile_headers_take_no_hostile_time() -> None:
    # About two seconds; whatever were quadratic would run into the limit.
    strings = build(keys=[key("k", ARRAY, u32(STRING) + u64(1_000_000) + bytes(8_000_000))])
    assert layout(strings).metadata
    arrays = build(keys=[key("k", ARRAY, u32(ARRAY) + u64(300_000) + bytes(12 * 300_000))])
    assert layout(arrays).metadata
    with pytest.raises(FormatError, match="tensor '': is there twice"):
        layout(build([entry("", (0,))] * 100_000))


def test_real_file_is_read_as_the_package_reads_it() -> None:
    path = smollm2()
    read_bytes = 0
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            nonlocal read_bytes
            read_bytes += length
            file.seek(offset)
            return file.read(length)

        found = ours.read_layout(path.name, path.stat().st_size, read)
    assert read_bytes < 5 << 20  # of 98 MB: nothing of the data but what is in the last window
    reader = gguf.GGUFReader(path)
    assert [(spec.name, spec.dtype.removeprefix("GGML_"), spec.offset, spec.length) for spec in found.tensors] == [
        (tensor.name, tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes) for tensor in reader.tensors
    ]
    assert [spec.shape for spec in found.tensors] == [tuple(t.shape.tolist()[::-1]) for t in reader.tensors]
    assert found.metadata is not None
    assert found.metadata.keys() == {name for name in reader.fields if not name.startswith("GGUF.")}
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["llama.attention.head_count_kv"] == "3"
    assert found.metadata["tokenizer.ggml.tokens"].startswith("[49152 string] xxh3_128:")


class TestParts:
    @staticmethod
    def check(*files: tuple[str, bytes]) -> None:
        check_parts([(name, layout(file, name)) for name, file in files])

    @staticmethod
    def one(number: int, parts: int = 2, tensors: int = 2, count: int = 1) -> bytes:
        names = [f"t{number}.{i}" for i in range(count)]
        return whole({name: (Q4_0, (32,), bytes(18)) for name in names}, part(number, parts, tensors))

    def test_what_a_file_says(self, tmp_path: Path) -> None:
        assert layout(self.one(1)).part == FilePart(1, 2, 2)
        assert layout(VALID).part is None
        assert layout(build(keys=[key("split.count", UINT16, 1)])).part is None
        for number, path in enumerate(split(tmp_path, "m", [{}, {"a": (F32, (1,), b"abcd")}])):
            assert layout(path.read_bytes()).part == FilePart(number, 2, 1)

    def test_all_parts_in_any_order(self) -> None:
        self.check(("b", self.one(1)), ("a", self.one(0)))
        self.check(("a", self.one(0, tensors=3, count=0)), ("b", self.one(1, tensors=3, count=3)))
        self.check(("x/a", self.one(0)), ("x/b", self.one(1)), ("y/a", self.one(1)), ("y/b", self.one(0)), ("z", VALID))

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ([("b", 1, 2, 2)], "b: is one of 2 parts, but those given are 2; give all of them"),
            ([("a", 0, 2, 2), ("b", 0, 2, 2)], "a: is one of 2 parts, but those given are 1, 1;"),
            ([("a", 0, 2, 2), ("b", 1, 3, 2)], "b: is one of 3 parts with 2 tensors, but a is one of 2 parts with 2;"),
            ([("a", 0, 2, 2), ("b", 1, 2, 3)], "they belong to different checkpoints"),
            ([("a", 0, 2, 3), ("b", 1, 2, 3)], "a: says that its 2 parts hold 3 tensors, but they hold 2"),
            ([("x/a", 0, 2, 2), ("y/b", 1, 2, 2)], "x/a: is one of 2 parts, but those given are 1;"),
            ([("a", 0, 65535, 2)], "a: is one of 65535 parts, but"),
        ],
    )
    def test_what_does_not_fit_together(self, files: Sequence[tuple[str, int, int, int]], words: str) -> None:
        with pytest.raises(FormatError) as caught:
            self.check(*((name, self.one(number, parts, tensors)) for name, number, parts, tensors in files))
        assert words in str(caught.value)
