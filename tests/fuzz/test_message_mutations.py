"""Mutations of what clients, daemons, loaders and peers send each other, and of what a start finds."""

from __future__ import annotations

import pytest

from support.fuzzing import handle_targets, kept_ideas, kept_targets, peer_targets
from support.fuzzing.mutation_runs import run_mutations

VALID = {
    "manifest": handle_targets.valid_manifest,
    "fleet_manifest": lambda: peer_targets.served().manifest.encoded,
    "root_log": kept_ideas.valid_log,
    "root_rows": kept_targets.valid_rows,
}
EXAMPLES = {
    "fleet_manifest": 2000,
    "frames": 1000,
    "loader_hears": 1000,
    "loader_says": 1000,
    "manifest": 2000,
    "peer_answers": 1000,
    "peer_requests": 1000,
    "replies": 700,
    "root_log": 1000,
    "root_rows": 300,
    "settings": 1000,
}


@pytest.mark.parametrize("target", sorted(EXAMPLES))
def test_mutations(target: str) -> None:
    run_mutations(target, EXAMPLES[target], VALID[target]() if target in VALID else None)
