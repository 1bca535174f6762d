"""A failure at some of the named points; all of them are tried by `make faults`, and by `make test-all`."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from failpoints.injection import ACTIONS
from failpoints.matrix import tried
from failpoints.points import POINTS, Point
from failpoints.scene import LostError, Scene
from support.backends import HOST
from support.daemon import eventually
from weightd import _failpoints

ROOT = Path(__file__).resolve().parents[2]
NARROW = {
    ("client.mapped", "kill"),
    ("loader.copy", "kill"),
    ("seal.barrier", "error"),
    ("seal.sealed", "kill"),
    ("flip.written", "kill"),
    ("evict.punch", "kill"),
    ("restore.adopted", "kill"),
    ("compose.seal", "kill"),
    ("fetch.compose", "kill"),
}
"""The cases of `make test`: of each kind of step that where most would be lost if the order were another."""


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(prefix="weightd-faults-") as folder:
        scene = Scene(HOST, Path(folder))
        yield scene
        scene.close()


def cases() -> list[object]:
    """All that host memory has; those that are not narrow are left to `make test-all`."""
    return [
        pytest.param(
            point, action, id=f"{point.name}-{action}",
            marks=[] if (point.name, action) in NARROW else [pytest.mark.sweep],
        )
        for point in POINTS
        if "host" in point.memories
        for action in ACTIONS
    ]  # fmt: skip


@pytest.mark.parametrize(("point", "action"), cases())
def test_nothing_is_lost(scene: Scene, point: Point, action: str) -> None:
    case = tried(scene, point, action)
    assert (case.lost, case.problem) == (0, ""), case


def test_a_loss_is_seen(scene: Scene) -> None:
    scene.witness.kill()
    with scene.daemon.connect() as client:
        eventually(lambda: client.leases() == [], what="the witness has let go")
        client.remove("base")
    with pytest.raises(LostError, match="base is not resident any more"):
        scene.check()
    scene.renew()
    scene.check()


def test_every_point_of_the_sources_is_tried_and_stands_there_once() -> None:
    found: Counter[str] = Counter()
    for path in ROOT.glob("*/weightd*/**/*.py"):
        found.update(re.findall(r'_failpoints\.reach\("([^"]+)"\)', path.read_text()))
    assert found == Counter(point.name for point in POINTS)
    assert all(point.name in (ROOT / "docs" / "faults.md").read_text() for point in POINTS)


def test_without_a_test_a_point_does_nothing() -> None:
    assert _failpoints.reach is _failpoints._pass
    assert _failpoints._pass.__code__.co_names == ()
