"""What a client makes of a manifest's views: those that are odd are errors, those that cannot be used are left out."""

from __future__ import annotations

from typing import Any

import pytest

import weightd
from weightd import _fused
from weightd._manifest import ListedView, Manifest
from weightd._proto.v1 import handles_pb2
from weightd.types import TensorInfo, TensorKey

STEM = "model.layers.0.self_attn"
NAMES = [f"{STEM}.{part}_proj.weight" for part in "qkv"]
FUSED = f"{STEM}.qkv_proj.weight"


def info(number: int, name: str, **changed: Any) -> TensorInfo:
    """Tensor `number` of 512 bytes, behind the one before it."""
    at = TensorInfo("", name, "F32", (2, 64), 3, 1024 + 512 * number, 512, b"", 0, 0)
    return at._replace(**changed)


ROWS = [info(number, name) for number, name in enumerate(NAMES)]
VIEW = ListedView("", FUSED, (0, 1, 2), (6, 64))


def views(
    *listed: ListedView, rows: list[TensorInfo] = ROWS, attached: Any = None, copies: Any = ()
) -> dict[TensorKey, _fused.View]:
    there = {TensorKey(row.component, row.name): row for row in (rows if attached is None else attached)}
    return _fused.views(listed, rows, there, dict(copies))


def test_a_view_is_as_long_as_its_members_together() -> None:
    (view,) = views(VIEW).values()
    assert view.view == weightd.types.DerivedView("", FUSED, tuple(NAMES), (6, 64))
    assert view.info == TensorInfo("", FUSED, "F32", (6, 64), 3, 1024, 1536, b"", 0, 0)
    assert view.copy == 0


def test_a_view_needs_all_of_its_members() -> None:
    assert views(VIEW, attached=ROWS[:2]) == {}


def test_a_view_lies_in_the_mapping_of_its_members() -> None:
    keys = [TensorKey("", name) for name in NAMES]
    (view,) = views(VIEW, copies=dict.fromkeys(keys, 2)).values()
    assert view.copy == 2
    assert views(VIEW, copies={keys[1]: 1}) == {}


@pytest.mark.parametrize(
    ("listed", "rows", "says"),
    [
        (VIEW._replace(rows=(0, 1, 3)), ROWS, "outside the 3 tensors"),
        (VIEW._replace(rows=()), ROWS, "outside the 3 tensors"),
        (VIEW._replace(rows=(0, 2, 1)), ROWS, "one behind the other"),
        (VIEW._replace(rows=(0, 0, 1)), ROWS, "one behind the other"),
        (VIEW, [*ROWS[:2], info(2, NAMES[2], segment=4)], "one behind the other"),
        (VIEW, [*ROWS[:2], info(2, NAMES[2], dtype="I32")], "several components or dtypes"),
        (VIEW, [*ROWS[:2], info(2, NAMES[2], component="b")], "several components or dtypes"),
        (VIEW._replace(component="b"), ROWS, "several components or dtypes"),
        (VIEW._replace(shape=(6, 65)), ROWS, r"1536 bytes, which are no F32 of shape \[6, 65\]"),
        (VIEW._replace(shape=(-6, -64)), ROWS, "1536 bytes"),
        (VIEW._replace(shape=()), ROWS, "1536 bytes"),
        (VIEW._replace(name=NAMES[0]), ROWS, "a name that is taken"),
    ],
)
def test_an_odd_view_is_an_error(listed: ListedView, rows: list[TensorInfo], says: str) -> None:
    with pytest.raises(weightd.ServerError, match=says) as caught:
        views(listed, rows=rows)
    assert repr(listed.name) in str(caught.value)


def test_a_view_that_is_listed_twice_is_an_error() -> None:
    with pytest.raises(weightd.ServerError, match="taken"):
        views(VIEW, VIEW)


def test_a_view_of_no_component_is_an_error() -> None:
    message = handles_pb2.DerivedView(name=FUSED, component=1, members=[0, 1, 2], shape=[6, 64])
    manifest = handles_pb2.Manifest(components=[""], views=[message])
    with pytest.raises(weightd.ServerError, match="component number 1 of 1"):
        _ = Manifest(manifest.SerializeToString()).views
    manifest.views[0].component = 0
    assert Manifest(manifest.SerializeToString()).views == (VIEW,)
