"""The program behind `weightd fleet plan` (`python -m weightd_fleet.planning`): which checkpoints go on which node.

A composition root without a daemon: it reads what is planned with the code of `weightd plan`, and places it. It answers
in lines of JSON (weightd_daemon/answers.py) and ends with {"plan", "report"}; the report is null unless asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from weightd._sizes import size
from weightd.errors import InvalidReferenceError
from weightd.resolve import reference_name
from weightd_daemon.answers import THREADS, answer
from weightd_daemon.config.notation import parse_size
from weightd_daemon.core.arena import slot_bytes
from weightd_daemon.core.plan import PlannedTensor, make_plan, shared_contents
from weightd_daemon.planning import Question, index_folder, read_contents

from .core.atoms import Atoms, atoms_of
from .core.books import FleetDevice
from .core.placing import FleetPlan, LeftOverReplicas, ReplicaPlacement, least_nodes, place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from weightd_daemon.answers import ProgramAnswers

MAX_NODES: Final = 10_000
MAX_REPLICAS: Final = 10_000


class _Fleet(NamedTuple):
    """The nodes that are planned for: how many, and what each is."""

    nodes: int
    node: FleetDevice
    replicas: int


def main(arguments: list[str] | None = None) -> int:
    """Answer one question. Returns the exit code: 0 also where the answer is an error."""
    parser = argparse.ArgumentParser(prog="weightd_fleet.planning", allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--budget", required=True)
    parser.add_argument("--page", required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--manifest", action="append", default=[])
    parser.add_argument("--report", action="store_true", help="answer with the report of sharing, too")
    parser.add_argument("--variant")
    parser.add_argument("--state-dir")
    parser.add_argument("references", nargs="*")
    return answer("fleet plan", _asked, parser, arguments)


def _asked(options: argparse.Namespace, answers: ProgramAnswers) -> dict[str, Any]:
    node = FleetDevice("", "", _size("--budget", options.budget), _size("--page", options.page))
    if not (0 < options.nodes <= MAX_NODES and 0 < options.replicas <= MAX_REPLICAS):
        raise InvalidReferenceError(
            f"--nodes {options.nodes}, --replicas {options.replicas}: must be at least 1 and at most {MAX_NODES}"
        )
    given = _given(options.references, options.variant)
    question = Question(
        options.references,
        options.manifest,
        options.variant,
        state_dir=index_folder(options.state_dir),
        threads=THREADS,
    )
    contents = read_contents(question, advance=answers.advance, note=answers.note)
    tensors = {given.get(name, name): some for name, some in contents.tensors.items()}
    if len(tensors) < len(contents.tensors):
        raise InvalidReferenceError("a reference and a checkpoint of a manifest have one name; give an absolute path")
    found = plan(list(tensors), atoms_of_tensors(tensors), _Fleet(options.nodes, node, options.replicas))
    report = asdict(replace(make_plan(tensors), read_bytes=contents.read_bytes)) if options.report else None
    return {"plan": found, "report": report}


def _given(references: Sequence[str], variant: str | None) -> dict[str, str]:
    """The references by the names that they stand for. Errors: InvalidReferenceError (two stand for one)."""
    given: dict[str, str] = {}
    for reference in references:
        name = reference_name(reference, variant)
        if name in given:
            raise InvalidReferenceError(
                f"{reference} and {given[name]}: are one checkpoint; name it once, and ask for --replicas"
            )
        given[name] = reference
    return given


def _size(option: str, said: str) -> int:
    try:
        value = parse_size(said)
    except ValueError as error:
        raise InvalidReferenceError(f"{option}: {error}") from error
    if not 0 < value < 2**62:
        raise InvalidReferenceError(f"{option} {said}: must be more than 0, and less than 4 EiB")
    return value


def atoms_of_tensors(checkpoints: Mapping[str, Sequence[PlannedTensor]]) -> Atoms:
    """The atoms of checkpoints by their tensors, with the bytes that the daemon's slots for them take.

    Of small equal tensors a checkpoint holds a copy for each name, and checkpoints share these one to one. So each
    further copy is an atom of the checkpoints that have that many.
    """
    numbers = {name: number for number, name in enumerate(checkpoints)}
    in_slots = {
        name: [tensor._replace(length=slot_bytes(tensor.length)) for tensor in tensors]
        for name, tensors in checkpoints.items()
    }
    weights: Counter[tuple[int, ...]] = Counter()
    for content in shared_contents(in_slots):
        copies = {numbers[name]: len(held) for name, held in content.held().items()}
        for copy in range(max(copies.values())):
            weights[tuple(number for number, count in copies.items() if count > copy)] += content.length
    return atoms_of(weights, len(checkpoints))


def plan(names: Sequence[str], atoms: Atoms, fleet: _Fleet) -> dict[str, Any]:
    """The plan as JSON shows it; sizes are bytes. `names` are those of the checkpoints."""
    replicas = [fleet.replicas] * len(names)
    width = len(str(fleet.nodes))
    devices = [
        FleetDevice(name, name, fleet.node.budget_bytes, fleet.node.page_bytes)
        for name in (f"node-{number:0{width}}" for number in range(1, fleet.nodes + 1))
    ]
    found = place(atoms, replicas, devices)
    apart = atoms_of({(number,): int(each) for number, each in enumerate(atoms.sizes)}, len(names))
    total = int(atoms.sizes.sum()) * fleet.replicas
    return {
        "total_bytes": total,
        "placed_bytes": found.placed_bytes,
        "least_nodes": None if found.left_over else least_nodes(atoms, replicas, fleet.node, fleet.nodes),
        "least_nodes_apart": least_nodes(apart, replicas, fleet.node, max(fleet.nodes, sum(replicas))),
        "nodes": [_node(number, device, found, names) for number, device in enumerate(devices)],
        "unplaced": [names[left.checkpoint] for left in found.left_over],
        "placements": [_placement(placed, devices, names) for placed in found.placements],
        "left_over": [_left_over(left, names) for left in found.left_over],
    }


def _node(number: int, device: FleetDevice, found: FleetPlan, names: Sequence[str]) -> dict[str, Any]:
    return {
        "name": device.name,
        "checkpoints": [names[placed.checkpoint] for placed in found.placements if placed.device == number],
        "used_bytes": found.used_bytes[number],
        "budget_bytes": device.budget_bytes,
    }


def _placement(placed: ReplicaPlacement, devices: Sequence[FleetDevice], names: Sequence[str]) -> dict[str, Any]:
    partner = "" if placed.partner is None else names[placed.partner]
    why = (
        f"shares {size(placed.size_bytes - placed.alone_bytes)} of {size(placed.size_bytes)} there, "
        f"{size(placed.partner_bytes)} of it with {partner}"
        if partner
        else f"shares none of its {size(placed.size_bytes)} there"
    )
    return {
        "checkpoint": names[placed.checkpoint],
        "node": devices[placed.device].name,
        "size_bytes": placed.size_bytes,
        "alone_bytes": placed.alone_bytes,
        "partner": partner or None,
        "partner_bytes": placed.partner_bytes,
        "why": why,
    }


def _left_over(left: LeftOverReplicas, names: Sequence[str]) -> dict[str, Any]:
    why = (
        "every node has a replica already: ask for fewer replicas or more nodes"
        if left.needs_nodes
        else f"needs {size(left.least_bytes)} or more on a node, and the emptiest has {size(left.most_room_bytes)} left"
    )
    return {"checkpoint": names[left.checkpoint], "replicas": left.replicas, "why": why}


if __name__ == "__main__":
    sys.exit(main())
