"""Ray Serve: several models, and replicas that share them through their node's daemon.

    pip install '.[fleet-ray]' 'ray[serve]'
    weightd serve &
    python examples/ray_serve.py

starts Ray on this machine alone, with two replicas. On a cluster each node needs a daemon; where its socket is not the
default one, WEIGHTD_SOCKET must be in the environment of `ray start`:

    python examples/ray_serve.py --address ADDRESS --replicas 4 base=/models/base tuned=/models/tuned

A model is NAME=REFERENCE: a file, a folder or org/name, which every node can read. Without any it writes the two
checkpoints of two_checkpoints.py into the current folder.

A replica attaches to a model when it is first asked for it. All replicas of a node then have one copy in memory, and of
two models that share tensors, those once. WeightdRouter sends a request to a replica that has the model, else to a node
that has its bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

import ray
import two_checkpoints
from ray import serve
from ray.serve.config import RequestRouterConfig

import weightd
from weightd.fleet import NodeResidency


@serve.deployment(
    max_ongoing_requests=2,
    ray_actor_options={"num_cpus": 0.5},  # some, so that none is on a head without CPUs, which needs no daemon then
    request_router_config=RequestRouterConfig(
        request_router_class="weightd.fleet:WeightdRouter", request_routing_stats_period_s=1
    ),
)
class Models:
    """Answers a request for a model. What it computes is up to you: here, how much it has of the model."""

    def __init__(self, references: dict[str, str]) -> None:
        self.references = references
        self.client = weightd.connect(fallback="wait")  # this node's daemon
        self.residency = NodeResidency(self.client)

    async def record_routing_stats(self) -> dict[str, Any]:
        """Tell the router what is on this node."""
        return await self.residency.routing_stats()

    @serve.multiplexed(max_num_models_per_replica=8)
    async def model(self, name: str) -> weightd.Attachment:
        """Attach to a model; only the first replica of a node reads its files. With torch, make a module of it here."""
        return await asyncio.to_thread(self.attach, name)

    def attach(self, name: str) -> weightd.Attachment:
        """Load under the model's name, by which the router knows it, and attach."""
        self.client.load(self.references[name], name=name)
        return self.client.attach(name)

    async def __call__(self) -> dict[str, Any]:
        """What this replica has of the model, and what its node's daemon has of all models."""
        attachment = await self.model(serve.get_multiplexed_model_id())
        stats = self.client.stats()
        return {
            "node": ray.get_runtime_context().get_node_id()[:8],
            "pid": os.getpid(),
            "tensors": len(attachment.tensors),
            "logical": stats.logical_bytes,
            "resident": stats.resident_bytes,
        }


def main() -> None:
    """Deploy, ask several times for each model at once, and show who answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=REFERENCE", type=named)
    parser.add_argument("--address", default="local", help="of a Ray cluster that runs [default: start one here]")
    parser.add_argument("--replicas", type=int, default=2)
    arguments = parser.parse_args()
    references = dict(arguments.models) or written(Path.cwd())

    ray.init(arguments.address, log_to_driver=False)
    serve.start(proxy_location="Disabled")  # requests come from this process; without this line, by HTTP as well
    deployment = Models.options(num_replicas=arguments.replicas)
    handle = serve.run(deployment.bind(references), name="weightd-example", route_prefix=None)
    for _ in range(2):
        for name in references:
            asked = [handle.options(multiplexed_model_id=name).remote() for _ in range(2 * arguments.replicas)]
            answers = {answer["pid"]: answer for answer in (response.result() for response in asked)}
            for answer in answers.values():
                print(f"{name}: {answer['tensors']} tensors in process {answer['pid']} on node {answer['node']}")
    for node, answer in {answer["node"]: answer for answer in answers.values()}.items():
        print(f"node {node}: {answer['logical'] / 2**20:.1f} MiB of models in {answer['resident'] / 2**20:.1f} MiB")
    serve.delete("weightd-example")
    ray.shutdown()


def named(text: str) -> tuple[str, str]:
    """A model's name and reference."""
    name, separator, reference = text.partition("=")
    if not (name and separator and reference):
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=REFERENCE")
    return name, reference


def written(folder: Path) -> dict[str, str]:
    """Two checkpoints that share most of their bytes, by name."""
    paths = {name: folder / f"{name}.safetensors" for name in ("base", "tuned")}
    if not all(path.is_file() for path in paths.values()):
        two_checkpoints.write_both(folder)
    return {name: str(path) for name, path in paths.items()}


if __name__ == "__main__":
    main()
