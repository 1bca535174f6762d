"""Which checkpoints share what is remembered, what a load is given, and what people are shown."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weightd import _group_files, remembered
from weightd._group_names import counted, fused_name, layers_folded
from weightd._groups import StoredTensor
from weightd.types import TensorInfo, TensorKey

ODD = ("zeta", "alpha", "mu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "weightd" / "groups"


def info(name: str, *, offset: int = 0, rows: int = 64, dtype: str = "BF16", component: str = "") -> TensorInfo:
    return TensorInfo(component, name, dtype, (rows, 64), 0, offset, rows * 128, b"\x01" * 16, 0, 0)


def checkpoint(layers: int = 2, **options: Any) -> list[TensorInfo]:
    """Parts that lie in the order of names, a page apart."""
    names = [f"net.{layer}.{part}.weight" for layer in range(layers) for part in sorted(ODD)]
    return [info(name, offset=at * 64 * 128, **options) for at, name in enumerate(names)]


def group(layer: int) -> list[str]:
    return [f"net.{layer}.{part}.weight" for part in ODD]


def attached(tensors: list[TensorInfo], loaded: Any = None) -> Any:
    """What `remember` needs of an attachment."""
    manifest = SimpleNamespace(tensors=tensors)
    return SimpleNamespace(_manifest=manifest, content_digest=f"sha256:{'c' * 64}", loaded=loaded)


def loaded(order: str, unique: int = 1) -> Any:
    return SimpleNamespace(order=order, unique_bytes=unique)


def stored(tensors: list[TensorInfo]) -> list[StoredTensor]:
    return [StoredTensor(one.component, one.name, one.dtype, one.shape, one.length) for one in tensors]


def keys(layers: int, component: str = "") -> list[list[TensorKey]]:
    return [[TensorKey(component, name) for name in group(layer)] for layer in range(layers)]


# -- the key -----------------------------------------------------------------------------------------------------------


def test_equal_structure_is_remembered_in_whatever_order_files_have_it() -> None:
    remembered.remember(attached(checkpoint()), [group(0), group(1)])
    shuffled = stored(checkpoint())
    random.Random(0).shuffle(shuffled)
    assert remembered.groups_for(shuffled) == keys(2)


@pytest.mark.parametrize(
    "other",
    [
        checkpoint(3),
        checkpoint(rows=32),
        checkpoint(dtype="F16"),
        checkpoint(component="unet"),
        [*checkpoint(), info("net.2.alpha.weight")],
        [one._replace(name=one.name.replace("mu", "nu")) for one in checkpoint()],
        [one._replace(shape=(128, 32)) for one in checkpoint()],
        checkpoint()[:-1],
        [],
    ],
    ids=["layers", "rows", "dtype", "component", "more", "name", "shape", "less", "nothing"],
)
def test_another_structure_is_another_checkpoint(other: list[TensorInfo]) -> None:
    remembered.remember(attached(checkpoint()), [group(0), group(1)])
    assert remembered.groups_for(stored(other)) == []


def test_the_key_cannot_be_feigned_by_names_that_run_together() -> None:
    one = [info("a"), info("b")]
    for other in ([info('a","b')], [info("a\n"), info("b")], [info("a", component="b")]):
        assert remembered._structure(one) != remembered._structure(other)
    assert remembered._structure([info("\ud800")]), "json lets such names through"


def test_components_are_kept() -> None:
    tensors = checkpoint(component="unet")
    said = remembered.remember(attached(tensors), [[("unet", name) for name in group(0)]])
    assert "net.*.{zeta,alpha,mu}.weight (1 parameter, 24.0 KiB)" in said
    assert remembered.groups_for(stored(tensors)) == keys(1, "unet")


# -- what is kept, and said --------------------------------------------------------------------------------------------


def test_nothing_to_say_and_nothing_kept(cache: Path) -> None:
    tensors = checkpoint()
    in_a_row = [f"net.0.{part}.weight" for part in sorted(ODD)]
    for groups in ([], [[]], [in_a_row], [[*group(0), "missing"]]):
        assert remembered.remember(attached(tensors), groups) == ""
    blocks = [one._replace(dtype="GGML_Q4_K") for one in tensors]
    assert remembered.remember(attached(blocks), [group(0)]) == "", "loads of GGUF files take no groups"
    assert not cache.exists()
    assert not remembered.exist()


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (None, "the checkpoint was resident in another order, and nothing in memory is moved"),
        (loaded("resident"), "the checkpoint was resident in another order, and nothing in memory is moved"),
        (loaded("", unique=0), "the checkpoint was resident in another order, and nothing in memory is moved"),
        (loaded("joined"), "the checkpoint was loaded by another process, in another order"),
        (loaded(""), "this load did not know the order yet"),
        (loaded("requested"), "this load did not know the order yet"),
    ],
)
def test_a_sentence_says_why_and_what_would_help(result: Any, why: str) -> None:
    said = remembered.remember(attached(checkpoint(), result), [group(0), group(1)])
    assert said == (
        f"{why}: net.*.{{zeta,alpha,mu}}.weight (2 parameters, 48.0 KiB) would be shared after "
        "`weightd rm cccccccccccc` and a new load, for which their order is remembered, unless another checkpoint has "
        "some of their tensors"
    )


def test_what_was_asked_for_and_did_not_come_is_no_promise() -> None:
    remembered.remember(attached(checkpoint()), [group(0)])
    said = remembered.remember(attached(checkpoint(), loaded("requested")), [group(0), group(1)])
    later, again = said.split("; ")
    assert "(1 parameter, 24.0 KiB) would be shared" in later
    assert again.startswith(
        "net.*.{zeta,alpha,mu}.weight (1 parameter, 24.0 KiB) stay private although this load asked"
    )
    assert remembered.groups_for(stored(checkpoint())) == keys(2)
    for result in (None, loaded(""), loaded("joined")):
        said = remembered.remember(attached(checkpoint(), result), [group(0), group(1)])
        assert "(2 parameters, 48.0 KiB) would be shared" in said, "known, but this load did not ask for it"


def test_what_can_never_be_is_said_and_not_kept(cache: Path) -> None:
    tensors = [one._replace(shape=(1, 5), length=10) for one in checkpoint()]
    said = remembered.remember(attached(tensors), [group(0), group(1)])
    assert said == (
        "net.*.{zeta,alpha,mu}.weight (2 parameters, 60 B) cannot be shared: one of its tensors has 10 bytes, no "
        "multiple of 256, so nothing lies right behind it"
    )
    assert not cache.exists()


def test_a_group_that_is_too_long_to_be_asked_for_comes_with_the_table(cache: Path) -> None:
    names = [f"m.experts.{expert}.{part}.weight" for expert in range(2) for part in ("w1", "w3")]
    tensors = [info(name, rows=1 << 23)._replace(offset=-at << 30) for at, name in enumerate(names)]
    said = remembered.remember(attached(tensors), [names])
    assert said.startswith("the checkpoint was resident in another order, and nothing in memory is moved: m.experts.")
    assert "{0-1}.{w1,w3}.weight (1 parameter, 4.00 GiB) would be shared" in said
    (row,) = remembered.rows(tensors)
    assert (row.name, row.in_a_row, row.reason) == ("m.experts.gate_up_proj", False, "")
    assert not cache.exists()


def test_only_some_names_are_said() -> None:
    names = [f"{letter}{part}" for letter in "abcdef" for part in (2, 1)]
    tensors = [info(name, offset=at << 20) for at, name in enumerate(names)]
    said = remembered.remember(attached(tensors), [names[at : at + 2] for at in range(0, len(names), 2)])
    assert "{a2,a1}, {b2,b1}, {c2,c1} and 3 more (6 parameters, 96.0 KiB)" in said


def test_groups_that_do_not_fit_are_not_asked_for(cache: Path) -> None:
    """A file may have been damaged, or written by a version with other rules."""
    remembered.remember(attached(checkpoint()), [group(0)])
    (file,) = cache.iterdir()
    file.write_text(json.dumps({"format": 1, "groups": [[0, 0], [], [1], [3, 4], [4, 5], [2, 1]]}))
    order = [TensorKey("", name) for name in sorted(one.name for one in checkpoint())]
    assert remembered.groups_for(stored(checkpoint())) == [[order[3], order[4]], [order[2], order[1]]]


def test_an_error_of_the_cache_is_a_line_and_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(_group_files, "read", fail)
    monkeypatch.setattr(_group_files, "add", fail)
    assert remembered.groups_for(stored(checkpoint())) == []
    said = remembered.remember(attached(checkpoint()), [group(0)])
    assert said.endswith("and a new load, but their order cannot be remembered: [Errno 5] Input/output error")
    assert len(caplog.records) == 2


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_table_and_of_remembered_loads() -> None:
    qkv = [f"net.0.attn.{part}_proj.weight" for part in "qkv"]
    tensors = [*checkpoint(1), *(info(name, offset=at << 20) for at, name in enumerate(qkv, 1))]
    remembered.remember(attached(tensors), [group(0)])
    expected = [
        remembered.Row("", "net.0.attn.qkv_proj.weight", tuple(qkv), 24576, False, False, ""),
        remembered.Row("", "net.0.{zeta,alpha,mu}.weight", tuple(group(0)), 24576, False, True, ""),
    ]
    assert remembered.rows(tensors) == expected
    row = [info(name, offset=at * 64 * 128) for at, name in enumerate([*qkv, *group(0)])]
    assert [one.in_a_row for one in remembered.rows(row)] == [True, True]
    remembered.remember(attached(tensors), [qkv])
    assert [one.remembered for one in remembered.rows(tensors)] == [True, True]


def test_a_row_with_a_seam_never_is_one() -> None:
    qkv = [info(f"attn.{part}_proj.weight", offset=at << 10)._replace(shape=(1, 5), length=10) for at, part in
           enumerate("qkv")]  # fmt: skip
    (row,) = remembered.rows(qkv)
    assert (row.in_a_row, row.reason) == (False, "one of its tensors has a length that is no multiple of 256 bytes")


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["a.q.w", "a.k.w", "a.v.w"], "a.{q,k,v}.w"),
        (["q", "k"], "{q,k}"),
        ([f"e.{e}.{part}" for e in range(8) for part in ("w1", "w3")], "e.{0-7}.{w1,w3}"),
        ([f"e.{e}" for e in (3, 1, 0, 2)], "e.{3,1,0,2}"),
        ([f"e.{e}" for e in (9, 1, 5, 2, 7)], "e.{9,…,7}"),
        (["a.b", "c", "d"], "a.b and 2 more"),
        (["a"], "a"),
    ],
)
def test_fused_name(names: list[str], name: str) -> None:
    assert fused_name(names) == name


def test_names_for_people() -> None:
    assert layers_folded("h.12.mlp.{0-7}.w1") == "h.*.mlp.{0-7}.w1"
    assert counted("abc", 3) == "a, b, c"
    assert counted("abcd", 2) == "a, b and 2 more"
