"""Every input of the corpus, once: a clear error or a value, in time, in little memory, and nothing left behind."""

from __future__ import annotations

import gc
from collections import Counter

import pytest

from support.daemon import eventually
from support.descriptors import counted
from support.fuzzing import corpus
from support.fuzzing.registry import TARGETS
from support.fuzzing.target import in_little_memory, in_time, outcome

LEAST_REFUSED = 300
"""Distinct hostile inputs of the corpus that get an error. Of the others a valid file, or a start with what is left, is
right: a changed bit may be one of a tensor's bytes."""
_LEFT_OBJECTS = 2000
"""Objects that the targets themselves keep, such as caches: an input's own would be as many for each of its rounds."""


def run(target: str) -> list[str]:
    """The error of each input of a target, "" for a value."""
    found = []
    for name, data in corpus.kept_of(target).items():
        with in_time(), in_little_memory(TARGETS[target].peak_bytes):
            try:
                found.append(outcome(TARGETS[target], data))
            except Exception as error:
                error.add_note(f"input: tests/fuzz/corpus/{target}/{name}")
                raise
    return found


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_an_input_is_refused_clearly_or_right_and_leaves_nothing(target: str) -> None:
    outcome(TARGETS[target], b"")  # what a target makes once
    errors = run(target)
    gc.collect()
    before = counted(), len(gc.get_objects())
    assert run(target) == errors, "another outcome the second time"
    gc.collect()
    # Others may have been collected; and a client of an earlier test may be trying to reach a daemon that has ended.
    eventually(lambda: counted() <= before[0], what="descriptors are left open")
    assert len(gc.get_objects()) - before[1] < _LEFT_OBJECTS
    assert any(errors)


def test_enough_is_hostile() -> None:
    refused = {data for target in TARGETS for data in corpus.kept_of(target).values() if outcome(TARGETS[target], data)}
    assert len(refused) >= LEAST_REFUSED


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_corpus_is_what_the_ideas_make(target: str) -> None:
    """Else: `PYTHONPATH=client:daemon:fleet:tests .venv/bin/python -m support.fuzzing.corpus`."""
    ideas = corpus.ideas_of(target)
    assert {one.name: one.data for one in ideas} == corpus.kept_of(target)
    assert max(Counter(one.name for one in ideas).values()) == 1
    assert max(Counter(one.data for one in ideas).values()) == 1


def test_the_manifest_says_what_each_is() -> None:
    assert (corpus.FOLDER / "MANIFEST.tsv").read_text() == corpus.manifest()
    assert sorted(path.name for path in corpus.FOLDER.iterdir() if path.is_dir()) == sorted(TARGETS)
