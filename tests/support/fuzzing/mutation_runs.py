"""A run of mutations of a target's corpus, the same for every target."""

from __future__ import annotations

import gc

from hypothesis import HealthCheck, Phase, given, settings

from support.descriptors import counted

from . import corpus
from .mutations import mutated
from .registry import TARGETS
from .target import in_time, outcome

_KEPT = 4
"""Descriptors that may stay: files of leases, which wait for the next ones."""


def run_mutations(name: str, examples: int, valid: bytes | None = None) -> None:
    """Run a target on so many mutations of its corpus, and of a `valid` input as often; then count its descriptors."""
    target = TARGETS[name]
    inputs = [*corpus.kept_of(name).values()]
    if valid is not None:
        inputs += [valid] * len(inputs)
    for data in inputs:
        outcome(target, data)  # what a target makes once
    gc.collect()
    before = counted()

    @settings(
        max_examples=examples, phases=[Phase.reuse, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutated(inputs))
    def run(data: bytes) -> None:
        with in_time():
            outcome(target, data)

    run()
    gc.collect()
    assert counted() <= before + _KEPT, "descriptors are left open"
