"""Ray Serve on nodes with daemons: where requests for models go, and what that takes of the fleet's memory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ray import serve

import weightd
from support import checkpoints, memory, routers_seen, served_models, workloads
from support.daemon import ROOT, environment, eventually
from support.ray_nodes import RayCluster, RayNode, ray_cluster
from support.served_models import DefaultRouter, WatchedRouter, replicas, resident

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle as Handle

DEV, IF2, LLAMA, QV = MODELS = ("FLUX.1-dev", "IF-II-L-v1.0", "Llama-3.1-8B", "Llama-3.1-8B-qv-merged")
SHORT = {DEV: "dev", IF2: "if2", LLAMA: "llama", QV: "qv"}
HOMES = {DEV: 0, IF2: 0, LLAMA: 1, QV: 1}
SCALE = 1 / 4
"""Of the workloads' rows in `*__s64`: 0.36 GB instead of 1.42. What the models share is the same to four digits."""
# Of each pair of nodes in turn, of one node first, and in between; the first one is where the bound below is for.
ORDERS = (
    (DEV, IF2, LLAMA, QV), (QV, LLAMA, IF2, DEV), (DEV, LLAMA, IF2, QV), (LLAMA, DEV, QV, IF2), (IF2, QV, LLAMA, DEV),
    (LLAMA, IF2, DEV, QV),
)  # fmt: skip
MOST_OF_DEFAULT = 0.65
"""In the first order Serve's router is wrong of one model of each pair, whichever it takes for the first."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The models' folders by name."""
    folder = tmp_path_factory.mktemp("models")
    workloads.write_models(folder, MODELS, SCALE)
    checkpoints.rest(*folder.rglob("*.safetensors"))  # or what is resident would be read again
    return {name: str(folder / name) for name in MODELS}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two nodes with Serve, of which this process is the driver."""
    with ray_cluster(2, agents=False) as started, started.driver():
        serve.start(proxy_location="Disabled")
        yield started
        serve.shutdown()


@pytest.fixture
def nodes(cluster: RayCluster, paths: dict[str, str]) -> list[RayNode]:
    """The nodes, each with its two models and nothing else."""
    restore(cluster.nodes, paths)
    return cluster.nodes


def restore(nodes: list[RayNode], paths: dict[str, str]) -> None:
    """Give each node its models, and remove all others."""
    for node in nodes:
        with weightd.connect(node.daemon.socket, timeout=60.0) as client:
            eventually(lambda client=client: not client.leases(), what="the leases of replicas to end")
            for found in client.checkpoints():
                if HOMES.get(found.name) != node.number:
                    client.remove(found.content_digest)
            for name, home in HOMES.items():
                if home == node.number:
                    client.load(paths[name], name=name)


def memory_of(nodes: list[RayNode]) -> int:
    """Bytes resident on all nodes."""
    total = 0
    for node in nodes:
        with weightd.connect(node.daemon.socket, timeout=60.0) as client:
            total += client.stats().resident_bytes
    return total


@contextlib.contextmanager
def deployed(
    router: type[DefaultRouter | WatchedRouter],
    nodes: list[RayNode],
    paths: dict[str, str],
    *,
    each: int,
    **options: Any,
) -> Iterator[Handle]:
    """An application with so many replicas on each node, whose router knows what is resident there."""
    here = f"in({','.join(node.ray_id for node in nodes)})"
    known = {node.ray_id: {name for name, home in HOMES.items() if home == node.number} for node in nodes}
    with served_models.served(
        router, paths, num_replicas=each * len(nodes), max_replicas_per_node=each,
        ray_actor_options={"num_cpus": 0, "label_selector": {"ray.io/node-id": here}}, **options,
    ) as handle:  # fmt: skip
        eventually(
            lambda: (
                len(replicas()) == each * len(nodes)
                and all(resident(one).keys() == known[one.node_id] for one in replicas())
            ),
            what="statistics of all replicas",
        )
        yield handle


def ask(handle: Handle, name: str) -> dict[str, Any]:
    """Ask for a model, and wait until the router knows that a replica has it."""
    answer: dict[str, Any] = handle.options(multiplexed_model_id=name).remote().result(timeout_s=60)
    eventually(partial(is_loaded, name), what=f"the router to know that {name} is loaded")
    return answer


def is_loaded(name: str) -> bool:
    return any(name in one.multiplexed_model_ids for one in replicas())


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "-".join(SHORT[name] for name in order))
def test_the_router_loads_nothing_that_is_resident(
    nodes: list[RayNode], paths: dict[str, str], order: tuple[str, ...]
) -> None:
    least = memory_of(nodes)
    taken = {}
    for router in (DefaultRouter, WatchedRouter):
        restore(nodes, paths)
        with deployed(router, nodes, paths, each=1) as handle:
            answers = [ask(handle, name) for name in order]
            again = [ask(handle, name) for name in order]
            taken[router] = memory_of(nodes)
        read = [name for name, answer in zip(order, answers, strict=True) if answer["read_bytes"]]
        print(f"{router.__name__}: loaded anew {read or 'nothing'}, {taken[router] / 1e6:.1f} MB in the fleet")
        assert not any(answer["read_bytes"] for answer in again)
    assert read == []  # of ours, the last
    assert [answer["node"] for answer in answers] == [f"n{HOMES[name]}" for name in order]
    assert taken[WatchedRouter] == least <= taken[DefaultRouter]
    if order == ORDERS[0]:
        assert taken[WatchedRouter] <= MOST_OF_DEFAULT * taken[DefaultRouter]


def test_replicas_of_a_node_share_and_a_hot_model_stays_on_its_node(
    nodes: list[RayNode], paths: dict[str, str], tmp_path: Path
) -> None:
    least = memory_of(nodes)
    with deployed(WatchedRouter, nodes, paths, each=2, max_ongoing_requests=1) as handle:
        go_on = tmp_path / "go-on"

        def hold(number: int) -> Any:
            """A request for a model that takes long; the number is how many are under way then."""
            response = handle.options(multiplexed_model_id=LLAMA).hold.remote(str(tmp_path), str(go_on))
            eventually(lambda: len(list(tmp_path.glob("*.pid"))) == number)
            return response

        held = [hold(1), hold(2)]
        assert memory_of(nodes) == least, "a replica where the bytes are was free"
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
        llama = next(found for found in nodes[1].daemon.connect().checkpoints() if LLAMA in found.names)
        share = [memory.attached_pss(pid) / llama.total_bytes for pid in pids]
        assert 0.95 < sum(share) < 1.1, share
        assert all(0.45 < one < 0.6 for one in share), share

        held += [hold(3), hold(4)]  # its node is busy: the other one loads it, once for both replicas
        assert len(list(tmp_path.glob("*.pid"))) == 4
        last = handle.options(multiplexed_model_id=LLAMA).remote()  # all are full
        calls = len(routers_seen.asked_for)
        eventually(lambda: len(routers_seen.asked_for) > calls + 1, what="Serve to ask the router again")
        go_on.touch()
        answers = [response.result(timeout_s=60) for response in held]
        assert [answer["node"] for answer in answers] == ["n1", "n1", "n0", "n0"]
        assert [bool(answer["read_bytes"]) for answer in answers] == [False, False, True, False]
        assert last.result(timeout_s=60)["read_bytes"] == 0


def test_the_example_on_a_cluster_that_runs(cluster: RayCluster, nodes: list[RayNode], tmp_path: Path) -> None:
    base = checkpoints.write_random(tmp_path / "base.safetensors", 8, 1 << 20, "base")
    tuned = checkpoints.write_random(tmp_path / "tuned.safetensors", 8, 1 << 20, "tuned", {0: ("base", 0)})
    finished = subprocess.run(
        [sys.executable, ROOT / "examples" / "ray_serve.py", "--address", cluster.address, "--replicas", "2",
         f"base={base}", f"tuned={tuned}"],
        env=environment() | cluster.variables(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("base: 8 tensors") >= 2
    assert finished.stdout.count("tuned: 8 tensors") >= 2
