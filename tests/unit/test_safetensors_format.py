"""formats.safetensors: accepts what the safetensors package accepts, refuses the rest by name."""

from __future__ import annotations

import ctypes
import json
from functools import partial
from typing import TYPE_CHECKING

import pytest
import safetensors
from safetensors import SafetensorError

from support.counting import operations
from support.malformed import CORPUS, VALID, build, entry
from weightd.errors import FormatError
from weightd.types import DTYPE_BITS, FileLayout
from weightd_daemon.formats import safetensors as ours

if TYPE_CHECKING:
    from pathlib import Path

# Files that safetensors 0.8 takes and we refuse; the module's docstring lists them all.
STRICTER = {
    "leading_space",
    "tensor_twice",
    "tensor_twice_escaped",
    "metadata_key_twice",
    "entry_array",
    "dtype_object",
    "shape_65_dimensions",
    "name_5000_bytes",
}


def package_spec(
    dtype: str, shape: list[int], data: bytes
) -> tuple[safetensors.TensorSpec, ctypes.Array[ctypes.c_char]]:
    """The package's description of a tensor, and the buffer that must outlive it."""
    buffer = ctypes.create_string_buffer(data, max(len(data), 1))
    pointer = ctypes.addressof(buffer)
    return safetensors.TensorSpec(dtype=dtype, shape=shape, data_ptr=pointer, data_len=len(data)), buffer


def layout(file: bytes, name: str = "model.safetensors") -> FileLayout:
    return ours.read_layout(name, len(file), lambda offset, length: file[offset : offset + length])


@pytest.mark.parametrize("case", CORPUS)
def test_malformed_file_is_refused_with_its_fault(case: str) -> None:
    file, fragment = CORPUS[case]
    with pytest.raises(FormatError) as caught:
        layout(file)
    message = str(caught.value)
    assert message.startswith("model.safetensors: ")
    assert fragment in message
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize("case", CORPUS)
def test_corpus_is_malformed_for_safetensors_too(case: str) -> None:
    file, _ = CORPUS[case]
    if case in STRICTER:
        safetensors.deserialize(file)
    else:
        with pytest.raises(SafetensorError):
            safetensors.deserialize(file)


def test_smallest_file() -> None:
    (spec,) = layout(VALID).tensors
    assert spec == ("a", "U8", (2,), len(VALID) - 2, 2)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype(dtype: str) -> None:
    length = DTYPE_BITS[dtype]  # 8 elements
    file = build({"t": entry(dtype, [2, 4], [0, length])}, bytes(range(length)))
    assert [(name, value["shape"]) for name, value in safetensors.deserialize(file)] == [("t", [2, 4])]
    (spec,) = layout(file).tensors
    assert (spec.dtype, spec.shape, spec.length) == (dtype, (2, 4), length)
    assert file[spec.offset : spec.offset + spec.length] == bytes(range(length))


def test_package_knows_no_dtype_that_we_do_not() -> None:
    with pytest.raises(SafetensorError, match="expected one of") as caught:
        safetensors.deserialize(build({"t": entry("NONE")}, b"ab"))
    listed = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    assert {name.strip("`") for name in listed.split(", ")} == set(DTYPE_BITS)


@pytest.mark.parametrize(
    ("dtype", "shape", "length"),
    [
        ("bool", [3], 3),
        ("uint8", [3], 3),
        ("int8", [3], 3),
        ("float8_e4m3fn", [3], 3),
        ("float8_e5m2", [3], 3),
        ("float8_e8m0fnu", [3], 3),
        ("float4_e2m1fn_x2", [3], 3),
        ("int16", [3], 6),
        ("uint16", [3], 6),
        ("float16", [3], 6),
        ("bfloat16", [3], 6),
        ("int32", [3], 12),
        ("uint32", [3], 12),
        ("float32", [], 4),
        ("float32", [0, 7], 0),
        ("float64", [1, 3], 24),
        ("complex64", [3], 24),
        ("int64", [3], 24),
        ("uint64", [3], 24),
    ],
)
def test_what_the_package_writes(dtype: str, shape: list[int], length: int) -> None:
    data = bytes(range(length))
    spec, _keep = package_spec(dtype, shape, data)
    other, _keep_other = package_spec("uint8", [1], b"z")
    file = safetensors.serialize({"t": spec, "o": other}, {"format": "pt"})
    got = layout(file)
    assert got.metadata == {"format": "pt"}
    theirs = dict(safetensors.deserialize(file))
    assert {spec.name for spec in got.tensors} == set(theirs) == {"t", "o"}
    for tensor in got.tensors:
        assert tensor.dtype == theirs[tensor.name]["dtype"]
        assert list(tensor.shape) == theirs[tensor.name]["shape"]
        assert file[tensor.offset : tensor.offset + tensor.length] == bytes(theirs[tensor.name]["data"])


def test_file_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    spec, _keep = package_spec("float32", [2], bytes(8))
    safetensors.serialize_file({"w": spec}, str(path), None)
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        got = ours.read_layout("x.safetensors", path.stat().st_size, read)
    assert got.metadata is None
    assert [tensor.name for tensor in got.tensors] == ["w"]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [({}, {}), (None, None), ({"format": "pt", "é": "\n"}, {"format": "pt", "é": "\n"})],
)
def test_metadata(metadata: dict[str, str] | None, expected: dict[str, str] | None) -> None:
    file = build({"__metadata__": metadata, "a": entry()}, b"ab")
    safetensors.deserialize(file)
    assert layout(file).metadata == expected


