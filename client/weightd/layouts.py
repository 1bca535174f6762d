"""The groups of tensors that frameworks fuse into one, found by the names that architectures give them.

A loader places the tensors of a group one behind the other, so that the fused tensor is a view of memory that is there
already. These rows are the default of a load; who knows better says so with the load. Pure: the daemon's core uses it
too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from .types import ALIGNMENT, DTYPE_BITS

MAX_GROUP_BYTES = 2 << 30
"""The most that a load is asked to keep in one piece; a group of the table may be longer."""

MAX_GROUP_TENSORS = 4096
"""The most tensors that a load is asked to keep in one piece."""

_NOTES = 8
"""Groups that were asked for and are none: how many a load gives the reason for."""


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

    All have one dtype and fit together: the fused tensor of that shape has exactly their bytes.
    """

    component: str
    name: str
    members: tuple[int, ...]
    shape: tuple[int, ...]
    seamless: bool
    """Whether they can lie one behind the other: each but the last fills whole steps of ALIGNMENT."""


class Arrangement(NamedTuple):
    """What a load is to keep in one piece: numbers of tensors, in their order.

    `asked` counts those that were asked for; `ignored` says of some others why they are none.
    """

    groups: tuple[tuple[int, ...], ...]
    asked: int
    ignored: tuple[str, ...]


class _Fusion(NamedTuple):
    """A row of the table: `parts` of a block are fused along dimension 0, and with `experts` those of all experts.

    `block` is the last name before the part, or before the expert's number, which comes between them: one of these, or
    any where there is none. The fused tensor is called `fused` in its place; that of experts, which have weights only,
    has no name after it.
    """

    block: tuple[str, ...]
    parts: tuple[str, ...]
    fused: str
    experts: bool = False


