"""Mutated GGUF files: what we accept, the package gguf reads the same; nothing but a FormatError is ever raised."""

from __future__ import annotations

import gguf
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from support.fuzzing.file_targets import read_gguf
from support.gguf_files import ARRAY, BOOL, CORPUS, FLOAT32, INT64, STRING, UINT32, array, build, entry, key, whole
from weightd.errors import FormatError
from weightd.types import FileLayout

QUICK = settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])

names = st.text(max_size=8)
keys_of = st.one_of(
    st.tuples(st.just(STRING), st.text(max_size=9)),
    st.tuples(st.just(UINT32), st.integers(0, 2**32 - 1)),
    st.tuples(st.just(INT64), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just(FLOAT32), st.floats(width=32)),
    st.tuples(st.just(BOOL), st.booleans()),
    st.tuples(st.just(ARRAY), st.lists(st.text(max_size=4), max_size=4).map(lambda items: array(STRING, items))),
    st.tuples(st.just(ARRAY), st.lists(st.integers(0, 9), max_size=4).map(lambda items: array(UINT32, items))),
)
sizes = st.one_of(
    st.integers(0, 300), st.sampled_from([2**16, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A well-formed file."""
    tensors = {}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        kind = draw(st.sampled_from(list(gguf.GGML_QUANT_SIZES)))
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        rows = draw(st.lists(st.integers(0, 3), max_size=3))
        blocks = draw(st.integers(0, 3))
        count = blocks
        for row in rows:
            count *= row
        tensors[name] = (int(kind), (*rows, blocks * elements), bytes(count * size))
    found = draw(st.dictionaries(names.filter(bool), keys_of, max_size=3))
    keys = [key(name, *value) for name, value in found.items()]
    return whole(tensors, keys, draw(st.sampled_from([1, 8, 32, 128])), draw(st.sampled_from([2, 3])))


def check(file: bytes) -> FileLayout | None:
    """Our layout, compared with the package's; None where we refuse the file, which must be by a FormatError."""
    try:
        return read_gguf(file)
    except FormatError:
        return None


@QUICK
@given(file=files())
def test_well_formed_files_are_accepted(file: bytes) -> None:
    assert check(file) is not None


@QUICK
@given(file=files(), data=st.data())
def test_bytes_changed(file: bytes, data: st.DataObject) -> None:
    changed = bytearray(file)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, len(changed)))
        # Small numbers are likelier to make another valid header, as all lengths and types are such.
        new = data.draw(st.binary(max_size=2) | st.integers(0, 12).map(lambda number: bytes([number])))
        changed[at : at + data.draw(st.integers(0, 2))] = new
    assume(b"GGUF." not in changed[8:])  # the package's reader has keys of its own, and refuses theirs
    check(bytes(changed))


@QUICK
@given(
    dimensions=st.lists(st.integers(0, 8) | sizes, max_size=5),
    kind=st.sampled_from([0, 0, 2, 24]) | st.integers(0, 45),
    offset=st.sampled_from([0, 0, 0, 32]) | sizes,
    counts=st.tuples(st.none() | sizes, st.none() | sizes) | st.just((None, None)),
    alignment=st.sampled_from([1, 8, 32, 64, 128, 0, 3, 2**31]),
)
def test_any_numbers_in_a_directory(
    dimensions: list[int], kind: int, offset: int, counts: tuple[int | None, int | None], alignment: int
) -> None:
    file = build(
        [entry("a", dimensions, kind, offset)],
        [key("general.alignment", UINT32, alignment)],
        bytes(600),
        tensor_count=counts[0],
        key_count=counts[1],
    )
    check(file)


@QUICK
@given(case=st.sampled_from(sorted(CORPUS)), data=st.data())
def test_corpus_cut_anywhere(case: str, data: st.DataObject) -> None:
    file = CORPUS[case][0]
    check(file[: data.draw(st.integers(0, len(file)))])
