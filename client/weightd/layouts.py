"""Which tensors of a checkpoint frameworks fuse into one, by the names that architectures give them.

A loader places the tensors of a group one behind the other, so that the fused tensor is a view of memory that is there
already. Pure: the daemon's core uses it too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol

from .types import ALIGNMENT, DTYPE_BITS

Layout = Literal["stored", "transformers"]
"""How a state dict names and shapes tensors: as its files do, or as models of transformers 5 do once loaded."""


class Named(Protocol):
    """What there is to know of a tensor; `length` is bytes."""

    @property
    def component(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def length(self) -> int: ...


class Group(NamedTuple):
    """Tensors that are fused, in their order: `members` are indices of those that were asked about.

    All have one dtype and fit together: the fused tensor of that shape has exactly their bytes. `parameter` says
    whether models of transformers 5 have a parameter of that name and shape; other frameworks fuse the rest.
    """

    component: str
    name: str
    members: tuple[int, ...]
    shape: tuple[int, ...]
    parameter: bool
    seamless: bool
    """Whether they can lie one behind the other: each but the last fills whole steps of ALIGNMENT."""


class _Fusion(NamedTuple):
    """A row of the table: `parts` of a block are fused along dimension 0, and with `experts` those of all experts.

    `block` is what a name has before its part (before the expert's number, which comes between them): one of these, or
    anything where there is none. It gives way to `fused` for experts, which have weights only; else it stays.
    """

    block: tuple[str, ...]
    parts: tuple[str, ...]
    fused: str
    experts: bool = False


_FUSIONS = (
    # Mixtral, MiniMax, Phi-MoE
    _Fusion(("block_sparse_moe.experts",), ("w1", "w3"), "mlp.experts.gate_up_proj", experts=True),
    _Fusion(("block_sparse_moe.experts",), ("w2",), "mlp.experts.down_proj", experts=True),
    # Qwen2-MoE, Qwen3-MoE, DeepSeek, OLMoE, GLM-4-MoE and others
    _Fusion(("mlp.experts",), ("gate_proj", "up_proj"), "mlp.experts.gate_up_proj", experts=True),
    _Fusion(("mlp.experts",), ("down_proj",), "mlp.experts.down_proj", experts=True),
    # Llama and all that name their layers alike: vLLM and SGLang fuse these
    _Fusion(("self_attn",), ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    _Fusion(("mlp", "shared_expert", "shared_experts"), ("gate_proj", "up_proj"), "gate_up_proj"),
    # diffusers: fuse_qkv_projections
    _Fusion((), ("to_q", "to_k", "to_v"), "to_qkv"),
    _Fusion((), ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv"),
)
_RENAMES = ((".block_sparse_moe.", ".mlp."),)
"""What transformers 5 renames in the same checkpoints."""

_BY_PART: dict[str, list[tuple[_Fusion, int]]] = {}
for _fusion in _FUSIONS:
    for _number, _part in enumerate(_fusion.parts):
        _BY_PART.setdefault(_part, []).append((_fusion, _number))

_EXPERT_DIGITS = 6


def groups(tensors: Sequence[Named]) -> list[Group]:
    """The groups among these tensors. A tensor is in one at most; a group that lacks one, or does not fit, is none."""
    found: dict[tuple[str, str, _Fusion], dict[tuple[int, int], int]] = {}
    for index, tensor in enumerate(tensors):
        if (place := _place(tensor.name)) is not None:
            name, fusion, expert, part = place
            found.setdefault((tensor.component, name, fusion), {})[expert, part] = index
    taken = {(tensor.component, tensor.name) for tensor in tensors} if found else set()
    complete: list[Group] = []
    for (component, name, fusion), members in found.items():
        group = _fused(component, name, fusion, members, tensors)
        if group is not None and (component, name) not in taken:
            taken.add((component, name))
            complete.append(group)
    return complete


def renamed(name: str) -> str:
    """What transformers 5 calls a tensor that it does not fuse."""
    for stored, loaded in _RENAMES:
        name = name.replace(stored, loaded)
    return name


def adjacent(places: Iterable[tuple[int, int, int] | None]) -> bool:
    """Whether bytes at these (segment, offset, length) lie one behind the other; not where some have none."""
    end: tuple[int, int] | None = None
    for place in places:
        if place is None or end not in (None, place[:2]):
            return False
        end = place[0], place[1] + place[2]
    return True


def _place(name: str) -> tuple[str, _Fusion, int, int] | None:
    """The fused tensor that one of this name belongs to, by which row of the table; number of expert and part."""
    stem, _, leaf = name.rpartition(".")
    stem, _, part = stem.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    for fusion, number in _BY_PART.get(part, ()):
        if not fusion.experts:
            if not fusion.block or stem.rpartition(".")[2] in fusion.block:
                return f"{stem}.{fusion.fused}.{leaf}", fusion, 0, number
            continue
        above, _, expert = stem.rpartition(".")
        for block in fusion.block:
            if leaf == "weight" and f".{above}".endswith(f".{block}") and _is_number(expert):
                return above.removesuffix(block) + fusion.fused, fusion, int(expert), number
    return None


def _is_number(text: str) -> bool:
    """Whether `text` is a number as one writes it: 0, 7, 12, but not 07."""
    return text.isascii() and text.isdigit() and len(text) <= _EXPERT_DIGITS and (text == "0" or text[0] != "0")


def _fused(
    component: str, name: str, fusion: _Fusion, members: dict[tuple[int, int], int], tensors: Sequence[Named]
) -> Group | None:
    """The group, if none of its tensors is missing and they fit together."""
    count, parts = len(members) // len(fusion.parts), range(len(fusion.parts))
    order = [(expert, part) for expert in range(count) for part in parts]
    if len(order) != len(members) or any(key not in members for key in order):
        return None
    indices = tuple(members[key] for key in order)
    every = [tensors[index] for index in indices]
    first = every[0]
    if first.dtype not in DTYPE_BITS:  # ggml's blocks, which no framework fuses
        return None
    if not first.shape or any(
        tensor.dtype != first.dtype or len(tensor.shape) != len(first.shape) or tensor.shape[1:] != first.shape[1:]
        for tensor in every
    ):
        return None
    if fusion.experts and any(tensor.shape != first.shape for tensor in every):
        return None
    if not all(tensor.length for tensor in every):
        return None
    rows = sum(tensor.shape[0] for tensor in every)
    shape = (count, rows // count, *first.shape[1:]) if fusion.experts else (rows, *first.shape[1:])
    seamless = all(tensor.length % ALIGNMENT == 0 for tensor in every[:-1])
    return Group(component, name, indices, shape, fusion.experts, seamless)
