"""What a catalogue makes of what agents send, and of what people ask for. Nothing is dialled."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest

from support import checkpoints
from weightd.cli import main
from weightd.errors import CapacityError, DaemonUnreachableError, FormatError, InvalidReferenceError, NotFoundError
from weightd.fleet import Fleet, Placement, WantedCheckpoint, connect
from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.agent.addresses import AgentAddress
from weightd_fleet.agent.inventory import (
    DeviceInventory,
    NodeInventory,
    ResidentCheckpoint,
    ServableCheckpoint,
    decode,
    encode,
)
from weightd_fleet.agent.resident import ResidentTensors
from weightd_fleet.agent.serving import ServedBlobs
from weightd_fleet.core.digests import blob_digest
from weightd_fleet.core.manifest import FleetManifest
from weightd_fleet.core.manifest_rows import TensorRow, WeightFile
from weightd_fleet.publishing.publish import publish
from weightd_fleet.publishing.state import PublishedState
from weightd_fleet.service.fleet_service import AgentAccess, FleetService
from weightd_fleet.service.fleet_state import FleetState
from weightd_fleet.service.loading import MOST_FETCHES, FleetLoads
from weightd_fleet.service.members import FleetMember
from weightd_fleet.service.references import FleetNames, NodeNames

PEER = AgentAddress("127.0.0.9", 7411)
NAMES = ["b3:" + digit * 64 for digit in "abc"]
A, B, C = NAMES
MIB = 1 << 20


def entry(name: str, reference: str = "", repository: str = "", commit: str = "") -> ServableCheckpoint:
    return ServableCheckpoint(name, 100, 2, repository, commit, reference)


def inventory(*resident: ResidentCheckpoint, budget: int = 64 * MIB, serves: tuple[str, ...] = ()) -> NodeInventory:
    device = DeviceInventory("host", "host", budget, 0, 0, 4096, resident)
    return NodeInventory(tuple(map(entry, serves)), (device,))


def test_an_inventory_comes_back_from_the_wire() -> None:
    gpu = DeviceInventory("GPU-1", "cuda_vmm", 1 << 36, 5, 4, 2 << 20, ())
    host = DeviceInventory("host", "host", 10, 9, 8, 4096, (ResidentCheckpoint(A, pinned=True, firm=True),))
    whole = NodeInventory((entry(A, "org/a", "org/a", "c0"), entry(B)), (host, gpu), draining=True, problem="none")
    assert decode(peer_pb2.Inventory.FromString(encode(whole).SerializeToString()), PEER) == whole


def test_an_agent_of_before_has_no_devices() -> None:
    message = peer_pb2.Inventory(entries=[peer_pb2.InventoryEntry(name=A, total_bytes=7)])
    assert decode(message, PEER) == NodeInventory((ServableCheckpoint(A, 7, 0, "", "", ""),), ())


def hostile(**fields: Any) -> peer_pb2.Inventory:
    return peer_pb2.Inventory(devices=[peer_pb2.DeviceInventory(device="host", **fields)])


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (peer_pb2.Inventory(entries=[peer_pb2.InventoryEntry(name="../../etc/passwd")]), "a name or a size"),
        (peer_pb2.Inventory(entries=[peer_pb2.InventoryEntry(name=A, total_bytes=1 << 62)]), "a name or a size"),
        (hostile(checkpoints=[peer_pb2.ResidentCheckpoint(name="b3:A")]), "a name or a size"),
        (hostile(budget_bytes=2**64 - 1), "a name or a size"),
        (hostile(page_bytes=(1 << 30) + 1), "a name or a size"),
        (peer_pb2.Inventory(devices=[peer_pb2.DeviceInventory(device="host")] * 2), "names a device twice"),
        (peer_pb2.Inventory(devices=[peer_pb2.DeviceInventory(device=f"d{n}") for n in range(65)]), "over the limit"),
        (peer_pb2.Inventory(entries=[peer_pb2.InventoryEntry(name=A)] * 100_001), "over the limit"),
    ],
)
def test_an_inventory_that_cannot_be(message: peer_pb2.Inventory, why: str) -> None:
    with pytest.raises(FormatError, match=why) as raised:
        decode(message, PEER)
    assert str(PEER) in str(raised.value)


def test_a_text_of_an_agent_cannot_steer_a_terminal() -> None:
    message = peer_pb2.Inventory(problem="\x1b[2J\n" + "x" * 10_000)
    assert decode(message, PEER).problem.isprintable()
    assert len(decode(message, PEER).problem) < 5000


def test_a_name_stands_for_one_checkpoint() -> None:
    names = FleetNames(
        [
            entry(A, "org/a", "org/a", "1" * 40),
            entry(B, "org/a", "org/a", "2" * 40),
            entry(C, "/models/c"),
            entry(C, C),
        ]
    )
    assert names.checkpoint("org/a@" + "2" * 40) == B
    assert names.checkpoint("/models/c") == names.checkpoint("/models/c") == names.checkpoint(C) == C
    assert names.of(C) == ("/models/c",)
    assert names.own_name(A) == "org/a@" + "1" * 40
    with pytest.raises(InvalidReferenceError) as raised:
        names.checkpoint("org/a")
    assert str(raised.value) == (
        f"org/a: 2 checkpoints have this name; give one of {A} (org/a@{'1' * 40}), {B} (org/a@{'2' * 40})"
    )
    for unknown in ("", "org/b", "b3:" + "d" * 64):
        with pytest.raises(NotFoundError):
            names.checkpoint(unknown)


def test_no_agent_can_call_a_checkpoint_by_the_name_of_other_bytes() -> None:
    """A load by the name in the fleet passes on what a checkpoint is called, as its name on the node that gets it."""
    names = FleetNames([entry(A, B), entry(C, "", B, "c0")])
    assert names.of(A) == ()
    assert names.own_name(A) == ""
    assert names.own_name(C) == f"{B}@c0"


def test_a_node_goes_by_id_name_and_address() -> None:
    members = [FleetMember("abcdef01", "n0", "10.0.0.1"), FleetMember("abcdef02", "n1", "10.0.0.2")]
    nodes = NodeNames(members)
    assert [nodes.node(one) for one in ("n0", "10.0.0.2", "abcdef02", "abcdef01")] == [
        "abcdef01", "abcdef02", "abcdef02", "abcdef01",
    ]  # fmt: skip
    assert nodes.node("abcdef01"[:8]) == "abcdef01"
    with pytest.raises(InvalidReferenceError, match="stands for several nodes"):
        nodes.node("abcdef")
    for unknown in ("abc", "n", ""):
        with pytest.raises(NotFoundError):
            nodes.node(unknown)


def manifest(*seeds: str, length: int = MIB) -> FleetManifest:
    """A manifest of tensors that are equal if their seeds are."""
    rows = [
        TensorRow("", "m", f"t{n}", "U8", (length,), n * length, length, blob_digest(seed.encode()))
        for n, seed in enumerate(seeds)
    ]
    return FleetManifest.of([WeightFile("", "m", len(seeds) * length, 0, blob_digest(b""))], rows)


def test_equal_nodes_are_told_apart_by_files_and_free_memory() -> None:
    state = FleetState()
    for number in range(3):
        state.join(FleetMember(f"id{number}", f"n{number}", f"10.0.0.{number}"), f"10.0.0.{number}:7411")
    made = manifest("a", "b")
    state.add(made)
    state.take("id0", inventory(budget=32 * MIB))
    with pytest.raises(NotFoundError):
        state.named(made.name)
    state.take("id1", inventory(serves=(made.name,)))
    assert state.named(made.name) == made.name
    state.take("id2", inventory(budget=128 * MIB))
    assert state.refilled_seconds is not None
    assert [target.node for target in state.choose(made.name, 3).targets] == ["id1", "id2", "id0"]
    state.lose("id1", "gone")
    assert [target.node for target in state.choose(made.name, 3).targets] == ["id2", "id0"]
    assert state.servers(made.name) == {}
    with pytest.raises(NotFoundError):
        state.named(made.name)
    state.leave("id2")
    state.leave("id2")
    state.take("id2", inventory())  # from a follower that has not heard yet
    assert [node.node for node in state.nodes()] == ["id0", "id1"]
    assert [target.node for target in state.choose(made.name, 3).targets] == ["id0"]


def test_questions_do_not_wait_for_a_node_that_has_left() -> None:
    state = FleetState()
    for number in range(2):
        state.join(FleetMember(f"id{number}", f"n{number}", f"10.0.0.{number}"), "")
    state.take("id0", inventory())
    assert state.refilled_seconds is None
    state.leave("id1")
    assert state.refilled_seconds is not None


def test_a_drained_node_is_no_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue may not have heard yet that the agent is drained, as while it hashes what is new."""
    monkeypatch.setattr(FleetLoads, "drain", lambda *_: None)
    service = FleetService(AgentAccess(), "")
    for number, serves in enumerate([(A, B), (B,)]):
        service._state.join(FleetMember(f"id{number}", f"n{number}", f"10.0.0.{number}"), "")
        service._state.take(f"id{number}", inventory(serves=serves))
    assert service.drain("n0", 0).only_here == (A,)


