"""The catalogue of a fleet without an engine: three nodes with real daemons and agents, and one that has no agent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from support import checkpoints
from support.daemon import eventually
from support.fleet_nodes import FleetNodes, fleet_nodes
from weightd.errors import CapacityError, DaemonUnreachableError, InvalidReferenceError, NotFoundError
from weightd_fleet.service.results import WantedCheckpoint

SIZE = 1 << 20
SMALL = "6MiB"
"""The budget of n2, which has room for one checkpoint of four tensors and not for two."""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetNodes]:
    with fleet_nodes(tmp_path_factory.mktemp("fleet"), ["64MiB", "64MiB", SMALL]) as nodes:
        yield nodes


@pytest.fixture
def nodes(three: FleetNodes) -> Iterator[FleetNodes]:
    """Three nodes that hold nothing."""
    yield three
    three.empty()


def checkpoint(folder: Path, name: str, shared: int = 0) -> Path:
    """A checkpoint of four tensors, of which the first `shared` are those of "base"."""
    common = {number: ("base", number) for number in range(shared)}
    return checkpoints.write_random(folder / name / "model.safetensors", 4, SIZE, name, common).parent


def test_a_replica_goes_where_the_fewest_bytes_are_missing(nodes: FleetNodes, tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path, "base"), checkpoint(tmp_path, "tuned", shared=3)
    nodes.publish(1, base)
    digest = nodes.publish(0, tuned, load=False)
    placed = nodes.service.place(str(tuned), replicas=2)
    assert [target.name for target in placed.targets] == ["n1", "n0"]
    assert [target.missing_bytes for target in placed.targets] == [SIZE, 4 * SIZE]
    assert placed.targets[0].why == f"n1: 1.00 MiB of 4.00 MiB missing; 3.00 MiB are those of {base}"
    first, second = (nodes.members[number].node for number in (1, 0))
    assert placed.options() == {"label_selector": {"ray.io/node-id": f"in({first},{second})"}}

    loaded = nodes.service.load(str(tuned), placed, 1)
    assert (loaded.nodes, loaded.moved_bytes, loaded.local_bytes) == ((first,), SIZE, 3 * SIZE)
    with nodes.daemons[1].connect() as client, client.attach(str(tuned)) as attachment:
        assert attachment.content_digest == loaded.replicas[0].content_digest
    assert nodes.service.place(digest).targets[0].missing_bytes == 0
    assert nodes.service.load(digest).moved_bytes == 0


def test_what_is_asked_for_must_be_one_checkpoint(nodes: FleetNodes, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "base")
    before = nodes.publish(0, path)
    with nodes.daemons[0].connect() as client:
        client.remove(str(path))
    nodes.await_node(0, before, resident=False)
    nodes.service.load(before, ["n1"])
    checkpoints.write_random(path / "model.safetensors", 4, SIZE, "something else")
    after = nodes.publish(0, path)  # the same path, with other contents
    assert {one.checkpoint for one in nodes.service.checkpoints() if str(path) in one.names} == {before, after}
    with pytest.raises(InvalidReferenceError) as raised:
        nodes.service.place(str(path))
    assert before in str(raised.value)
    assert after in str(raised.value)
    for unknown in ("org/unknown", "b3:" + "0" * 64):
        with pytest.raises(NotFoundError, match="no node that answers has it"):
            nodes.service.place(unknown)
    with pytest.raises(NotFoundError, match="node n9"):
        nodes.service.load(after, ["n9"])
    with pytest.raises(InvalidReferenceError, match="two references stand for one checkpoint"):
        nodes.service.plan([after, after])
    for ask in (nodes.service.place, lambda name, count: nodes.service.load(name, None, count)):
        with pytest.raises(InvalidReferenceError, match="0 replicas"):
            ask(after, 0)


def test_a_full_node_is_passed_over(nodes: FleetNodes, tmp_path: Path) -> None:
    """The catalogue believes that n2 has room, as it does for a second after a pin that it does not know of."""
    held, wanted = checkpoint(tmp_path, "base"), checkpoint(tmp_path, "wanted")
    nodes.publish(2, held)
    name = nodes.publish(0, wanted, load=False)
    n2 = nodes.members[2].node
    placed = nodes.service.place(name, replicas=3)
    assert n2 in placed.nodes
    n2_first = replace(placed, replicas=2, targets=tuple(sorted(placed.targets, key=lambda one: one.node != n2)))
    with nodes.daemons[2].connect() as client:
        client.pin(str(held))
    loaded = nodes.service.load(name, n2_first)
    assert len(loaded.replicas) == 2
    assert n2 not in loaded.nodes
    assert [one.name for one in loaded.skipped] == ["n2"]
    assert "do not fit on host" in loaded.skipped[0].why
    with pytest.raises(CapacityError, match="0 of 1 replicas are resident: n2: "):
        nodes.service.load(name, ["n2"])
    eventually(lambda: nodes.node(2).devices[0].pinned)
    with pytest.raises(CapacityError, match="3 replicas asked for, and 2 nodes have room"):
        nodes.service.load(name, replicas=3)
    assert nodes.service.place(name, 3).shortage.startswith("2 of 3 replicas placed")


def test_a_node_without_an_agent_is_unknown(nodes: FleetNodes, tmp_path: Path) -> None:
    absent = nodes.node(3)
    assert absent.state == "unknown"
    assert "Connection refused" in absent.problem
    assert nodes.service.stats().nodes == 4
    name = nodes.publish(0, checkpoint(tmp_path, "base"))
    with pytest.raises(DaemonUnreachableError, match="n3: peer"):
        nodes.service.load(name, ["n3"])
    with pytest.raises(NotFoundError, match="cannot be drained"):
        nodes.service.drain("n3")


def test_an_agent_that_is_killed_is_missed_and_found_again(nodes: FleetNodes, tmp_path: Path) -> None:
    name = nodes.publish(1, checkpoint(tmp_path, "base"))
    nodes.service.load(name, ["n0"])
    nodes.agents[1].kill()
    eventually(lambda: nodes.node(1).state == "unknown")
    placed = nodes.service.place(name, replicas=3)
    assert [target.name for target in placed.targets] == ["n0", "n2"]
    assert placed.targets[0].missing_bytes == 0
    nodes.start_agent(1)
    nodes.await_node(1, name, resident=True)


def test_a_daemon_that_does_not_answer(nodes: FleetNodes, tmp_path: Path) -> None:
    name = nodes.publish(1, checkpoint(tmp_path, "base"))
    nodes.daemons[1].kill()
    try:
        eventually(lambda: not nodes.node(1).devices)
        assert nodes.node(1).state == "live"
        assert "no weightd daemon" in nodes.node(1).problem
        assert [target.name for target in nodes.service.place(name, 3).targets] == ["n0", "n2"]
    finally:
        nodes.daemons[1].start()
    eventually(lambda: nodes.node(1).devices)
    assert nodes.node(1).problem == ""


def test_a_node_that_leaves_is_forgotten(nodes: FleetNodes, tmp_path: Path) -> None:
    name = nodes.publish(1, checkpoint(tmp_path, "base"))
    nodes.service.update(member for member in nodes.members if member.name != "n1")
    try:
        assert "n1" not in {node.name for node in nodes.service.nodes()}
        with pytest.raises(NotFoundError, match="no node that answers has it"):
            nodes.service.place(name)
    finally:
        nodes.service.update(nodes.members)
    nodes.await_node(1, name, resident=True)


def test_a_wanted_state_is_reached_once(nodes: FleetNodes, tmp_path: Path) -> None:
    base, tuned = checkpoint(tmp_path, "base"), checkpoint(tmp_path, "tuned", shared=3)
    nodes.publish(0, base)
    nodes.publish(1, tuned, load=False)
    spec = [WantedCheckpoint(str(base), 2, pin=True), WantedCheckpoint(str(tuned))]
    done = nodes.service.apply(spec)
    assert done.left_over == ()
    moved = [(one.reference, one.replicas[0].name, one.moved_bytes) for one in done.loaded]
    # n1 has three tensors of base in the published files of tuned; n0 has three tensors of tuned in memory.
    assert moved == [(str(base), "n0", 0), (str(base), "n1", SIZE), (str(tuned), "n0", SIZE)]
    pinned = {one.names[0]: len(one.pinned_on) for one in nodes.service.checkpoints()}
    assert pinned == {str(base): 2, str(tuned): 0}
    again = nodes.service.apply(spec)
    assert again.loaded == ()
    assert len(again.present) == 3
    assert again.explain().count("was there") == 3
    more = nodes.service.apply([WantedCheckpoint(str(base), 5)])
    assert [left.replicas for left in more.left_over] == [2]
    assert "every live node has a replica" in more.explain()


def test_checkpoints_are_planned_together(nodes: FleetNodes, tmp_path: Path) -> None:
    names = ["base", "tuned", "other"]
    paths = [checkpoint(tmp_path, name, shared=3 if name == "tuned" else 0) for name in names]
    nodes.publish(0, paths[0])
    for path in paths[1:]:
        nodes.publish(1, path, load=False)
    plan = nodes.service.plan(list(map(str, paths)))
    where = {one.reference: one.name for one in plan.replicas}
    assert where[str(paths[0])] == where[str(paths[1])] == "n0"
    assert plan.missing_bytes == SIZE + 4 * SIZE
    assert plan.left_over == ()
    assert nodes.service.stats().replicas == 1, "a plan moves nothing"


def test_a_drained_node_leaves_no_checkpoint_behind(nodes: FleetNodes, tmp_path: Path) -> None:
    alone, twice, file = (checkpoint(tmp_path, name) for name in ("alone", "twice", "file"))
    nodes.publish(0, alone)
    copied = nodes.publish(0, twice)
    nodes.publish(0, file, load=False)
    nodes.service.load(copied, ["n1"])
    with nodes.daemons[0].connect() as client:
        client.pin(str(alone))
        eventually(lambda: nodes.node(0).devices[0].pinned)
    try:
        drained = nodes.service.drain("n0")
        assert [(one.reference, [two.name for two in one.replicas]) for one in drained.copied] == [(str(alone), ["n1"])]
        assert drained.only_here == (str(file),)
        assert nodes.node(0).state == "draining"
        assert [one.names for one in nodes.service.checkpoints() if len(one.pinned_on) == 2] == [(str(alone),)]
        assert "n0" not in {target.name for target in nodes.service.place(copied, 3).targets}
        with pytest.raises(NotFoundError, match="no agent serves all of it"):
            nodes.service.load(str(file), ["n1"])
    finally:
        nodes.agents[0].stop()
        nodes.start_agent(0)
        eventually(lambda: nodes.node(0).state == "live")


def test_a_node_is_not_drained_if_a_copy_finds_no_place(nodes: FleetNodes, tmp_path: Path) -> None:
    path = checkpoints.write_random(tmp_path / "big" / "model.safetensors", 8, SIZE, "big").parent
    nodes.publish(0, path)
    nodes.service.load(str(path), ["n1"])
    with pytest.raises(CapacityError, match="big"):
        nodes.service.drain("n0", keep_replicas=2)
    assert nodes.node(0).state == "live"
