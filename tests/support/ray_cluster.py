"""A Ray cluster of several nodes on this machine: the process that starts it, and ends it with its standard input.

    python -m support.ray_cluster '{"head": ADDRESS, "nodes": [{"address": …, "labels": {…}, "variables": {…}}, …]}'

Standard output says in JSON where it is, with the ids of its nodes, then answers each order: the number of a node to
kill.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any, TextIO

import ray
from ray.cluster_utils import Cluster

# A raylet that is killed fails a check at once, and is dead after three; one that is only slow has ten seconds a check.
SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "enable_worker_prestart": False,
}
NODE = {"object_store_memory": 80 << 20, "include_dashboard": False}  # Ray takes no less than 75 MiB


def main() -> None:
    """Start the cluster, say so, obey, shut down."""
    order = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints
    # The head has no daemon, and so no CPUs for replicas. Ray rewrites 127.0.0.1, and without an address it takes the
    # machine's outward one.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **NODE, "node_ip_address": order["head"], "num_cpus": 0, "_system_config": SYSTEM_CONFIG,
        },
    )  # fmt: skip
    try:
        nodes = [
            cluster.add_node(
                wait=False, node_ip_address=node["address"], num_cpus=2, env_vars=node["variables"],
                labels=node["labels"], **NODE,
            )
            for node in order["nodes"]
        ]  # fmt: skip
        cluster.wait_for_nodes()
        probe(cluster.address, order["head"], 1 + len(nodes))
        say(answers, {"address": cluster.address, "nodes": [node.node_id for node in nodes]})
        for line in sys.stdin:
            cluster.remove_node(nodes[int(line)], allow_graceful=False)
            say(answers, {})
    finally:
        cluster.shutdown()


def probe(address: str, head: str, count: int) -> None:
    """See that a driver can connect, and finds all nodes."""
    ray.init(address, _node_ip_address=head, log_to_driver=False, logging_level=logging.ERROR)
    assert sum(node["Alive"] for node in ray.nodes()) == count
    ray.shutdown()


def say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
