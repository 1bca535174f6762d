"""Mutated headers: what we accept, the safetensors package accepts and reads the same; nothing else is ever raised."""

from __future__ import annotations

import json
from typing import Any

import safetensors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from support.fuzzing.file_targets import read_safetensors
from support.malformed import CORPUS, build, entry
from weightd.errors import FormatError
from weightd.types import DTYPE_BITS, FileLayout

QUICK = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), -(2**64)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=6),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner))


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A valid header, in random order, and its data."""
    header: dict[str, Any] = {}
    position = 0
    names = draw(st.lists(st.text(max_size=8).filter(lambda name: name != "__metadata__"), max_size=5, unique=True))
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if DTYPE_BITS[dtype] < 8:
            shape = [*shape, 4]
        length = DTYPE_BITS[dtype]
        for dimension in shape:
            length *= dimension
        header[name] = entry(dtype, shape, [position, position + length // 8])
        position += length // 8
    keys = draw(st.permutations(list(header)))
    result: dict[str, Any] = {key: header[key] for key in keys}
    if draw(st.booleans()):
        result["__metadata__"] = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    return result, bytes(position)


def check(file: bytes) -> FileLayout | None:
    """Our layout, compared with the package's; None where we refuse the file, which must be by a FormatError."""
    try:
        return read_safetensors(file)
    except FormatError:
        return None


@QUICK
@given(checkpoints())
def test_valid_files_are_accepted(case: tuple[dict[str, Any], bytes]) -> None:
    layout = check(build(*case))
    assert layout is not None
    assert layout.metadata == case[0].get("__metadata__")


@QUICK
@given(checkpoints(), st.data())
def test_one_value_changed(case: tuple[dict[str, Any], bytes], data: st.DataObject) -> None:
    header, tail = case
    if header:
        key = data.draw(st.sampled_from(sorted(header)))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra", "whole", "number"]))
        value = data.draw(values)
        if field == "whole":
            header[key] = value
        elif field == "number" and key != "__metadata__":
            place = data.draw(st.sampled_from(["shape", "data_offsets"]))
            if header[key][place]:
                header[key][place][-1] = value
        else:
            header[key][field] = value
    check(build(header, tail + data.draw(st.sampled_from([b"", b"", b"\0"]))))


@QUICK
@given(checkpoints(), st.data())
def test_bytes_changed(case: tuple[dict[str, Any], bytes], data: st.DataObject) -> None:
    file = bytearray(build(*case))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(file)))
        # Bytes with a meaning in JSON are likelier to make another valid header.
        new = data.draw(
            st.binary(max_size=2) | st.sampled_from([b'"', b"\\", b"[", b"]", b"{", b"}", b",", b"0", b"-"])
        )
        file[at : at + data.draw(st.integers(0, 2))] = new
    check(bytes(file))


@QUICK
@given(st.text(max_size=40) | values.map(json.dumps))
@example('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}')
@example('{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}')
@example('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":"\\udfff"}}')
def test_any_text_as_a_header(text: str) -> None:
    check(build(text.encode("utf-8", "surrogatepass")))


@QUICK
@given(st.sampled_from(sorted(CORPUS)), st.data())
def test_corpus_cut_anywhere(case: str, data: st.DataObject) -> None:
    file = CORPUS[case][0]
    check(file[: data.draw(st.integers(0, len(file)))])


def test_package_is_the_judge() -> None:
    """The comparison above can fail: the package refuses what is malformed."""
    try:
        safetensors.deserialize(CORPUS["overlap"][0])
    except SafetensorError:
        return
    raise AssertionError("safetensors accepts overlapping tensors")