def test_a_plan_keeps_what_is_resident_and_counts_memory_of_unknown_checkpoints() -> None:
    state = FleetState()
    one, two = manifest("a", "b", "c"), manifest("a", "b", "d")
    for made in (one, two):
        state.add(made)
    for number in range(2):
        state.join(FleetMember(f"id{number}", f"n{number}", f"10.0.0.{number}"), "")
    evictable = ResidentCheckpoint(one.name, pinned=False, firm=False)
    state.take("id0", inventory(evictable, budget=5 * MIB))
    state.take("id1", inventory(budget=100 * MIB))
    plan = state.plan({one.name: 1, two.name: 1})
    assert [(one.device, one.missing_bytes) for one in plan.replicas] == [("id0/host", 0), ("id0/host", MIB)]
    # Two MiB of something that nobody published, and that cannot go: the second one does not fit beside the first.
    memory = DeviceInventory("host", "host", 5 * MIB, 5 * MIB, 2 * MIB, 4096, (evictable,))
    state.take("id0", NodeInventory((), (memory,)))
    plan = state.plan({one.name: 1, two.name: 1})
    assert [one.device for one in plan.replicas] == ["id0/host", "id1/host"]
    assert [left.replicas for _, left in state.plan({one.name: 3}).left_over] == [1]


