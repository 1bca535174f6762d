"""Mutations of inputs, for hypothesis: some bytes changed, inserted, removed, repeated, or taken from another input."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

_TOKENS = (
    b"\0", b"\xff" * 8, b"\x01" + b"\0" * 7, b"\0" * 7 + b"\x80", b"\x80\x80", b"18446744073709551616", b"-1", b"0",
    b"1e999", b"NaN", b"null", b"true", b'"', b"\\ud800", b"[", b"]", b"{", b"}", b",", b":", b"=", b"\n", b"../",
    b"GGUF", b"b3:",
)  # fmt: skip
"""What has a meaning somewhere: likelier than random bytes to be read a little further."""


@st.composite
def mutated(draw: st.DrawFn, inputs: Sequence[bytes]) -> bytes:
    """One of some inputs, with one to four mutations."""
    data = bytearray(draw(st.sampled_from(inputs)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 1, 2, 4, 8]))
        kind = draw(st.sampled_from(["byte", "bit", "token", "remove", "repeat", "cut", "other"]))
        if kind == "byte":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=2))
        elif kind == "bit" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "token":
            data[at : at + length] = draw(st.sampled_from(_TOKENS))
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 8))
        elif kind == "cut":
            del data[at:]
        elif kind == "other":
            other = draw(st.sampled_from(inputs))
            begin = draw(st.integers(0, len(other)))
            data[at:at] = other[begin : begin + 4 * length]
    return bytes(data)
