"""What fits a budget, in which order, and what to remove instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from weightd_daemon.core.blob import OWN_COPY_BELOW
from weightd_daemon.core.plan import PlannedTensor, make_plan, shared_contents
from weightd_daemon.core.plan_budget import fit

if TYPE_CHECKING:
    import pytest

BIG = OWN_COPY_BELOW


def tensors(*contents: tuple[int, Any]) -> list[PlannedTensor]:
    return [PlannedTensor("", f"t{i}", length, what) for i, (length, what) in enumerate(contents)]


def planned(checkpoints: dict[str, list[PlannedTensor]], budget: int) -> Any:
    return fit(list(checkpoints), shared_contents(checkpoints), budget)


def test_next_is_what_adds_the_fewest_bytes() -> None:
    checkpoints = {
        "base": tensors((8 * BIG, "base")),
        "merged": tensors((8 * BIG, "base"), (BIG, "merged")),
        "other": tensors((4 * BIG, "other")),
        "tuned": tensors((9 * BIG, "tuned")),
    }
    found = planned(checkpoints, 20 * BIG)
    steps = [(step.name, step.added_bytes // BIG, step.total_bytes // BIG, step.fits) for step in found.order]
    assert steps == [("other", 4, 4, True), ("base", 8, 12, True), ("merged", 1, 13, True), ("tuned", 9, 22, False)]
    assert (found.budget_bytes, found.used_bytes, found.fitting) == (20 * BIG, 13 * BIG, 3)
    assert [step.remove for step in found.order] == [(), (), (), ("other",)], "the one that frees the least and enough"


def test_several_are_removed_where_one_is_not_enough() -> None:
    checkpoints = {name: tensors((size * BIG, name)) for name, size in (("a", 2), ("b", 3), ("c", 4), ("wanted", 7))}
    *_, wanted = planned(checkpoints, 9 * BIG).order
    assert wanted.remove == ("c", "b"), "the most first, then what is enough"
    *_, wanted = planned(checkpoints, 6 * BIG).order
    assert (wanted.fits, wanted.remove) == (False, ()), "nothing helps what does not fit alone"


def test_small_equal_tensors_are_counted_once_for_each_name() -> None:
    checkpoints = {"one": tensors((100, "x")), "three": tensors((100, "x"), (100, "x"), (100, "x"))}
    found = planned(checkpoints, 1000)
    assert [(step.name, step.added_bytes) for step in found.order] == [("one", 100), ("three", 200)]


def test_what_to_remove_is_said_of_the_cheapest_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightd_daemon.core.plan_budget.EXPLAINED", 1)
    checkpoints = {name: tensors((size * BIG, name)) for name, size in (("a", 2), ("b", 3), ("c", 4))}
    found = planned(checkpoints, 4 * BIG)
    assert [(step.name, step.fits, step.remove) for step in found.order] == [
        ("a", True, ()), ("b", False, ("a",)), ("c", False, ()),
    ]  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.lists(st.tuples(st.sampled_from([100, BIG, 3 * BIG]), st.integers(0, 3)), max_size=5),
    ),
    st.integers(0, 12 * BIG),
)
def test_every_figure_is_what_a_plan_of_these_says(contents: dict[str, list[tuple[int, int]]], budget: int) -> None:
    checkpoints = {name: tensors(*some) for name, some in contents.items()}
    found = planned(checkpoints, budget)
    assert sorted(step.name for step in found.order) == sorted(checkpoints)

    def unique(names: list[str]) -> int:
        return make_plan({name: checkpoints[name] for name in names}).unique_bytes

    before: list[str] = []
    for step in found.order:
        rest = [name for name in checkpoints if name not in before]
        assert step.added_bytes == min(unique([*before, name]) for name in rest) - unique(before)
        before.append(step.name)
        assert step.total_bytes == unique(before)
        assert step.fits == (step.total_bytes <= budget)
    fitting = [step.name for step in found.order if step.fits]
    assert (found.fitting, found.used_bytes) == (len(fitting), unique(fitting))
    for step in found.order[len(fitting) :]:
        if step.remove:
            assert set(step.remove) <= set(fitting)
            assert unique([name for name in fitting if name not in step.remove] + [step.name]) <= budget
        else:
            assert unique([step.name]) > budget
