"""The arithmetic of a plan."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightd.plan_report import PlannedPair, PlanReport, SharedPart
from weightd_daemon.core.blob import OWN_COPY_BELOW
from weightd_daemon.core.plan import PlannedTensor, make_plan, recurring

BIG = OWN_COPY_BELOW
SMALL = OWN_COPY_BELOW - 1

Contents = list[tuple[str, int, int | None]]


def tensors(*contents: tuple[str, int, int | None]) -> list[PlannedTensor]:
    """Tensors of (component, length, identity), with names of their own."""
    return [PlannedTensor(component, f"t{i}", length, what) for i, (component, length, what) in enumerate(contents)]


def figures(plan: PlanReport) -> tuple[int, int, int]:
    return plan.total_bytes, plan.unique_bytes, plan.saved_bytes


def test_what_two_have_in_common_is_held_once() -> None:
    plan = make_plan(
        {
            "a": tensors(("encoder", BIG, 1), ("unet", 2 * BIG, 2)),
            "b": tensors(("text", BIG, 1), ("unet", 3 * BIG, 3)),
            "c": tensors(("", BIG, 4)),
        }
    )
    assert figures(plan) == (8 * BIG, 7 * BIG, BIG)
    assert plan.saved_ratio == 1 / 8
    assert plan.pairs == (PlannedPair(("a", "b"), BIG, (SharedPart(("encoder", "text"), BIG),)),)
    a, b, c = plan.checkpoints
    assert (a.name, a.tensors, a.total_bytes, a.exclusive_bytes, a.shared_bytes) == ("a", 2, 3 * BIG, 2 * BIG, BIG)
    assert (a.shared_with, b.shared_with, c.shared_with) == (1, 1, 0)
    assert [(part.name, part.total_bytes, part.shared_bytes) for part in a.components] == [
        ("encoder", BIG, BIG),
        ("unet", 2 * BIG, 0),
    ]


def test_equal_digests_of_other_lengths_are_not_equal() -> None:
    assert make_plan({"a": tensors(("", BIG, 1)), "b": tensors(("", BIG + 1, 1))}).saved_bytes == 0


def test_without_an_identity_a_tensor_equals_none() -> None:
    assert make_plan({"a": tensors(("", BIG, None), ("", BIG, None)), "b": tensors(("", BIG, None))}).saved_bytes == 0


def test_duplicates_inside_one_checkpoint_are_held_once_from_64_kib_on() -> None:
    plan = make_plan({"a": tensors(("", BIG, 1), ("", BIG, 1), ("", SMALL, 2), ("", SMALL, 2))})
    assert figures(plan) == (2 * BIG + 2 * SMALL, BIG + 2 * SMALL, BIG)
    (a,) = plan.checkpoints
    assert (a.exclusive_bytes, a.shared_bytes, a.shared_with) == (BIG + 2 * SMALL, BIG, 0)
    assert a.components[0].shared_bytes == 0  # not with another checkpoint
    assert plan.pairs == ()


def test_small_copies_are_shared_one_to_one_between_checkpoints() -> None:
    plan = make_plan({"a": tensors(*[("", SMALL, 1)] * 3), "b": tensors(*[("", SMALL, 1)] * 5)})
    assert figures(plan) == (8 * SMALL, 5 * SMALL, 3 * SMALL)
    assert plan.pairs[0].shared_bytes == 3 * SMALL
    a, b = plan.checkpoints
    assert (a.exclusive_bytes, b.exclusive_bytes) == (0, 2 * SMALL)
    assert (a.components[0].shared_bytes, b.components[0].shared_bytes) == (3 * SMALL, 3 * SMALL)


def test_pairs_come_biggest_first() -> None:
    plan = make_plan(
        {
            "a": tensors(("", BIG, 1), ("", 2 * BIG, 2)),
            "b": tensors(("", BIG, 1)),
            "c": tensors(("", BIG, 1), ("", 2 * BIG, 2)),
        }
    )
    assert [(pair.checkpoints, pair.shared_bytes) for pair in plan.pairs] == [
        (("a", "c"), 3 * BIG),
        (("a", "b"), BIG),
        (("b", "c"), BIG),
    ]


def test_the_biggest_pairs_are_listed_and_the_others_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a listed pair has in common is all there, also of contents that others share as well."""
    checkpoints = {
        "a": tensors(("x", BIG, 1), ("y", 2 * BIG, 2)),
        "b": tensors(("x", BIG, 1), ("z", 2 * BIG, 2)),
        "c": tensors(("x", BIG, 1), ("", SMALL, 3)),
        "d": tensors(("", SMALL, 3)),
    }
    whole = make_plan(checkpoints)
    monkeypatch.setattr("weightd_daemon.core.plan.MOST_PAIRS", 2)
    plan = make_plan(checkpoints)
    assert (len(whole.pairs), whole.pairs_left_out) == (4, 0)
    assert (plan.pairs, plan.pairs_left_out) == (whole.pairs[:2], 2)
    assert plan.pairs[0].parts == (SharedPart(("y", "z"), 2 * BIG), SharedPart(("x", "x"), BIG))
    assert plan.checkpoints == whole.checkpoints, "they count all partners"


