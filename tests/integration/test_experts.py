"""Experts of every family as transformers merges them: views of the store where the load was asked for their order."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import weightd
from support import shrunk
from support.backends import HOST
from support.daemon import Daemon
from support.shared import SharedDaemons

DOCUMENT = Path(__file__).parents[2] / "docs" / "integrations.md"
FAMILIES = (
    "mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "olmoe", "ernie4_5_moe", "qwen3_omni_moe_thinker",
    "unlimited_ocr", "deepseek_v4", "jamba", "nemotron_h", "kimi_k25", "minimax_m3_vl", "glm4v_moe", "phimoe",
)  # fmt: skip


@pytest.fixture
def here(shared_daemons: SharedDaemons) -> Iterator[Daemon]:
    with shared_daemons.on(HOST) as daemon:
        yield daemon


@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_are_views_and_all_is_equal_to_transformers_own(here: Daemon, kind: str, tmp_path: Path) -> None:
    from weightd.integrations.transformers import from_pretrained, report

    cls = shrunk.classes(kind)[0]
    model = shrunk.build(cls, kind, torch.bfloat16)
    assert model is not None
    assert shrunk.save(model, tmp_path / "m")
    with weightd.connect(here.socket) as client:
        ours = from_pretrained(tmp_path / "m", model_class=cls, client=client)
    theirs = cls.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert shrunk.differences(ours, theirs) == []
    assert shrunk.experts(ours) > 100_000
    assert [one for one in report(ours).copied if shrunk.is_expert(one.name)] == []
    assert all(parameter.is_contiguous() for parameter in ours.parameters())
    assert f"| `{kind}` | " in DOCUMENT.read_text(), "`tools/moe_table.py` writes the table"
    for name, loaded in (("ours", ours), ("theirs", theirs)):
        loaded.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert files[0] == files[1], "saved as transformers saves its own"


def test_a_name_that_only_transformers_may_rename(here: Daemon, tmp_path: Path) -> None:
    """MiniMax-M3's router bias: renamed in front of transformers' own conversion, it stayed at its initial zeros."""
    import transformers

    from weightd.integrations.transformers import from_pretrained

    cls = transformers.MiniMaxM3VLModel
    model = shrunk.build(cls, "minimax_m3_vl", torch.float32)
    assert model is not None
    model.save_pretrained(tmp_path)
    with weightd.connect(here.socket) as client:
        ours = from_pretrained(tmp_path, model_class=cls, client=client)
    biases = [tensor for name, tensor in ours.state_dict().items() if name.endswith("e_score_correction_bias")]
    assert biases
    assert all(bias.all() for bias in biases)
    assert shrunk.differences(ours, cls.from_pretrained(tmp_path)) == []


def test_what_is_resident_in_another_order_is_copied_and_says_what_to_do(here: Daemon, tmp_path: Path) -> None:
    from weightd.integrations.transformers import from_pretrained, report

    model = shrunk.build(shrunk.classes("mixtral")[0], "mixtral", torch.float32)
    assert model is not None
    model.save_pretrained(tmp_path)
    turned = [f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in (1, 0)]
    with weightd.connect(here.socket) as client:
        digest = client.load(tmp_path, groups=[turned]).content_digest[:19]
        copied = report(from_pretrained(tmp_path, client=client)).copied
        assert [one.name for one in copied] == ["model.layers.0.mlp.experts.gate_up_proj"]
        assert "the 8 stored tensors that it is made of lie in" in copied[0].reason
        assert f"`weightd rm {digest}` and load it again through this integration" in copied[0].reason
    gc.collect()
    with weightd.connect(here.socket) as client:
        client.remove(str(tmp_path))
        assert report(from_pretrained(tmp_path, client=client)).copied == ()


def test_a_rank_that_only_a_header_can_have_makes_no_group() -> None:
    """It would be asked about with 2 elements in each dimension."""
    from weightd._groups import StoredTensor
    from weightd.integrations.conversion import groups_of

    cls = shrunk.classes("mixtral")[0]
    model = shrunk.build(cls, "mixtral", torch.bfloat16)
    assert model is not None
    names = [
        f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
        for expert in range(model.config.num_local_experts)
        for part in ("w1", "w2", "w3")
    ]

    def groups(rank: int) -> int:
        return len(groups_of(cls, model.config, [StoredTensor("", name, "BF16", (1,) * rank, 2) for name in names]))

    assert groups(2) == 2
    assert [groups(rank) for rank in (9, 60, 1000)] == [0, 0, 0]