_FUSIONS = (
    # What goes first wins. Mixtral, MiniMax, Phi-MoE, DeepSeek-V4
    _Fusion(("experts",), ("w1", "w3"), "gate_up_proj", experts=True),
    _Fusion(("experts",), ("w2",), "down_proj", experts=True),
    # Qwen2-MoE, Qwen3-MoE, DeepSeek, OLMoE, GLM-4-MoE, Jamba and others
    _Fusion(("experts",), ("gate_proj", "up_proj"), "gate_up_proj", experts=True),
    _Fusion(("experts",), ("down_proj",), "down_proj", experts=True),
    # Llama and all that name their layers alike, LFM2, BERT: vLLM and SGLang fuse these
    _Fusion(("encoder_attn",), ("k_proj", "v_proj"), "kv_proj"),  # Whisper's cross attention
    _Fusion((), ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    _Fusion((), ("gate_proj", "up_proj"), "gate_up_proj"),
    _Fusion((), ("w1", "w3"), "w13"),
    _Fusion((), ("query", "key", "value"), "qkv"),
    _Fusion((), ("wq", "wk", "wv"), "wqkv"),
    # DeepSeek-V3 and what follows it; the indexer of its sparse attention
    _Fusion((), ("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    _Fusion(("indexer",), ("wk", "weights_proj"), "wk_weights_proj"),
    # Qwen3-Next, Qwen3.5
    _Fusion((), ("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    _Fusion((), ("in_proj_b", "in_proj_a"), "in_proj_ba"),
    # diffusers: fuse_qkv_projections
    _Fusion((), ("to_q", "to_k", "to_v"), "to_qkv"),
    _Fusion((), ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv"),
)

_BY_PART: dict[str, list[tuple[int, int]]] = {}
for _row, _fusion in enumerate(_FUSIONS):
    for _number, _part in enumerate(_fusion.parts):
        _BY_PART.setdefault(_part, []).append((_row, _number))

_EXPERT_DIGITS = 6


def groups(tensors: Sequence[Named]) -> list[Group]:
    """The groups among these tensors. A tensor is in one at most; a group that lacks one, or does not fit, is none."""
    found: dict[tuple[int, str, str], dict[tuple[int, int], int]] = {}
    for index, tensor in enumerate(tensors):
        for name, row, expert, part in _places(tensor.name):
            found.setdefault((row, tensor.component, name), {})[expert, part] = index
    names = {(tensor.component, tensor.name) for tensor in tensors} if found else set()
    taken: set[int] = set()
    complete: list[Group] = []
    for (row, component, name), members in sorted(found.items(), key=lambda item: item[0][0]):
        group = _fused(component, name, _FUSIONS[row], members, tensors)
        if group is not None and (component, name) not in names and taken.isdisjoint(group.members):
            names.add((component, name))
            taken.update(group.members)
            complete.append(group)
    return sorted(complete, key=lambda group: min(group.members))


def arrangement(tensors: Sequence[Named], numbers: Sequence[int], asked: Iterable[Sequence[int]] = ()) -> Arrangement:
    """What a load of these tensors keeps in one piece: what it was asked for, then the table's groups of the rest.

    `numbers` are what tensors are called, in `asked` and in what is returned.
    """
    by_number = dict(zip(numbers, tensors, strict=True))
    taken: set[int] = set()
    chosen: list[tuple[int, ...]] = []
    ignored: list[str] = []
    odd = 0
    for at, group in enumerate(asked):
        why = unfit(by_number, group, taken)
        if not why:
            taken.update(group)
            chosen.append(tuple(group))
            continue
        odd += 1
        if odd <= _NOTES:
            ignored.append(f"group {at}: {why}")
    if odd > _NOTES:
        ignored.append(f"and {odd - _NOTES} more")
    every = (tuple(numbers[index] for index in group.members) for group in groups(tensors) if group.seamless)
    return Arrangement((*chosen, *(group for group in every if taken.isdisjoint(group))), len(chosen), tuple(ignored))


def unfit(tensors: Mapping[int, Named], group: Sequence[int], taken: Collection[int] = ()) -> str:
    """Why a load cannot keep these in one piece; empty where it can. `taken` are tensors that are in other groups."""
    if not 1 < len(group) <= MAX_GROUP_TENSORS:
        return f"it has {len(group)} tensors, and may have 2 to {MAX_GROUP_TENSORS}"
    if missing := [number for number in group if number not in tensors]:
        return f"the checkpoint has no tensor {missing[0]} with bytes"
    if len(set(group)) < len(group) or any(number in taken for number in group):
        return "one of its tensors is in a group already"
    every = [tensors[number] for number in group]
    if any((one.component, one.dtype) != (every[0].component, every[0].dtype) for one in every):
        return "its tensors are of several components or dtypes"
    if (length := sum(one.length for one in every)) > MAX_GROUP_BYTES:
        return f"it has {length} bytes, and may have {MAX_GROUP_BYTES}"
    if odd := [one.length for one in every[:-1] if one.length % ALIGNMENT]:
        return f"one of its tensors has {odd[0]} bytes, no multiple of {ALIGNMENT}, so nothing lies right behind it"
    return ""


def adjacent(places: Iterable[tuple[int, int, int] | None]) -> bool:
    """Whether bytes at these (segment, offset, length) lie one behind the other; not where some have none."""
    end: tuple[int, int] | None = None
    for place in places:
        if place is None or end not in (None, place[:2]):
            return False
        end = place[0], place[1] + place[2]
    return True


def _places(name: str) -> Iterable[tuple[str, int, int, int]]:
    """The fused tensors that one of this name may belong to: name, row of the table, number of expert and part."""
    stem, _, leaf = name.rpartition(".")
    stem, _, part = stem.rpartition(".")
    if part not in _BY_PART or leaf not in ("weight", "bias"):
        return
    above, _, last = stem.rpartition(".")
    block = above.rpartition(".")[2]
    of_an_expert = block == "experts" and last.isdigit()
    for row, number in _BY_PART[part]:
        fusion = _FUSIONS[row]
        if fusion.experts:
            if leaf == "weight" and block in fusion.block and _is_number(last):
                yield f"{above}.{fusion.fused}", row, int(last), number
        elif not of_an_expert and (not fusion.block or last in fusion.block):
            yield f"{stem}.{fusion.fused}.{leaf}", row, 0, number


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
    return Group(component, name, indices, shape, seamless)