def test_loads_at_once_take_turns_at_a_node() -> None:
    go_on, begun = threading.Event(), threading.Semaphore(0)

    class Agent:
        """It fetches when it is told to go on."""

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def fetch(self, *_: object) -> Iterator[peer_pb2.FetchEvent]:
            begun.release()
            assert go_on.wait(60)
            yield peer_pb2.FetchEvent(result=peer_pb2.FetchResult(moved_bytes=1))

    state = FleetState()
    state.join(FleetMember("id0", "n0", "10.0.0.1"), "10.0.0.1:7411")
    resident = ResidentCheckpoint(A, pinned=False, firm=False)
    state.take("id0", inventory(resident, serves=(A,)))
    loads = FleetLoads(state, lambda _: Agent())  # type: ignore[arg-type,return-value]  # enough of both
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(loads.load, A, A, state.nodes(), 1, pin=False) for _ in range(20)]
        try:
            assert all(begun.acquire(timeout=60) for _ in range(MOST_FETCHES))
            assert not begun.acquire(timeout=0.3)
        finally:
            go_on.set()
        assert [one.result(60).nodes for one in asked] == [("id0",)] * 20
    assert (loads.transfers, loads.moved_bytes) == (0, 20)


def test_the_front_door_asks_in_plain_values() -> None:
    asked: list[tuple[Any, ...]] = []
    with Fleet(lambda *question: asked.append(question), lambda: asked.append(("closed",))) as nodes:
        nodes.load("org/a", on="n0")
        nodes.load("org/a", on=["n0", "n1"], pin=True)
        nodes.plan(reference for reference in ("org/a", "org/b"))
        nodes.apply(["org/a", {"reference": "org/b", "replicas": 2, "pin": True}, WantedCheckpoint("org/c")])
    assert asked == [
        ("load", "org/a", ("n0",), None, False),
        ("load", "org/a", ["n0", "n1"], None, True),
        ("plan", ("org/a", "org/b"), 1),
        ("apply", (WantedCheckpoint("org/a"), WantedCheckpoint("org/b", 2, pin=True), WantedCheckpoint("org/c"))),
        ("closed",),
    ]
    with pytest.raises(InvalidReferenceError, match="is no wanted checkpoint"):
        nodes.apply([{"reference": "org/a", "replica": 2}])


def test_a_placement_without_targets_has_no_options() -> None:
    nowhere = Placement(
        "org/a", A, 1, (), "0 of 1 replicas placed: each live node takes one, and 2 have no room for it"
    )
    with pytest.raises(CapacityError, match="org/a: no node to run on: 0 of 1 replicas placed"):
        nowhere.options()


def test_an_inventory_decodes_each_manifest_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent makes an inventory a second for each who follows it."""
    paths = [checkpoints.write_random(tmp_path / name / "model.safetensors", 2, 100, name).parent for name in "ab"]
    state = PublishedState(tmp_path / "state")
    names = [publish(str(path), state).digest for path in paths]
    decoded: list[int] = []
    decode_manifest = FleetManifest.decode
    monkeypatch.setattr(FleetManifest, "decode", lambda raw: decoded.append(len(raw)) or decode_manifest(raw))

    def unreachable() -> Any:
        raise DaemonUnreachableError("no weightd daemon")

    blobs = ServedBlobs(state, ResidentTensors(unreachable))
    for _ in range(3):
        told = blobs.inventory(draining=False)
        assert {one.name: one.reference for one in told.entries} == dict(zip(names, map(str, paths), strict=True))
        assert (told.devices, told.problem) == ((), "no weightd daemon")
    assert len(decoded) == 2
    (paths[0] / "model.safetensors").unlink()
    assert [one.name for one in blobs.inventory(draining=True).entries] == [names[1]]


def test_without_ray_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidReferenceError, match=r"weightd.fleet needs ray, .* pip install '.\[fleet-ray\]'"):
        connect()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else sys)
    assert main(["fleet", "ls"]) == 1
    assert capsys.readouterr().err == (
        "weightd: fleet ls needs ray, which is not installed: pip install '.[fleet-ray]' in weightd's checkout\n"
    )
