"""The program behind `weightd fleet agent` (`python -m weightd_fleet.agent`): runs until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys

from weightd.errors import WeightdError

from .addresses import parse_address
from .agent import NodeSettings, running_agent

log = logging.getLogger("weightd_fleet.agent")


def main(arguments: list[str] | None = None) -> int:
    """Run an agent. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="weightd fleet agent", allow_abbrev=False)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--advertise")
    parser.add_argument("--tls-dir")
    parser.add_argument("--state-dir")
    parser.add_argument("--socket")
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--patience", type=float, default=30.0)
    parser.add_argument("--node-labels")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    ending = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # also in gRPC's threads, which start below
    settings = NodeSettings(options.state_dir, options.socket, options.tls_dir, options.patience)
    try:
        listen = parse_address(options.listen)
        advertised = parse_address(options.advertise) if options.advertise else None
        with (
            running_agent(listen, settings, options.readers, log.warning, advertised) as address,
            _node_labels(options.node_labels, settings),
        ):
            sys.stdout.write(f"weightd agent is ready: {address}\n")
            sys.stdout.flush()
            signal.sigwait(ending)
    except WeightdError as error:
        sys.stderr.write(f"weightd: {error}\n")
        return error.exit_code
    return 0


def _node_labels(node: str | None, settings: NodeSettings) -> contextlib.AbstractContextManager[None]:
    """Label a node of Kubernetes, if one is named. Errors: InvalidReferenceError."""
    if node is None:
        return contextlib.nullcontext()
    # Not before it is asked for: kubernetes belongs to an extra of its own.
    from weightd_fleet.engines.kubernetes_labels import labelled_by_daemon
    from weightd_fleet.engines.kubernetes_node import KubernetesNode

    return labelled_by_daemon(KubernetesNode(node), settings.socket, settings.patience)


if __name__ == "__main__":
    sys.exit(main())
