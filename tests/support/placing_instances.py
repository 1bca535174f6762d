"""Seeded instances of placing, as on a hub, and the optimum that scipy's HiGHS finds for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

from weightd_fleet.core.atoms import Atoms, find_atoms

if TYPE_CHECKING:
    from numpy.random import Generator

UNIT = 1 << 20
"""Bytes are multiples of this, so that the solver's tolerance is below one unit."""


@dataclass(frozen=True)
class Instance:
    """Checkpoints, how many replicas of each, and equal nodes of one budget in bytes."""

    atoms: Atoms
    replicas: tuple[int, ...]
    nodes: int
    budget: int


class _Hub:
    """Makes checkpoints: families with fine-tunes, pipelines with a common encoder, and loners."""

    def __init__(self, random: Generator) -> None:
        self._random = random
        self.lengths: list[int] = []
        self._encoders = [self._blobs(9, 20) for _ in range(2)]

    def _blobs(self, gibibytes: float, count: int) -> list[int]:
        shares = self._random.dirichlet(np.ones(count)) * gibibytes * 1024
        begin = len(self.lengths)
        self.lengths += [max(1, round(share)) * UNIT for share in shares]
        return list(range(begin, len(self.lengths)))

    def checkpoints(self, count: int) -> list[list[int]]:
        """`count` checkpoints, by the numbers of their blobs."""
        random, found = self._random, list[list[int]]()
        while len(found) < count:
            kind = random.choice(["family", "pipeline", "loner"], p=[0.55, 0.3, 0.15])
            if kind == "family":
                base = self._blobs(float(random.choice([3, 8, 16, 30])), 60)
                found.append(base)
                for _ in range(random.integers(1, 5)):
                    share = random.choice([0.3, 0.6, 0.8, 0.92, 0.97])
                    kept = [blob for blob in base if random.random() < share]
                    changed = sum(self.lengths[blob] for blob in set(base) - set(kept)) / (1024 * UNIT)
                    found.append(kept + self._blobs(changed + 0.001, 30))
            elif kind == "pipeline":
                own = self._blobs(float(random.choice([2, 5, 12, 24])), 40)
                found.append(self._encoders[random.integers(2)] + own)
            else:
                found.append(self._blobs(float(random.choice([3, 8, 16])), 50))
        random.shuffle(found)
        return found[:count]


def instance(seed: int, *, tight: bool) -> Instance:
    """An instance; a tight one has at most 1.1 times the bytes that all replicas take where nothing has to fit."""
    random = np.random.default_rng([seed, tight])
    count, nodes = (int(random.integers(9, 15)), 4) if tight else (int(random.integers(6, 11)), 3)
    hub = _Hub(random)
    checkpoints = hub.checkpoints(count)
    atoms = find_atoms([np.array(blobs, np.int32) for blobs in checkpoints], np.array(hub.lengths, np.int64))
    replicas = [1] * count
    for chosen in random.choice(count, int(count * 0.3), replace=False):
        replicas[chosen] = 2
    slack = random.uniform(1.02, 1.1) if tight else random.choice([1.3, 1.6, 2.0])
    budget = max(int(least_bytes(atoms, replicas) / nodes * slack), int(atoms.sizes.max()))
    return Instance(atoms, tuple(replicas), nodes, budget)


def least_bytes(atoms: Atoms, replicas: list[int]) -> int:
    """Bytes of all replicas on nodes without limits: each atom as often as its most replicated checkpoint."""
    most = [max(replicas[holder] for holder in atoms.holders[atom]) for atom in range(len(atoms.weights))]
    return int(atoms.weights @ np.array(most, np.int64))


def optimum(asked: Instance, seconds: float = 60.0) -> int | None:
    """The fewest bytes with which all replicas are placed; None where they cannot be."""
    atoms, nodes = asked.atoms, asked.nodes
    checkpoints, units = len(atoms.members), atoms.weights / UNIT
    placed = checkpoints * nodes  # variables: checkpoint on node, then atom on node
    rows, columns, values, lows, highs = [], [], [], [], []

    def constrain(terms: list[tuple[int, float]], low: float, high: float) -> None:
        rows.extend([len(lows)] * len(terms))
        columns.extend(column for column, _ in terms)
        values.extend(value for _, value in terms)
        lows.append(low)
        highs.append(high)

    for checkpoint, wanted in enumerate(asked.replicas):
        constrain([(checkpoint * nodes + node, 1.0) for node in range(nodes)], wanted, wanted)
    for node in range(nodes):
        terms = [(placed + node * len(units) + atom, weight) for atom, weight in enumerate(units)]
        constrain(terms, -np.inf, asked.budget / UNIT)
        for checkpoint in range(checkpoints):
            for atom in atoms.members[checkpoint].tolist():
                terms = [(placed + node * len(units) + atom, 1.0), (checkpoint * nodes + node, -1.0)]
                constrain(terms, 0, np.inf)
    size = placed + nodes * len(units)
    matrix = coo_matrix((values, (rows, columns)), shape=(len(lows), size)).tocsr()
    solved = milp(
        np.concatenate([np.zeros(placed), np.tile(units, nodes)]),
        constraints=LinearConstraint(matrix, lows, highs),
        integrality=np.concatenate([np.ones(placed), np.zeros(size - placed)]),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    if solved.status == 2:
        return None
    if solved.status != 0:
        raise AssertionError(f"the solver gave up: {solved.message}")
    return round(solved.fun) * UNIT
