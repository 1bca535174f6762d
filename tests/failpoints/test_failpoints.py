"""A failure at some of the named points; all of them are tried by `make faults`, and by `make test-all`.

There are 216 cases: 117 on host memory, 90 by CUDA VMM and 9 by CUDA IPC, both on the double. One takes about 2.5 s on
a busy machine of two cores, so all of them take about nine minutes. `make test` tries nine.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from failpoints.__main__ import HEAD, TITLES, page, status
from failpoints.injection import ACTIONS, ERRORS
from failpoints.matrix import Case, tried
from failpoints.points import POINTS, Point
from failpoints.scene import LostError, Scene
from support.backends import HOST, Backend
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
def scene_on(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Scene]]:
    """The scene on a kind of memory. The one before on another kind is closed then, so that there is one at a time."""
    there: dict[str, Scene] = {}

    def close() -> None:
        for memory in list(there):
            there.pop(memory).close()

    with tempfile.TemporaryDirectory(prefix="weightd-faults-") as folder:

        def scene_on(memory: str) -> Scene:
            if memory not in there:
                close()
                driver = None if memory == "host" else request.getfixturevalue("fake_driver")
                backend = HOST if driver is None else Backend(memory, memory, driver)
                there[memory] = Scene(backend, Path(tempfile.mkdtemp(dir=folder)))
            return there[memory]

        yield scene_on
        close()


def cases() -> list[object]:
    """All that each kind of memory has; those that are not narrow are left to `make test-all`."""
    return [
        pytest.param(
            memory, point, action, id=f"{memory}-{point.name}-{point.deed}-{action}",
            marks=[] if _is_narrow(memory, point, action) else [pytest.mark.sweep],
        )
        for memory in TITLES
        for point in POINTS
        if memory in point.memories
        for action in ACTIONS
    ]  # fmt: skip


def _is_narrow(memory: str, point: Point, action: str) -> bool:
    return memory == "host" and point.deed != "remove" and (point.name, action) in NARROW


@pytest.mark.parametrize(("memory", "point", "action"), cases())
def test_nothing_is_lost_but_with_the_holder(
    scene_on: Callable[[str], Scene], memory: str, point: Point, action: str
) -> None:
    case = tried(scene_on(memory), point, action)
    assert (case.lost, case.problem) == (0, ""), case
    assert case.with_holder == (action in point.loses), case


HOLDER_DIES = Point("holder.free", "holder", "remove", "the holder frees", ("cuda_ipc",), loses=("kill",))


def loses_base(*, holder_died: bool, comes_back: bool = True) -> Scene:
    """A scene whose checks find base lost: always, or until it is loaded again."""
    found = [LostError("base is not resident any more")]

    def check() -> str:
        if found:
            raise found[0]
        return ""

    return cast(
        "Scene",
        SimpleNamespace(
            kind="cuda_ipc", check=check, do=lambda deed: "ok", prepare=lambda deed: None, recover=lambda: None,
            renew=found.clear, reload=found.clear if comes_back else lambda: None,
            went_with_holder=lambda holders: holder_died, daemon=SimpleNamespace(holders=lambda: [1]),
            trigger=SimpleNamespace(arm=lambda *_: None, reached=lambda: 1.0, disarm=lambda: None),
        ),
    )  # fmt: skip


def test_what_goes_with_its_holder_is_counted_apart_where_the_point_names_it() -> None:
    case = tried(loses_base(holder_died=True), HOLDER_DIES, "kill")
    assert (case.lost, case.with_holder, case.problem) == (0, 1, "")
    assert status({"cuda_ipc": [case]}) == 0
    text = page({"cuda_ipc": [case]}, "abc1234")
    assert "lost: 0, beyond what lay on a GPU whose holder died: 1 of them (`holder.free` kill (remove));" in text
    assert "| 0 (and 1 with the holder) |" in text


@pytest.mark.parametrize(("holder_died", "action"), [(False, "kill"), (True, "error")])
def test_any_other_loss_is_a_failure_of_the_command(holder_died: bool, action: str) -> None:
    case = tried(loses_base(holder_died=holder_died), HOLDER_DIES, action)
    assert (case.lost, case.with_holder, case.problem) == (1, 0, "base is not resident any more")
    assert status({"cuda_ipc": [case]}) == 1
    assert "lost: 1;" in page({"cuda_ipc": [case]}, "abc1234")


def test_what_goes_with_its_holder_must_be_there_again_after_a_load() -> None:
    case = tried(loses_base(holder_died=True, comes_back=False), HOLDER_DIES, "kill")
    assert case.problem == "after the holder's death: base is not resident any more"
    assert status({"cuda_ipc": [case]}) == 1


def test_a_loss_fails_the_command_where_nothing_else_is_wrong() -> None:
    assert status({"host": [Case(POINTS[0], "kill", "ok", 1, 0.1)]}) == 1


def test_the_page_says_at_which_commit_it_was_measured() -> None:
    text = page({"host": [Case(POINTS[0], "kill", "ok", 0, 0.1)]}, "abc1234+")
    assert text.startswith(HEAD)
    assert " at commit `abc1234+`: " in text


def test_each_error_is_what_its_name_says() -> None:
    assert {name: type(make("a.point")).__name__ for name, make in ERRORS.items()} == {
        name: name.split(",")[0] for name in ERRORS
    }
    assert {point.error_on(memory) for point in POINTS for memory in point.memories} == set(ERRORS)


def test_a_loss_is_seen(scene_on: Callable[[str], Scene]) -> None:
    scene = scene_on("host")
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
    assert found == Counter({point.name for point in POINTS})
    assert all(point.name in (ROOT / "docs" / "faults.md").read_text() for point in POINTS)


def test_without_a_test_a_point_does_nothing() -> None:
    assert _failpoints.reach is _failpoints._pass
    assert _failpoints._pass.__code__.co_names == ()
