"""Labels of a node by what its daemon has pinned, with a cluster, a daemon and a clock that the test plays."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from support.kubernetes import GIB, checkpoint, label
from weightd.errors import DaemonUnreachableError
from weightd.types import CheckpointInfo
from weightd_fleet.engines.kubernetes_labels import (
    INTERVAL,
    LONGEST_DELAY,
    MOST_LABELS,
    REREAD_SECONDS,
    SILENCE_SECONDS,
    NodeError,
    NodeLabels,
    checkpoint_labels,
    size_class,
)

OTHERS = {"kubernetes.io/hostname": "n0", "weightd.io/enabled": "true", "weightd.io/c-short": "1"}


@dataclass
class Cluster:
    """A node, the requests that it got, and whether it fails."""

    present: dict[str, str] = field(default_factory=lambda: dict(OTHERS))
    reads: int = 0
    changes: list[Mapping[str, str | None]] = field(default_factory=list)
    failing: bool = False

    def labels(self) -> Mapping[str, str]:
        self.reads += 1
        if self.failing:
            raise NodeError("node n0: the API server answers 503 Service Unavailable")
        return dict(self.present)

    def change(self, changes: Mapping[str, str | None]) -> None:
        if self.failing:
            raise NodeError("node n0: the API server answers 503 Service Unavailable")
        self.changes.append(changes)
        for key, value in changes.items():
            if value is None:
                self.present.pop(key, None)
            else:
                self.present[key] = value


class World:
    """A cluster, a daemon and a clock, with the labels that are under test."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.checkpoints: list[CheckpointInfo] | None = []
        self.now = 1000.0
        self.labels = NodeLabels(self.cluster, self._asked, lambda: self.now)

    def _asked(self) -> list[CheckpointInfo]:
        if self.checkpoints is None:
            raise DaemonUnreachableError("no daemon")
        return self.checkpoints

    def step(self) -> float:
        """A step, and the time until the next."""
        delay = self.labels.step()
        self.now += delay
        return delay


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize(
    ("size", "value"),
    [(0, "1"), (1, "1"), (GIB, "1"), (GIB + 1, "2"), (2 * GIB, "2"), (3 * GIB, "4"), (140 * GIB, "256")],
)
def test_a_size_class_is_a_power_of_two(size: int, value: str) -> None:
    assert size_class(size) == value


def test_only_what_stays_and_has_a_name_is_a_label() -> None:
    found = checkpoint_labels(
        [
            checkpoint(1, 5 * GIB), checkpoint(2, pinned=False), checkpoint(3, named=False),
            checkpoint(4, state="loading"), checkpoint(5, state="absent"),
        ]
    )  # fmt: skip
    assert found == {label(1): "8"}


def test_a_checkpoint_on_two_devices_is_one_label() -> None:
    assert checkpoint_labels([checkpoint(1), checkpoint(1)]) == {label(1): "1"}


def test_the_largest_are_labels_in_whatever_order_they_come() -> None:
    checkpoints = [checkpoint(number, (1 + number // 2) * GIB) for number in range(MOST_LABELS + 9)]
    found = checkpoint_labels(checkpoints)
    assert len(found) == MOST_LABELS == 32
    assert found == checkpoint_labels(checkpoints[::-1])
    assert label(MOST_LABELS + 8) in found
    assert label(0) not in found


def test_a_change_is_one_request_and_nothing_else_is_touched(world: World) -> None:
    world.cluster.present[label(9)] = "4"  # of an agent before this one
    world.checkpoints = [checkpoint(1), checkpoint(2)]
    assert world.step() >= INTERVAL == 30.0
    assert world.cluster.changes == [{label(1): "1", label(2): "1", label(9): None}]
    world.checkpoints = [checkpoint(2)]
    world.step()
    assert world.cluster.changes[1:] == [{label(1): None}]
    assert world.cluster.present == {**OTHERS, label(2): "1"}


def test_without_a_change_nothing_is_asked_of_the_cluster(world: World) -> None:
    world.checkpoints = [checkpoint(1)]
    for _ in range(10):
        world.step()
    assert (world.cluster.reads, len(world.cluster.changes)) == (1, 1)


def test_a_node_that_was_made_anew_gets_its_labels_back(world: World) -> None:
    world.checkpoints = [checkpoint(1)]
    world.step()
    world.cluster.present = dict(OTHERS)
    deadline = world.now + REREAD_SECONDS + INTERVAL
    while label(1) not in world.cluster.present:
        assert world.now <= deadline
        world.step()


def test_a_cluster_that_fails_is_asked_less_and_less_often(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.cluster.failing = True
    world.checkpoints = [checkpoint(1)]
    with caplog.at_level(logging.INFO):
        assert [world.step() for _ in range(6)] == [60, 120, 240, LONGEST_DELAY, LONGEST_DELAY, LONGEST_DELAY]
        world.cluster.failing = False
        assert world.step() == INTERVAL
    assert world.cluster.present == {**OTHERS, label(1): "1"}
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]  # once, not each time


def test_after_a_failure_the_node_is_read_again(world: World) -> None:
    """A request that got no answer may have been carried out."""
    world.checkpoints = [checkpoint(1)]
    world.step()
    world.cluster.failing = True
    world.checkpoints = [checkpoint(2)]
    world.step()
    world.cluster.failing = False
    world.cluster.present[label(2)] = "1"
    world.step()
    assert world.cluster.present == {**OTHERS, label(2): "1"}
    assert world.cluster.reads == 2


def test_a_daemon_that_restarts_keeps_the_labels(world: World) -> None:
    world.checkpoints = [checkpoint(1)]
    world.step()
    world.checkpoints = None
    world.step()
    world.checkpoints = [checkpoint(1)]
    world.step()
    assert len(world.cluster.changes) == 1


def test_a_daemon_that_stays_away_loses_the_labels(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.checkpoints = [checkpoint(1)]
    world.step()
    gone_at = world.now
    world.checkpoints = None
    while label(1) in world.cluster.present:
        world.step()
    assert world.now - gone_at <= SILENCE_SECONDS + 2 * INTERVAL
    assert world.cluster.present == OTHERS
    assert len(caplog.records) == 1


def test_labels_of_an_agent_before_go_although_no_daemon_ever_answers(world: World) -> None:
    world.cluster.present[label(9)] = "4"
    world.checkpoints = None
    for _ in range(4):
        world.step()
    assert world.cluster.present == OTHERS
