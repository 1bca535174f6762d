"""Which tensors differ between checkpoints, and what could be equal as far as headers say."""

from __future__ import annotations

import json
from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from weightd.plan_report import DifferingTensors, PlanReport, SkippedPath, read_report
from weightd_daemon.core.blob import OWN_COPY_BELOW
from weightd_daemon.core.plan import PlannedTensor, make_plan, shared_contents
from weightd_daemon.core.plan_bounds import make_bounds
from weightd_daemon.core.plan_budget import fit
from weightd_daemon.core.plan_compare import compare

BIG = OWN_COPY_BELOW


def tensor(name: str, identity: object, length: int = BIG, component: str = "", dtype: str = "U8") -> PlannedTensor:
    return PlannedTensor(component, name, length, identity, dtype, (length,))


def test_tensors_that_differ_are_named_by_layers() -> None:
    base = [tensor(f"layers.{i}.q.weight", ("base", i)) for i in range(3)] + [tensor("head", 1), tensor("norm", 2, 100)]
    tuned = [tensor(f"layers.{i}.q.weight", ("tuned", i)) for i in range(3)] + [
        tensor("head", 1),
        tensor("norm", 3, 100),
    ]
    found = compare(("base", "tuned"), base, [*tuned, tensor("classifier.0.bias", 4)])
    assert (found.equal_tensors, found.differing_tensors, found.differing_bytes) == (1, 4, 3 * BIG + 100)
    assert found.differing == (DifferingTensors("layers.*.q.weight", 3, 3 * BIG), DifferingTensors("norm", 1, 100))
    assert (found.only_tensors, found.only) == ((0, 1), ((), (DifferingTensors("classifier.0.bias", 1, BIG),)))


def test_a_model_is_compared_with_a_component_of_a_pipeline() -> None:
    model = [tensor("q", 1), tensor("v", 2)]
    pipeline = [
        tensor("q", 1, component="encoder"),
        tensor("v", 3, component="encoder"),
        tensor("x", 4, component="unet"),
    ]
    found = compare(("model", "pipeline"), model, pipeline)
    assert (found.equal_tensors, found.differing_tensors, found.only_tensors) == (1, 1, (0, 1))


def test_other_names_for_equal_bytes_are_equal_tensors_and_other_shapes_are_not_compared() -> None:
    found = compare(("a", "b"), [tensor("q", 1), tensor("w", 2)], [tensor("query", 1), tensor("w", 3, 2 * BIG)])
    assert (found.equal_tensors, found.differing_tensors, found.only_tensors) == (1, 0, (1, 1))


def test_unknown_bytes_are_not_equal() -> None:
    found = compare(("a", "b"), [tensor("q", None), tensor("e", None, 0)], [tensor("q", None), tensor("e", None, 0)])
    assert (found.equal_tensors, found.differing_tensors) == (1, 1), "but empty tensors are"


def test_headers_go_by_length_alone() -> None:
    checkpoints = {
        "a": [tensor("w", None, component="encoder"), tensor("w", None, component="unet")],
        "b": [tensor("w", None, component="unet"), tensor("renamed", None, 2 * BIG)],
        "c": [tensor("other", None), tensor("name", None, 2 * BIG, dtype="F16"), tensor("own", None, 3 * BIG)],
    }
    plan, _ = make_bounds(checkpoints)
    assert (plan.at_most, plan.total_bytes, plan.unique_bytes) == (True, 11 * BIG, 7 * BIG)
    assert [(found.shared_bytes, found.exclusive_bytes) for found in plan.checkpoints] == [
        (2 * BIG, 0), (3 * BIG, 0), (3 * BIG, 3 * BIG),
    ]  # fmt: skip
    assert [(pair.checkpoints, pair.shared_bytes, pair.parts) for pair in plan.pairs] == [
        (("b", "c"), 3 * BIG, ()), (("a", "b"), BIG, ()), (("a", "c"), BIG, ()),
    ]  # fmt: skip


CONTENTS = st.dictionaries(
    st.sampled_from("abcd"),
    # Which contents a checkpoint has, each once: content and length go together.
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from("qkv")), max_size=6, unique_by=lambda pair: pair[0]),
)


@given(CONTENTS, st.integers(0, 20 * BIG))
def test_headers_never_promise_too_little(contents: dict[str, list[tuple[int, str]]], budget: int) -> None:
    checkpoints = {
        name: [tensor(f"{which}{at}", what, BIG * (1 + what % 3)) for at, (what, which) in enumerate(some)]
        for name, some in contents.items()
    }
    real, most = make_plan(checkpoints), make_bounds(checkpoints)[0]
    assert most.total_bytes == real.total_bytes
    assert most.saved_bytes >= real.saved_bytes
    for found, bound in zip(real.checkpoints, most.checkpoints, strict=True):
        assert bound.shared_bytes >= found.shared_bytes
        assert bound.shared_with >= found.shared_with
        assert all(
            part.shared_bytes >= real.shared_bytes
            for part, real in zip(bound.components, found.components, strict=True)
        )
    bounds = {pair.checkpoints: pair.shared_bytes for pair in most.pairs}
    assert all(bounds[pair.checkpoints] >= pair.shared_bytes for pair in real.pairs)
    report = PlanReport(
        **{name: getattr(real, name) for name in ("total_bytes", "unique_bytes", "saved_bytes", "saved_ratio")},
        read_bytes=7,
        checkpoints=real.checkpoints,
        pairs=real.pairs,
        differences=tuple(
            compare(pair.checkpoints, *(checkpoints[at] for at in pair.checkpoints)) for pair in real.pairs
        ),
        near_duplicates=None,
        budget=fit(list(checkpoints), shared_contents(checkpoints), budget),
        skipped=(SkippedPath("/x", "why"),),
    )
    assert read_report(json.loads(json.dumps(asdict(report)))) == report, "JSON keeps all of it"
