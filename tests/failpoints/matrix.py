"""Tries failures one after the other on a scene, and says what came of each."""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple

from failpoints.points import Point
from failpoints.scene import LostError, Scene
from support.daemon import eventually


class Case(NamedTuple):
    """What came of one failure: of the deed that met it, and how long it took until the same deed was done.

    `lost` is 1 where what was resident or attached before was not there any more, or was not what it was. Where that
    was on a GPU whose holder died of this failure, as `Point.loses` says, `with_holder` is 1 instead.
    """

    point: Point
    action: str
    outcome: str
    lost: int
    seconds: float
    problem: str = ""
    """What went wrong beside that, for people; empty where nothing did."""
    with_holder: int = 0

    @property
    def failed(self) -> bool:
        """Whether something was lost that is documented nowhere, or something else went wrong."""
        return bool(self.lost or self.problem)


def tried(scene: Scene, point: Point, action: str) -> Case:
    """Have a deed meet a failure, bring back what was killed, and do the deed again."""
    outcome, lost, with_holder, problem, note = "", 0, 0, "", ""
    holders = scene.daemon.holders()
    began, seconds = time.time(), 0.0
    try:
        scene.prepare(point.deed)
        scene.trigger.arm(point.name, action, point.error_on(scene.kind))
        outcome = scene.do(point.deed)
        eventually(scene.trigger.reached, 20.0, what=f"{point.name} is reached")
        began = scene.trigger.reached() or began
        scene.recover()
        if (again := scene.do(point.deed)) != "ok":
            problem = f"afterwards: {again}"
        seconds = time.time() - began
        note = scene.check()
    except LostError as error:
        seconds = seconds or time.time() - began
        if action in point.loses and scene.went_with_holder(holders):
            with_holder, note = 1, "what was on the GPU went with its holder"
            problem = problem or _after_the_loss(scene)
        else:
            lost, problem = 1, str(error)
    except AssertionError as error:
        problem, seconds = _line(error), time.time() - began
    finally:
        scene.trigger.disarm()
        with contextlib.suppress(AssertionError):
            scene.recover()
            if lost:
                scene.renew()
    return Case(point, action, "; ".join(filter(None, [outcome, note])), lost, seconds, problem, with_holder)


def _after_the_loss(scene: Scene) -> str:
    """Have the same daemon load what was lost, and check all the rest. Returns what is wrong; empty: nothing."""
    try:
        scene.reload()
        scene.check()
    except AssertionError as error:
        return f"after the holder's death: {_line(error)}"
    return ""


def _line(error: AssertionError) -> str:
    """What a failed check says; of a worker's traceback the last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if lines[0].startswith("Traceback") else 0][:200]
