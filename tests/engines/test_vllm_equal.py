"""vLLM on the CPU: each architecture on weightd's memory, equal to vLLM's own load, and how much of it is shared.

A model is compared name by name, bit by bit, after its weights are loaded and after its layers have post-processed
them. oneDNN is off: with it vLLM's CPU backend packs linear weights anew, and shares none of them. Shares are those of
tiny models with random weights; in larger ones norms weigh less.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.daemon import Daemon, eventually
from support.engine_models import ARCHITECTURES, CHANGED, FINE_TUNE, SMOLLM2
from support.engines import EngineProcess
from weightd.binding import NOT_ADJACENT

INITIALISED = "made with values before it was loaded"
PADDED = "written by aten::fill_.Scalar"
RANDOM = "written by aten::normal_"
TURNED = "sliced, transposed or expanded while it is loaded: its bytes are no run of stored ones"
COMPUTED = "made by the engine while it loads"
MADE_ANEW = "made anew by the engine after it was loaded"


class Expected(NamedTuple):
    """Least shares of a model's bytes, after its weights are loaded and after post-processing, and what is private.

    `private` are patterns of names and reasons after the load, `replaced` those that post-processing adds. Norms, which
    vLLM initialises, are private in every model, and not listed.
    """

    loaded: float
    processed: float
    private: dict[str, str] = {}  # noqa: RUF012  # never written to
    replaced: tuple[str, ...] = ()


_PACKED = (r"\.routed_experts\.w13_weight", r"\.routed_experts\.w2_weight")
"""vLLM's CPU backend packs experts anew, as no GPU does."""

