"""Receivers of one checkpoint from one source on the loopback: all at once, against one after the other.

    python bench/fleet_fetch.py [--receivers 8] [--mib 256] [--tensors 64] [--readers 2] [--format human|json]
        [--rounds 3] [--results FOLDER]

Every node is an agent of its own, without TLS and without a daemon, and fetches into files. "All at once" orders all
fetches at the same moment: the source serves `--readers` of them, and refers others to nodes that have read. The bytes
that the source sent are from its log; each receiver compares every byte with its digest.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _daemon import machine, write_checkpoint
from _results import LEAST_ROUNDS, Comparison, Report, add_options

from weightd_fleet._proto.v1 import peer_pb2
from weightd_fleet.agent.addresses import AgentAddress, parse_address
from weightd_fleet.agent.peer import Peer
from weightd_fleet.publishing.publish import publish
from weightd_fleet.publishing.state import PublishedState

if TYPE_CHECKING:
    from collections.abc import Iterator

_SENT = re.compile(r"sent (\d+) bytes")
SECONDS = 600.0
IN_TURN = "one after the other"


@contextmanager
def agent(state: Path, readers: int) -> Iterator[AgentAddress]:
    """An agent whose log is beside its state."""
    command = [
        sys.executable, "-m", "weightd_fleet.agent", "--listen=127.0.0.1:0", f"--state-dir={state}",
        "--socket=/nonexistent/weightd.sock", f"--readers={readers}",
    ]  # fmt: skip
    with (
        state.with_suffix(".log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            yield parse_address(process.stdout.readline().rsplit(" ", 1)[1].strip())
        finally:
            process.terminate()


def sent(state: Path) -> int:
    """Bytes that an agent has sent so far."""
    return sum(map(int, _SENT.findall(state.with_suffix(".log").read_text())))


def fetch(receiver: AgentAddress, digest: str, source: AgentAddress) -> int:
    """Order a fetch. Returns the bytes that were moved."""
    order = peer_pb2.FetchRequest(name=digest, sources=[str(source)], sink=peer_pb2.SINK_FILES)
    with Peer(receiver, None) as peer:
        *_, last = peer.fetch(order, SECONDS)
    return int(last.result.moved_bytes)


def run(folder: Path, digest: str, source_state: Path, receivers: int, readers: int, together: int) -> dict[str, Any]:
    """Fill fresh nodes, `together` at once."""
    with ExitStack() as stack:
        source = stack.enter_context(agent(source_state, readers))
        nodes = [stack.enter_context(agent(folder / f"n{number}", readers)) for number in range(receivers)]
        begun = time.perf_counter()
        with ThreadPoolExecutor(together) as pool:
            moved = list(pool.map(lambda node: fetch(node, digest, source), nodes))
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "source_bytes": sent(source_state), "moved_bytes": sum(moved)}


def measure(receivers: int, mib: int, tensors: int, readers: int, below: Path | None) -> dict[str, Any]:
    """One round."""
    found: dict[str, Any] = {
        "machine": machine(), "receivers": receivers, "readers": readers, "tensors": tensors,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="weightd-bench-", dir=below) as name:
        folder = Path(name)
        write_checkpoint(folder / "m.safetensors", mib << 20, tensors, seed=0)
        published = publish(str(folder / "m.safetensors"), PublishedState(folder / "source"))
        found["bytes"], digest = published.total_bytes, published.digest
        for what, together in (("in_turn", 1), ("at_once", receivers)):
            with tempfile.TemporaryDirectory(prefix="n-", dir=folder) as nodes:
                found[what] = run(Path(nodes), digest, folder / "source", receivers, readers, together)
    return found


def show(found: dict[str, Any]) -> None:
    whole = found["bytes"]
    print(f"machine: {found['machine']}")
    print(
        f"{found['receivers']} receivers of {whole / 2**20:.0f} MiB in {found['tensors']} tensors, "
        f"{found['readers']} readers a source\n\n| fetches | seconds | MiB/s together | sent by the source |\n"
        "|---|---|---|---|"
    )
    for what in ("in_turn", "at_once"):
        one = found[what]
        rate = one["moved_bytes"] / one["seconds"] / 2**20
        print(f"| {what.replace('_', ' ')} | {one['seconds']:.1f} | {rate:.0f} | {one['source_bytes'] / whole:.2f} × |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receivers", type=int, default=8)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--format", choices=["human", "json"], default="human")
    parser.add_argument("--folder", type=Path, help="where to put nodes for the time (default: the system's)")
    add_options(parser, rounds=3, seconds=100)
    options = parser.parse_args()
    parameters = {
        "receivers": options.receivers, "MiB": options.mib, "tensors": options.tensors, "readers": options.readers,
    }  # fmt: skip
    report = Report("fetch", parameters)
    begun, rounds = time.monotonic(), []
    while len(rounds) < options.rounds and (len(rounds) < LEAST_ROUNDS or time.monotonic() < begun + options.seconds):
        rounds.append(measure(*parameters.values(), options.folder))
        if options.format == "json":
            print(json.dumps(rounds[-1]))
        else:
            show(rounds[-1])
    if len(rounds) > 1:
        record(rounds, report)
        report.write(options.results)
    return 0 if all(map(complete, rounds)) else 1


def complete(found: dict[str, Any]) -> bool:
    """Whether all receivers got all."""
    whole = found["bytes"] * found["receivers"]
    return bool(found["in_turn"]["moved_bytes"] == found["at_once"]["moved_bytes"] == whole)


def record(rounds: list[dict[str, Any]], report: Report) -> None:
    """Put the rounds into the form of results."""
    ways = (("weightd, at once", "at_once"), (IN_TURN, "in_turn"))
    for name, what, unit, key, scale, aim, predicted in (
        ("seconds", "all fetches", "s", "seconds", 1, 1.0, "1.0: all nodes share two cores, which both ways keep busy"),
        ("sent", "what the source sends for them", "MiB", "source_bytes", 1 << 20, 0.5, "0.5, as one day before"),
    ):
        samples = {side: [found[way][key] / scale for found in rounds] for side, way in ways}
        report.add(Comparison(name, what, unit, samples, predicted, aims={IN_TURN: aim}))


if __name__ == "__main__":
    sys.exit(main())