@pytest.mark.parametrize("checkpoints", [{}, {"a": []}, {"a": tensors(("", 0, 1)), "b": tensors(("", 0, 1))}])
def test_nothing_is_nothing_saved(checkpoints: dict[str, list[PlannedTensor]]) -> None:
    plan = make_plan(checkpoints)
    assert (*figures(plan), plan.saved_ratio, plan.pairs) == (0, 0, 0, 0.0, ())
    assert [checkpoint.name for checkpoint in plan.checkpoints] == list(checkpoints)


def test_recurring_lengths() -> None:
    assert recurring([3, 5, 3, 0, 0, 7, 7, 7]) == {3, 7}


COMPONENTS = st.sampled_from(["", "x", "y"])
LENGTHS = st.sampled_from([0, 8, SMALL, BIG, 2 * BIG])
CONTENTS = st.lists(st.tuples(COMPONENTS, LENGTHS, st.none() | st.integers(0, 3)), max_size=12)


@given(st.lists(CONTENTS, max_size=5))
def test_the_figures_agree_with_each_other(contents: list[Contents]) -> None:
    checkpoints = {f"c{i}": tensors(*content) for i, content in enumerate(contents)}
    plan = make_plan(checkpoints)
    assert plan.total_bytes == sum(checkpoint.total_bytes for checkpoint in plan.checkpoints)
    assert plan.saved_bytes == plan.total_bytes - plan.unique_bytes >= 0
    assert plan.unique_bytes >= sum(checkpoint.exclusive_bytes for checkpoint in plan.checkpoints)
    for checkpoint in plan.checkpoints:
        assert checkpoint.total_bytes == checkpoint.exclusive_bytes + checkpoint.shared_bytes
        assert checkpoint.total_bytes == sum(part.total_bytes for part in checkpoint.components)
        assert checkpoint.tensors == sum(part.tensors for part in checkpoint.components)
        assert checkpoint.shared_bytes >= sum(part.shared_bytes for part in checkpoint.components)
        assert checkpoint.shared_with == sum(checkpoint.name in pair.checkpoints for pair in plan.pairs)
    shared = {pair.checkpoints: pair for pair in plan.pairs}
    for first, second in combinations(checkpoints, 2):
        alone = sum(make_plan({name: checkpoints[name]}).unique_bytes for name in (first, second))
        together = make_plan({name: checkpoints[name] for name in (first, second)}).unique_bytes
        pair = shared.pop((first, second), None)
        assert (pair.shared_bytes if pair else 0) == alone - together
        assert pair is None or pair.shared_bytes == sum(part.shared_bytes for part in pair.parts) > 0
    assert shared == {}


def in_any_order(plan: PlanReport) -> dict[str, Any]:
    """A plan without the order of what it was given."""
    found = asdict(plan)
    found["checkpoints"] = sorted(found["checkpoints"], key=lambda checkpoint: str(checkpoint["name"]))
    for pair in found["pairs"]:
        sides = [list(zip(pair["checkpoints"], part["components"], strict=True)) for part in pair["parts"]]
        sizes = [part["shared_bytes"] for part in pair["parts"]]
        pair["parts"] = sorted(zip(map(sorted, sides), sizes, strict=True))
        pair["checkpoints"] = sorted(pair["checkpoints"])
    found["pairs"] = sorted(found["pairs"], key=lambda pair: list(pair["checkpoints"]))
    return found


@given(st.lists(CONTENTS, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_the_order_does_not_matter(contents: list[Contents], random: Any) -> None:
    checkpoints = {f"c{i}": tensors(*content) for i, content in enumerate(contents)}
    items = [(name, random.sample(group, len(group))) for name, group in checkpoints.items()]
    random.shuffle(items)
    assert in_any_order(make_plan(dict(items))) == in_any_order(make_plan(checkpoints))
