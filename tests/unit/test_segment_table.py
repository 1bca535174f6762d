"""Segments by the names of what is wanted: as a walk over the manifest would find them, and without one."""

from __future__ import annotations

import contextlib
import random

import pytest

from support.counting import operations
from weightd.errors import NotFoundError
from weightd_daemon.handles import segment_table
from weightd_daemon.handles.segment_table import HandleSegmentTable

Row = tuple[str, str, int | None]


def rows(count: int, segments: int = 7) -> list[Row]:
    """Tensors of two components, some of one name, every tenth without bytes."""
    return [("ab"[n % 2], f"t{n // 2}", None if n % 10 == 9 else n % segments) for n in range(count)]


def test_segments_are_those_of_the_rows() -> None:
    made = rows(1000)
    table, chance = HandleSegmentTable(made), random.Random(7)
    for _ in range(200):
        wanted = chance.sample(made, chance.randrange(1, 40))
        there = {segment for _, _, segment in wanted if segment is not None}
        assert table.find([], {(component, name) for component, name, _ in wanted}) == sorted(there)
    assert table.find(["a"], []) == sorted({segment for component, _, segment in made if component == "a"} - {None})
    assert table.find(["a", "a", "b"], []) == list(range(7))
    assert table.find([], []) == []


def test_a_tensor_without_bytes_needs_no_segment() -> None:
    assert HandleSegmentTable([("", "empty", None), ("", "full", 3)]).find([], [("", "empty")]) == []
    assert HandleSegmentTable([("", "empty", None)]).find([""], []) == []


def test_names_that_are_not_there_are_named() -> None:
    table = HandleSegmentTable(rows(100))
    with pytest.raises(NotFoundError, match="component 'c' is not in the checkpoint; it has 'a', 'b'"):
        table.find(["a", "c"], [])
    with pytest.raises(NotFoundError, match="tensor 'no' of component 'a' is not in the checkpoint"):
        table.find([], [("a", "t1"), ("a", "no")])
    with pytest.raises(NotFoundError, match="tensor 't1' is not in the checkpoint"):
        table.find([], [("", "t1")])
    with pytest.raises(NotFoundError, match="tensor 't1' is not in the checkpoint"):
        HandleSegmentTable(()).find([], [("", "t1")])


def test_tensors_of_one_hash_get_the_segments_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_table, "hash", lambda _: 7, raising=False)
    table = HandleSegmentTable([("", "one", 2), ("", "two", 5), ("", "none", None)])
    assert table.find([], [("", "one")]) == [2, 5]


@pytest.mark.parametrize("name", ["t1", "not there"])
def test_asking_costs_the_same_however_many_there_are(name: str) -> None:
    def ask(table: HandleSegmentTable) -> int:
        def find() -> None:
            with contextlib.suppress(NotFoundError):
                table.find([], [("a", name)])

        return operations(find)

    assert ask(HandleSegmentTable(rows(100))) == ask(HandleSegmentTable(rows(100_000)))


def test_a_component_costs_its_segments_however_often_it_is_named() -> None:
    few, many = HandleSegmentTable(rows(100)), HandleSegmentTable(rows(100_000))
    once, often = ["a"], ["a"] * 20_000
    assert operations(lambda: few.find(once, [])) == operations(lambda: many.find(often, []))
