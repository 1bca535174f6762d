"""What belongs together, by name: complete groups of one dtype that fit, in the order in which frameworks fuse them."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightd.layouts import Group, adjacent, groups, renamed


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
    assert gate_up[1:] == ("model.layers.0.mlp.experts.gate_up_proj", gate_up.members, (12, 512, 128), True, True)
    assert down[1:] == ("model.layers.0.mlp.experts.down_proj", down.members, (12, 128, 256), True, True)
    assert renamed(tensors[0].name) == "model.layers.0.mlp.gate.weight"


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
    assert [name for name, group in found.items() if not group.parameter] == [
        "mlp.shared_expert.gate_up_proj.weight", "self_attn.qkv_proj.bias", "self_attn.qkv_proj.weight",
    ]  # fmt: skip
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
        assert renamed(name) == name


def test_adjacent() -> None:
    assert adjacent([(1, 256, 256), (1, 512, 300)])
    assert not adjacent([(1, 256, 256), (1, 768, 256)])
    assert not adjacent([(1, 256, 256), (2, 512, 256)])
    assert not adjacent([(1, 512, 256), (1, 256, 256)])
    assert not adjacent([(1, 0, 256), None])
