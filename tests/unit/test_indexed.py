"""weightd_daemon.loader.indexed: whose tensor counts where files have one name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from weightd._references.index import MAX_JSON_BYTES, MAX_VALUES, weight_map
from weightd.errors import FormatError, WeightdError
from weightd.types import TensorSpec
from weightd_daemon.loader.indexed import indexes, owned
from weightd_daemon.loader.source import LoaderSource


def specs(*names: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, "U8", (1,), number, 1) for number, name in enumerate(names))


def names(*files: tuple[str, str, str], **indexes: dict[str, str]) -> list[str]:
    found = owned([(component, file, specs(*tensors)) for component, file, tensors in files], indexes.get)
    return ["".join(spec.name for spec in tensors) for tensors in found]


def test_all_count_that_are_in_one_file_only() -> None:
    assert names(("", "f", "ab"), ("", "g", "cd"), ("u", "f", "ab")) == ["ab", "cd", "ab"]
    # Not in the index, or said to be elsewhere: there is no doubt which it is.
    assert names(("u", "f", "ab"), ("u", "g", "c"), u={"a": "g", "x": "f"}) == ["ab", "c"]


def test_the_index_of_the_component_decides() -> None:
    files = ("u", "f", "abc"), ("u", "g", "bcd"), ("u", "h", "ce"), ("v", "f", "b")
    assert names(*files, u={"b": "g", "c": "h"}, v={"b": "x"}) == ["a", "bd", "ce", "b"]
    assert names(*files, u={"b": "f", "c": "f"}) == ["abc", "d", "e", "b"]


@pytest.mark.parametrize(
    ("indexes", "why"),
    [
        ({}, "u/f2: tensor 'b' is in another file of component 'u' too (u/f1)"),
        ({"v": {"b": "f1"}}, "u/f2: tensor 'b' is in another file of component 'u' too (u/f1)"),
        ({"u": {"a": "f1"}}, "and the index does not say whose counts"),
        (
            {"u": {"b": "f3"}},
            "u/f2: tensor 'b' is in another file of component 'u' too, and the index says",
        ),
    ],
)
def test_what_nobody_decides(indexes: dict[str, dict[str, str]], why: str) -> None:
    with pytest.raises(FormatError) as caught:
        names(("u", "f1", "ab"), ("u", "f2", "bc"), ("u", "f3", "d"), **indexes)
    assert why in str(caught.value)


def test_an_index_is_read_once_and_only_where_one_has_to_decide() -> None:
    read: list[str] = []

    def index(component: str) -> dict[str, str]:
        read.append(component)
        return {"a": "f", "b": "g"}

    places = ("", "f", "ab"), ("", "g", "c"), ("v", "f", "ab"), ("u", "f", "ab"), ("u", "g", "ab"), ("v", "g", "b")
    found = owned([(component, file, specs(*tensors)) for component, file, tensors in places], index)
    assert [spec.name for tensors in found for spec in tensors] == [*"abcaabb"]
    assert read == ["v", "u"]


def test_the_indexes_of_a_load_have_a_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:

        def source(name: str) -> LoaderSource:
            path = tmp_path / name
            path.write_bytes(b'{"weight_map": {"a": "f.safetensors"}}')  # 38 bytes
            return LoaderSource(name, stack.enter_context(path.open("rb")).fileno())

        monkeypatch.setattr("weightd_daemon.loader.indexed.MAX_INDEX_BYTES", 2 * 38)
        read = indexes({name: source(name) for name in "abc"})
        assert read("d") is None
        assert read("a") == read("c") == {"a": "f.safetensors"}
        with pytest.raises(FormatError, match=r"^b: over the limit of 76 bytes that the indexes of a load may have"):
            read("b")


@pytest.mark.parametrize("values", [b"{},", b"[],", b"0,"])
def test_an_index_has_a_limit_of_values(values: bytes) -> None:
    """Each may take tens of bytes of memory."""
    raw = b'{"weight_map": {"a": "f.safetensors"}, "more": [' + values * MAX_VALUES + b"0]}"
    assert len(raw) < MAX_JSON_BYTES
    with pytest.raises(FormatError, match=r"^the index: holds about \d+ JSON values, more than the \d+"):
        weight_map("the index", raw)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff", b"[" * 100_000, b" " * 10]
    + [json.dumps({"weight_map": {"a": file}}).encode() for file in ("", "/a.safetensors", "../a.safetensors", "a")]
    + [json.dumps({"weight_map": {"a": file}}).encode() for file in ("a/./b.safetensors", "a.bin", "a\0.safetensors")]
    + [b" " * (MAX_JSON_BYTES + 1)],
    ids=lambda raw: repr(raw[:30]),
)  # fmt: skip
def test_hostile_indexes(raw: bytes) -> None:
    with pytest.raises(WeightdError) as caught:
        weight_map("the index", raw)
    assert str(caught.value).startswith("the index: ")
