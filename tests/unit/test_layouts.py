"""What belongs together, by name: complete groups of one dtype that fit, in the order in which frameworks fuse them."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightd.layouts import MAX_GROUP_TENSORS, Group, adjacent, arrangement, groups


class Tensor(NamedTuple):
    component: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


def tensor(name: str, *shape: int, dtype: str = "BF16", component: str = "") -> Tensor:
    return Tensor(component, name, dtype, shape, prod(shape) * {"BF16": 2, "F32": 4}[dtype])


def mixtral(experts: int = 3, block: str = "model.layers.0.block_sparse_moe") -> list[Tensor]:
    """The tensors of one block, in the order of a file."""
    every = [tensor(f"{block}.gate.weight", experts, 128)]
    for expert in sorted(map(str, range(experts))):
        every += [
            tensor(f"{block}.experts.{expert}.{part}.weight", *shape)
            for part, shape in (("w1", (256, 128)), ("w2", (128, 256)), ("w3", (256, 128)))
        ]
    return every


def qwen(layer: int = 0) -> list[Tensor]:
    """The tensors of a layer with two experts and grouped attention with biases."""
    block = f"model.layers.{layer}"
    every = [tensor(f"{block}.input_layernorm.weight", 128)]
    for mlp in ("mlp.experts.0", "mlp.experts.1", "mlp.shared_expert"):
        every += [tensor(f"{block}.{mlp}.{part}_proj.weight", 256, 128) for part in ("gate", "up")]
        every += [tensor(f"{block}.{mlp}.down_proj.weight", 128, 256)]
    for part, rows in (("k", 64), ("q", 128), ("v", 64)):
        every += [tensor(f"{block}.self_attn.{part}_proj.{leaf}", *s) for leaf, s in
                  (("bias", (rows,)), ("weight", (rows, 128)))]  # fmt: skip
    return every


def names(group: Group, tensors: list[Tensor]) -> list[str]:
    return [tensors[index].name for index in group.members]


def test_mixtral() -> None:
    tensors = mixtral(12)
    gate_up, down = groups(tensors)
    block = "model.layers.0.block_sparse_moe.experts"
    assert names(gate_up, tensors) == [f"{block}.{e}.{part}.weight" for e in range(12) for part in ("w1", "w3")]
    assert names(down, tensors) == [f"{block}.{e}.w2.weight" for e in range(12)]
    assert gate_up[1:] == (f"{block}.gate_up_proj", gate_up.members, (12, 512, 128), True)
    assert down[1:] == (f"{block}.down_proj", down.members, (12, 128, 256), True)


def test_qwen_and_dense_parts() -> None:
    tensors = qwen()
    found = {group.name.removeprefix("model.layers.0."): group for group in groups(tensors)}
    assert {name: group.shape for name, group in found.items()} == {
        "mlp.experts.gate_up_proj": (2, 512, 128),
        "mlp.experts.down_proj": (2, 128, 256),
        "mlp.shared_expert.gate_up_proj.weight": (512, 128),
        "self_attn.qkv_proj.weight": (256, 128),
        "self_attn.qkv_proj.bias": (256,),
    }
    qkv = names(found["self_attn.qkv_proj.weight"], tensors)
    assert qkv == [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]


def test_diffusers_parts() -> None:
    stem = "transformer_blocks.0.attn"
    parts = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
    tensors = [tensor(f"{stem}.{part}.weight", 64, 64) for every in parts.values() for part in reversed(every)]
    found = {group.name: names(group, tensors) for group in groups(tensors)}
    assert found == {f"{stem}.{name}.weight": [f"{stem}.{p}.weight" for p in every] for name, every in parts.items()}
    cross = [tensor(f"{stem}.to_{part}.weight", 64, width) for part, width in (("q", 64), ("k", 96), ("v", 96))]
    assert groups(cross) == []


EVERY = [*mixtral(), *mixtral(2, "model.layers.1.block_sparse_moe"), *qwen(2), *qwen(3)]


@given(st.permutations(range(len(EVERY))))
def test_the_order_of_files_is_no_matter(order: list[int]) -> None:
    shuffled = [EVERY[index] for index in order]
    expected = {(g.name, tuple(names(g, EVERY)), g.shape) for g in groups(EVERY)}
    assert {(g.name, tuple(names(g, shuffled)), g.shape) for g in groups(shuffled)} == expected


@given(st.integers(0, len(EVERY) - 1))
def test_without_one_of_its_tensors_a_group_is_none(index: int) -> None:
    rest = EVERY[:index] + EVERY[index + 1 :]
    lacking = {(group.name, group.shape) for group in groups(EVERY)} - {(g.name, g.shape) for g in groups(rest)}
    assert lacking == {(group.name, group.shape) for group in groups(EVERY) if index in group.members}


def test_nobody_can_tell_that_the_last_expert_is_missing() -> None:
    first_two = [one for one in mixtral(3) if ".experts.2." not in one.name]
    assert [group.shape for group in groups(first_two)] == [(2, 512, 128), (2, 128, 256)]


@given(st.integers(0, len(EVERY) - 1), st.sampled_from(["dtype", "width", "rank"]))
def test_a_tensor_that_does_not_fit_makes_its_group_none(index: int, what: str) -> None:
    odd = EVERY[index]
    shape = {"dtype": odd.shape, "width": (*odd.shape[:1], 7, *odd.shape[2:]), "rank": (1, *odd.shape)}[what]
    other = tensor(odd.name, *shape, dtype="F32" if what == "dtype" else "BF16")
    found = {group.name for group in groups([*EVERY[:index], other, *EVERY[index + 1 :]])}
    alone = {g.name for g in groups(EVERY) if g.members == (index,)}
    assert found - alone == {group.name for group in groups(EVERY) if index not in group.members} - alone


def test_each_tensor_is_in_one_group_and_rows_add_up() -> None:
    found = groups(EVERY)
    every = [index for group in found for index in group.members]
    assert len(every) == len(set(every))
    for group in found:
        assert prod(group.shape) == sum(prod(EVERY[index].shape) for index in group.members)


@pytest.mark.parametrize("number", ["01", "1000000", "\uff19", "-1", "x", "", "9" * 5000])
def test_what_is_no_number_of_an_expert(number: str) -> None:
    tensors = [tensor(f"m.mlp.experts.{one}.down_proj.weight", 64, 64) for one in ("0", number)]
    assert [group.members for group in groups(tensors)] == [(0,)] or groups(tensors) == []
    assert not any(1 in group.members for group in groups(tensors))


def test_a_name_that_is_taken_is_not_given_to_a_view() -> None:
    stem = "model.layers.0.self_attn"
    tensors = [tensor(f"{stem}.{part}_proj.weight", 64, 64) for part in ("q", "k", "v", "qkv")]
    assert groups(tensors) == []
    assert len(groups(tensors[:3])) == 1


def test_components_are_apart() -> None:
    parts = [("a", "q"), ("a", "k"), ("b", "v")]
    tensors = [tensor(f"self_attn.{part}_proj.weight", 64, 64, component=name) for name, part in parts]
    assert groups(tensors) == []
    tensors += [tensor("self_attn.v_proj.weight", 64, 64, component="a")]
    assert [(group.component, group.members) for group in groups(tensors)] == [("a", (0, 1, 3))]


def test_a_group_may_have_a_seam() -> None:
    """Only what is before the last needs a length of whole steps."""
    shapes = [("q", 64), ("k", 64), ("v", 1)]
    assert groups([tensor(f"self_attn.{part}_proj.weight", rows, 2) for part, rows in shapes])[0].seamless
    shapes = [("q", 64), ("k", 1), ("v", 64)]
    assert not groups([tensor(f"self_attn.{part}_proj.weight", rows, 2) for part, rows in shapes])[0].seamless


def test_blocks_of_ggml_are_in_no_group() -> None:
    blocks = [
        Tensor("", f"model.layers.0.self_attn.{part}_proj.weight", "GGML_Q4_K", (256, 256), 36864) for part in "qkv"
    ]
    assert groups([block._replace(dtype="U8") for block in blocks])
    assert not groups(blocks)


def test_empty_tensors_and_scalars_are_in_no_group() -> None:
    for shape in [(), (0, 64), (64, 0)]:
        assert groups([tensor(f"self_attn.{part}_proj.weight", *shape) for part in "qkv"]) == []


def test_other_names_are_left_alone() -> None:
    for name in ("", ".", "weight", "q_proj.weight", "t0", "model.layers.0.self_attn.q_proj.qweight", "a.mlp.x.weight"):
        assert groups([tensor(name, 64, 64)]) == []


def test_adjacent() -> None:
    assert adjacent([(1, 256, 256), (1, 512, 300)])
    assert not adjacent([(1, 256, 256), (1, 768, 256)])
    assert not adjacent([(1, 256, 256), (2, 512, 256)])
    assert not adjacent([(1, 512, 256), (1, 256, 256)])
    assert not adjacent([(1, 0, 256), None])


@pytest.mark.parametrize(
    ("block", "parts", "fused"),
    [
        ("attention", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        ("encoder_attn", ("k_proj", "v_proj"), "kv_proj"),
        ("feed_forward", ("gate_proj", "up_proj"), "gate_up_proj"),
        ("feed_forward", ("w1", "w3"), "w13"),
        ("attention.self", ("query", "key", "value"), "qkv"),
        ("attn", ("wq", "wk", "wv"), "wqkv"),
        ("self_attn", ("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
        ("self_attn.indexer", ("wk", "weights_proj"), "wk_weights_proj"),
        ("linear_attn", ("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
        ("linear_attn", ("in_proj_b", "in_proj_a"), "in_proj_ba"),
    ],
)
def test_what_engines_fuse(block: str, parts: tuple[str, ...], fused: str) -> None:
    stem = f"model.layers.0.{block}"
    tensors = [tensor(f"{stem}.{part}.weight", 64, 64) for part in (*reversed(parts), "out_proj")]
    (group,) = groups(tensors)
    assert group.name == f"{stem}.{fused}.weight"
    assert names(group, tensors) == [f"{stem}.{part}.weight" for part in parts]


@pytest.mark.parametrize("block", ["mlp", "ffn", "feed_forward", "block_sparse_moe", "mixer"])
def test_experts_of_any_block(block: str) -> None:
    every = [tensor(f"m.0.{block}.experts.{e}.{part}.weight", 64, 64) for e in range(2) for part in ("w1", "w2", "w3")]
    assert [group.members for group in groups(every)] == [(0, 2, 3, 5), (1, 4)]
    assert groups(every[:1] + every[2:3]) == groups([*every[:1], *every[2:3]])
    assert groups(every[3:]) == [], "the first expert is missing"


def test_a_part_of_two_rows_is_in_the_first_one() -> None:
    tensors = [tensor(f"decoder.layers.0.encoder_attn.{part}_proj.weight", 64, 64) for part in "qkv"]
    assert [group.members for group in groups(tensors)] == [(1, 2)]


# -- what a load is asked for ------------------------------------------------------------------------------------------


def test_what_is_asked_for_goes_before_the_table() -> None:
    tensors = [tensor(f"self_attn.{part}_proj.weight", 64, 64) for part in "qkvo"]
    numbers = [10, 11, 12, 13]
    assert arrangement(tensors, numbers) == (((10, 11, 12),), 0, ())
    assert arrangement(tensors, numbers, [[13, 11]]) == (((13, 11),), 1, ())


@pytest.mark.parametrize(
    ("group", "why"),
    [
        ([], "it has 0 tensors"),
        ([0], "it has 1 tensors"),
        (list(range(MAX_GROUP_TENSORS + 1)), "it has 4097 tensors"),
        ([0, 9999], "no tensor 9999"),
        ([0, 1, 0], "in a group already"),
        ([0, 6], "in a group already"),
        ([0, 2], "several components or dtypes"),
        ([0, 3], "several components or dtypes"),
        ([4, 0], "has 10 bytes, no multiple of 256"),
        ([5, 0, 1], "bytes, and may have 2147483648"),
    ],
)
def test_what_cannot_be_a_group_is_ignored_and_said(group: list[int], why: str) -> None:
    tensors = [
        tensor("a", 64, 64), tensor("b", 64, 64), tensor("c", 64, 64, dtype="F32"),
        tensor("d", 64, 64, component="other"), tensor("e", 5), tensor("f", 1 << 30), tensor("g", 128), tensor("h", 64),
    ]  # fmt: skip
    found = arrangement(tensors, range(len(tensors)), [[6, 7], group])
    assert found.groups == ((6, 7),)
    assert found.asked == 1
    assert len(found.ignored) == 1
    assert found.ignored[0].startswith("group 1: ")
    assert why in found.ignored[0]


def test_only_some_reasons_are_given() -> None:
    found = arrangement([tensor("a", 64)], [0], [[0]] * 20)
    assert len(found.ignored) == 9
    assert found.ignored[-1] == "and 12 more"


@given(st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=12))
def test_whatever_is_asked_for_each_tensor_is_in_one_group(asked: list[list[int]]) -> None:
    found = arrangement(EVERY, range(len(EVERY)), asked)
    every = [number for group in found.groups for number in group]
    assert len(every) == len(set(every))
    assert set(every) <= set(range(len(EVERY)))
    assert found.asked <= len(asked)
