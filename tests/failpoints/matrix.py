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

    `lost` is how much of what was resident or attached before was not there any more, or was not what it was.
    """

    point: Point
    action: str
    outcome: str
    lost: int
    seconds: float
    problem: str = ""
    """What went wrong beside that, for people; empty where nothing did."""


def tried(scene: Scene, point: Point, action: str) -> Case:
    """Have a deed meet a failure, bring back what was killed, and do the deed again."""
    scene.trigger.arm(point.name, action)
    outcome, lost, problem, note = "", 0, "", ""
    began = time.time()
    try:
        outcome = scene.do(point.deed)
        eventually(scene.trigger.reached, 20.0, what=f"{point.name} is reached")
        began = scene.trigger.reached() or began
        scene.recover()
        if (again := scene.do(point.deed)) != "ok":
            problem = f"afterwards: {again}"
        seconds = time.time() - began
        note = scene.check()
    except LostError as error:
        lost, seconds = 1, time.time() - began
        if scene.lasting:
            problem = str(error)
        else:
            note = "what was on the GPU is lost"
            scene.renew()
    except AssertionError as error:
        problem, seconds = str(error).splitlines()[0][:200], time.time() - began
    finally:
        scene.trigger.disarm()
        with contextlib.suppress(AssertionError):
            scene.recover()
    return Case(point, action, "; ".join(filter(None, [outcome, note])), lost, seconds, problem)