def test_no_tensors_at_all() -> None:
    assert layout(build(b"{}")) == FileLayout((), None)
    assert layout(build({"__metadata__": {"a": "b"}})) == FileLayout((), {"a": "b"})


def test_order_is_by_offset_then_header() -> None:
    header = {
        "z2": entry(shape=[0], offsets=[2, 2]),
        "b": entry(offsets=[2, 4]),
        "z1": entry("F32", [0, 3], [2, 2]),
        "a": entry(),
        "end": entry("F64", [0], [4, 4]),
    }
    assert [spec.name for spec in layout(build(header, b"abcd")).tensors] == ["a", "z2", "z1", "b", "end"]


@pytest.mark.parametrize("name", ["", "a\0b", "\x1b[2J", "\U0001f600", "a/../b", "[[[{", '"\\', "n" * 4096])
def test_odd_names_are_names(name: str) -> None:
    file = build({name: entry()}, b"ab")
    safetensors.deserialize(file)
    assert layout(file).tensors[0].name == name


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":{"x":[[[{"y":1e-9999}]]],"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{"a":{"dtype":"\\u0055\\u0038","shape":[2],"data_offsets":[0,2],"n":123456789012345678901234567890}}',
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":' + b"[" * 125 + b"]" * 125 + b"}}",
        b'{"a\\ud83d\\ude00":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b'{ "a" : {\n"dtype":"U8",\t"shape":[ 2 ],"data_offsets":[0 , 2]}}   \r\n',
    ],
)
def test_oddities_that_safetensors_takes(raw: bytes) -> None:
    file = build(raw, b"ab")
    safetensors.deserialize(file)
    assert len(layout(file).tensors) == 1


def test_header_length_that_looks_like_a_pickle() -> None:
    raw = json.dumps({"a": entry()}).encode().ljust(0x280)  # 80 02 in little-endian order
    file = build(raw, b"ab")
    assert file.startswith(b"\x80\x02")
    assert layout(file).tensors[0].name == "a"


def test_longest_header() -> None:
    head = b'{"a":' + json.dumps(entry()).encode() + b"}"
    file = build(head.ljust(ours.MAX_HEADER_BYTES), b"ab")
    assert len(layout(file).tensors) == 1
    with pytest.raises(FormatError, match="over the limit"):
        layout(build(head.ljust(ours.MAX_HEADER_BYTES + 1), b"ab"))


def test_too_many_tensors_or_values(monkeypatch: pytest.MonkeyPatch) -> None:
    file = build({str(i): entry(shape=[0], offsets=[0, 0]) for i in range(11)})
    monkeypatch.setattr(ours, "MAX_TENSORS", 11)
    assert len(layout(file).tensors) == 11
    monkeypatch.setattr(ours, "MAX_TENSORS", 10)
    with pytest.raises(FormatError, match="11 tensors, more than the 10"):
        layout(file)
    monkeypatch.setattr(ours, "MAX_VALUES", 20)
    with pytest.raises(FormatError, match="JSON values, more than the 20"):
        layout(file)


def test_nothing_is_read_past_what_was_checked() -> None:
    calls: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        calls.append((offset, length))
        return build(b"{}", length=2**40)[offset : offset + length]

    with pytest.raises(FormatError):
        ours.read_layout("x", 10, read)
    assert calls == [(0, 10)]


@pytest.mark.parametrize("kept", [0, 5, 20])
def test_file_that_shrinks_while_it_is_read(kept: int) -> None:
    calls = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal calls
        calls += 1
        file = VALID if calls == 1 and kept == 20 else VALID[:kept]
        return file[offset : offset + length]

    with pytest.raises(FormatError, match="was changed"):
        ours.read_layout("x", len(VALID), read)


def test_hostile_file_name_in_messages() -> None:
    with pytest.raises(FormatError) as caught:
        layout(b"", name="a\nb\x1b" + "c" * 5000)
    assert str(caught.value).startswith("'a\\nb\\x1bccc")
    assert len(str(caught.value)) < 400


@pytest.mark.timeout(120)
def test_hostile_headers_take_no_hostile_time() -> None:
    # Strings full of brackets and escaped quotes: the exact depth scan, and an open string. Both are scanned in about a
    # second; one that begins again at each bracket would run into the limit.
    for raw in (b'{"' + b'\\"[' * 300_000, b'{"a":"' + b"[{" * 500_000 + b'"}', b'{"a":' + b"[{" * 500_000):
        with pytest.raises(FormatError):
            layout(build(raw))


def test_many_tensors_are_quick() -> None:
    def read(count: int) -> None:
        header = {f"model.layers.{i}.weight": entry("BF16", [64, 2], [i * 256, i * 256 + 256]) for i in range(count)}
        raw = build(header)
        got = ours.read_layout("x", len(raw) + count * 256, lambda offset, length: raw[offset : offset + length])
        assert len(got.tensors) == count

    few, many = (operations(partial(read, count)) for count in (250, 2_000))
    assert many < 9 * few, "quadratic would be 64"
    read(120_000)


def test_metadata_has_a_limit() -> None:
    limit = ours.MAX_METADATA_BYTES
    text = "\u00e9" * (limit // 2 - 1) + "x"  # counted in bytes, the key too
    assert layout(build({"__metadata__": {"k": text}})).metadata == {"k": text}
    with pytest.raises(FormatError, match=f"__metadata__ holds {limit + 1} bytes, more than the {limit}"):
        layout(build({"__metadata__": {"kk": text}}))