EXPECTED = {
    "llama": Expected(0.999, 0.999),
    "llama-1003": Expected(0.69, 0.69, {r"(embed_tokens|lm_head)\.weight": PADDED}),
    "qwen2": Expected(0.999, 0.999),
    "qwen3": Expected(0.999, 0.999),
    "phi3": Expected(0.999, 0.999),
    "gemma2": Expected(0.998, 0.998),
    "gemma3": Expected(0.998, 0.998),
    "mixtral": Expected(0.999, 0.22, replaced=_PACKED),
    "qwen2-moe": Expected(0.999, 0.45, replaced=_PACKED),
    "qwen3-moe": Expected(0.999, 0.22, replaced=_PACKED),
    "olmoe": Expected(0.999, 0.36, replaced=_PACKED),
    "deepseek-v2": Expected(0.999, 0.64, replaced=_PACKED),
    "deepseek-v3": Expected(0.999, 0.64, replaced=_PACKED),
    "gpt-oss": Expected(0.36, 0.36, {r"\.routed_experts\.w(13|2)_weight": COMPUTED}),
    "gpt2": Expected(
        0.002, 0.002, {r"wte\.weight": PADDED, r"wpe\.weight": RANDOM, r"(c_attn|c_proj|c_fc)\.weight": TURNED}
    ),
    "opt": Expected(0.90, 0.90, {r"embed_positions\.weight": RANDOM}),
    "olmo2": Expected(0.998, 0.998),  # like the next, through vLLM's backend for models of transformers
    "starcoder2": Expected(0.998, 0.998),
    SMOLLM2: Expected(0.999, 0.999),
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    found = Daemon()
    yield found
    found.close(check=True)


@pytest.fixture(scope="module")
def process(daemon: Daemon, checkpoints: dict[str, Path], engine_folder: Path) -> Iterator[EngineProcess]:
    """A process that loads one model after the other: vLLM takes long to import."""
    found = EngineProcess(daemon.socket, engine_folder)
    try:
        found.run("from support import vllm_loads; vllm_loads.start(model)", model=str(checkpoints["mixtral"]))
        yield found
    finally:
        found.close()


@pytest.fixture
def compare(
    daemon: Daemon, process: EngineProcess, checkpoints: dict[str, Path]
) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Load a checkpoint both ways, see `support.vllm_loads.compare`; the daemon is empty again at the end of the test.

    An equal tensor of another checkpoint would be stored once, and not beside those that it is fused with.
    """

    def run(name: str) -> dict[str, Any]:
        found: dict[str, Any] = process.run("result = vllm_loads.compare(path)", path=str(checkpoints[name]))
        return found

    yield run
    with daemon.connect() as client:
        eventually(lambda: not client.leases(), what="a model that is gone is attached still")
        for checkpoint in client.checkpoints():
            client.remove(checkpoint.content_digest)


def share(found: list[Any]) -> float:
    return float(found[1] / found[0])


def unexplained(private: dict[str, list[Any]], allowed: dict[str, str]) -> dict[str, list[Any]]:
    """What is private without being allowed to, for its reason."""
    return {
        name: [size, reason]
        for name, (size, reason) in private.items()
        if reason != INITIALISED
        and not any(re.search(pattern, name) and reason == why for pattern, why in allowed.items())
    }


def test_every_architecture_is_expected() -> None:
    assert EXPECTED.keys() == {*ARCHITECTURES, SMOLLM2}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_architecture_is_equal_and_shared(
    name: str, compare: Callable[[str], dict[str, Any]], record_property: Callable[[str, object], None]
) -> None:
    found = compare(name)
    assert found["unequal"] == []
    assert found["tensors"] > 40, "parameters and buffers, twice"
    expected = EXPECTED[name]
    for stage in ("loaded", "processed"):
        permille = int(share(found[stage]) * 1000)  # never 100 % where a byte is private
        record_property(f"{name}, {stage}, oneDNN off", f"{permille / 10} % of {found[stage][0]} bytes shared")
        assert share(found[stage]) >= getattr(expected, stage), stage
    assert unexplained(found["loaded"][2], expected.private) == {}
    assert unexplained(found["processed"][2], expected.private | dict.fromkeys(expected.replaced, MADE_ANEW)) == {}
    assert found["without_memory"] == []
    assert found["written"] == 0, "bytes of the segments that this process has a copy of"
    assert found["swept"] == 0, "a look at all objects of Python takes longer than the rest of a binding"


@pytest.mark.parametrize(
    ("name", "parameter", "holder"),
    [
        ("deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias", "CPURouter.e_score_correction_bias"),
        ("gpt-oss", "model.layers.0.attn.sinks", "CPUAttentionBackendImpl.sinks"),
    ],
)
def test_objects_that_are_no_modules_hold_the_loaded_parameter(
    name: str, parameter: str, holder: str, compare: Callable[[str], dict[str, Any]]
) -> None:
    """A parameter that is registered anew leaves them the old one, which has no memory."""
    found = compare(name)
    assert found["captured"][parameter] == [holder]
    assert found["without_memory"] == []


def test_a_fine_tune_of_equal_names_and_sizes_is_never_taken_for_its_base(
    daemon: Daemon, checkpoints: dict[str, Path], compare: Callable[[str], dict[str, Any]]
) -> None:
    """Also while the base is resident, with which it shares what is equal."""
    with daemon.connect() as client:
        base = client.load(checkpoints[SMOLLM2])
        before = client.stats().resident_bytes
        found = compare(FINE_TUNE)
        assert found["unequal"] == []
        private = {name: why for name, (_, why) in found["loaded"][2].items() if why != INITIALISED}
        assert private == {"model.layers.5.self_attn.qkv_proj.weight": NOT_ADJACENT}, "its q is not beside the base's k"
        assert share(found["loaded"]) >= 0.99
        with client.attach(checkpoints[FINE_TUNE]) as attachment:
            assert attachment.content_digest != base.content_digest
            changed = sum(attachment.tensors[key].length for key in attachment.tensors if key.name in CHANGED)
        assert changed <= client.stats().resident_bytes - before <= 1.05 * changed, "the rest is stored once"
