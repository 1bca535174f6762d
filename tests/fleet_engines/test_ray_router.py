"""The order in which WeightdRouter tries replicas, and what they tell it, without a cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RunningReplica

import weightd
from support import checkpoints
from support.daemon import Daemon, eventually
from weightd_fleet.engines.ray_serve import STATS_KEY, NodeResidency, WeightdRouter, resident_bytes

MODEL = "tuned"
DEPLOYMENT = DeploymentID("models")


def replica(name: str, node: str, resident: dict[str, int] | None = None, loaded: tuple[str, ...] = ()) -> Any:
    """A replica that takes two requests, as far as ranking looks at it. Without `resident` it has told nothing yet."""
    return SimpleNamespace(
        replica_id=ReplicaID(name, DEPLOYMENT), node_id=node, availability_zone=None, max_ongoing_requests=2,
        multiplexed_model_ids=set(loaded), routing_stats={} if resident is None else {STATS_KEY: resident},
    )  # fmt: skip


def ranks(replicas: list[Any], model: str = MODEL, queues: dict[str, int] | None = None) -> list[list[str]]:
    """The names of the replicas to try, by rank, for a request for a model."""

    async def ask() -> list[list[RunningReplica]]:
        router = WeightdRouter(
            deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        queued = {one.replica_id: (queues or {}).get(one.replica_id.unique_id, 0) for one in replicas}
        for replica_id, length in queued.items():
            router.replica_queue_len_cache.update(replica_id, length)
        for one in replicas:
            one.get_queue_len = lambda *, deadline_s, one=one: asyncio.sleep(0, queued[one.replica_id])
        router.update_replicas(replicas)
        metadata = RequestMetadata("request", "internal", multiplexed_model_id=model)
        request = PendingRequest(args=[], kwargs={}, metadata=metadata)
        chosen = await router.choose_replicas(replicas, request)
        assert request.routing_context.should_backoff, "Serve would ask again without a pause"
        await asyncio.sleep(0.01)  # the probes that update_replicas has started
        return chosen

    return [sorted(one.replica_id.unique_id for one in rank) for rank in asyncio.run(ask())]


def test_loaded_comes_before_near_and_near_before_far() -> None:
    found = ranks(
        [
            replica("far", "n0"),
            replica("near", "n1", {MODEL: 10}),
            replica("nearer", "n2", {MODEL: 20, "base": 30}),
            replica("loaded", "n3", {}, loaded=(MODEL,)),
        ]
    )
    assert found == [["loaded"], ["nearer"], ["near"], ["far"]]


def test_a_neighbour_of_a_replica_that_has_loaded_it_is_near_before_statistics_come() -> None:
    found = ranks([replica("far", "n0", {MODEL: 10}), replica("loaded", "n1", loaded=(MODEL,)), replica("by", "n1")])
    assert found == [["loaded"], ["by"], ["far"]]


def test_a_full_replica_is_passed_over_within_its_rank() -> None:
    alike = [replica(f"r{number}", "n1", {MODEL: 10}) for number in range(4)]
    for _ in range(20):  # it chooses two at random
        assert ranks(alike, queues={"r0": 2, "r1": 1, "r3": 2}) == [["r1", "r2"]]
    assert len(ranks(alike, queues={f"r{number}": 2 for number in range(4)})[0]) == 2  # it asks those for their queues


def test_a_model_that_is_nowhere_begins_at_one_place_among_those_with_the_fewest_models() -> None:
    idle = [replica(f"r{number}", f"n{number // 2}", {}) for number in range(6)]
    busy = [replica(f"busy{number}", f"b{number}", {}, loaded=("other",)) for number in range(6)]
    found = [ranks(order + busy) for order in (idle, idle[::-1], idle[3:] + idle[:3])]
    assert len({order[0][0] for order in found}) == 1, "it depends on the order of the replicas"
    (first, beside, *_), *_ = found
    assert [len(first), len(beside)] == [1, 1]
    assert int(first[0][1:]) // 2 == int(beside[0][1:]) // 2, "the second place is not on the node of the first"
    homes = {ranks(idle + busy, f"model-{number}")[0][0] for number in range(40)}
    assert len(homes) > 3, "all models begin at the same places"
    assert homes <= {one.replica_id.unique_id for one in idle}, "one of them has a model already"


def test_without_a_model_all_replicas_are_alike() -> None:
    found = [ranks([replica("a", "n0", {MODEL: 10}), replica("b", "n1", {}, loaded=("x",))], model="")]
    assert found == [[["a", "b"]]]


@pytest.mark.parametrize(
    "stats",
    [None, [], {}, {STATS_KEY: None}, {STATS_KEY: [MODEL]}, {STATS_KEY: {MODEL: "many"}}, {STATS_KEY: {MODEL: -1}},
     {STATS_KEY: {1: 2}}],
)  # fmt: skip
def test_statistics_of_another_form_say_nothing(stats: object) -> None:
    assert resident_bytes(stats, MODEL) == 0
    strange = replica("strange", "n0")
    strange.routing_stats = stats
    assert ranks([strange, replica("near", "n1", {MODEL: 1})]) == [["near"], ["strange"]]


def test_a_node_tells_what_is_resident_and_asks_for_the_list_when_it_has_changed(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = daemon.connect()
    lists = []
    checkpoints_of = client.checkpoints
    monkeypatch.setattr(client, "checkpoints", lambda: lists.append(None) or checkpoints_of()[::-1])
    residency, elsewhere = NodeResidency(client), NodeResidency(client, "cuda:0")

    def told() -> Any:
        return asyncio.run(residency.routing_stats())

    assert told() == {STATS_KEY: {}}
    files = {
        name: checkpoints.write_random(tmp_path / f"{name}.safetensors", tensors, 4096, name)
        for name, tensors in (("small", 1), ("large", 3), ("middle", 2))
    }
    with weightd.connect(daemon.socket, timeout=60.0) as loading:
        for name, file in files.items():
            loading.load(file, name=name)
    sizes = {"large": 3 * 4096, "middle": 2 * 4096, "small": 4096}
    assert list(told()[STATS_KEY].items()) == list(sizes.items()), "in another order it is news"
    eventually(lambda: not client.leases())
    asked = len(lists)
    assert told() == told()
    assert len(lists) == asked
    client.remove("large")
    del sizes["large"]
    assert told() == {STATS_KEY: sizes}
    assert asyncio.run(elsewhere.routing_stats()) == {STATS_KEY: {}}
    daemon.kill()
    assert told() == {STATS_KEY: {}}, "Serve would go on with what it said last"
    daemon.start()
    assert told() == {STATS_KEY: {}}
    client.load(files["large"], name="large")
    assert told() == {STATS_KEY: {"large": 3 * 4096}}
