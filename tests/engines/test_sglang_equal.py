"""SGLang on the CPU: each architecture on weightd's memory, equal to SGLang's own load, and what it refuses.

A model is compared name by name, bit by bit, with the logits of prompts, after it has computed. SGLang's CPU backend
without AMX packs no weights, so shares are those of its GPU backends; kernels are torch's (tests/engines/stand_ins).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.daemon import Daemon, eventually
from support.engine_models import SMOLLM2
from support.engines import EngineProcess, sglang_environment

INITIALISED = "made with values before it was loaded"
PADDED = "written by aten::fill_.Scalar"
RANDOM = "written by aten::uniform_"


class Expected(NamedTuple):
    """Least share of a model's bytes, and what is private beside norms and biases, by patterns of names, and why.

    `computes` is false for a model that SGLang has no kernel for on a CPU.
    """

    share: float
    private: dict[str, str] = {}  # noqa: RUF012  # never written to
    computes: bool = True


EXPECTED = {
    "llama": Expected(0.999),
    "llama-1003": Expected(0.69, {r"(embed_tokens|lm_head)\.weight": PADDED}),
    "qwen2": Expected(0.998),
    "qwen3": Expected(0.999),
    "phi3": Expected(0.999),
    "mixtral": Expected(0.999),
    "qwen2-moe": Expected(0.999, {r"shared_expert_gate\.weight": RANDOM}, computes=False),
    "qwen3-moe": Expected(0.999),
    "olmo2": Expected(0.998),
    SMOLLM2: Expected(0.9997),
}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    found = Daemon()
    yield found
    found.close(check=True)


@pytest.fixture(scope="module")
def process(daemon: Daemon, engine_folder: Path) -> Iterator[EngineProcess]:
    """A process that loads one model after the other: SGLang takes long to import."""
    found = EngineProcess(daemon.socket, engine_folder, sglang_environment(engine_folder))
    try:
        found.run("import gc; from support import sglang_loads")
        yield found
    finally:
        found.close()


@pytest.fixture(autouse=True)
def _afterwards(daemon: Daemon, process: EngineProcess) -> Iterator[None]:
    """The daemon is empty after each test: an equal tensor of another checkpoint would lie elsewhere."""
    yield
    process.run("runner = found = None; gc.collect()")
    with daemon.connect() as client:
        eventually(lambda: not client.leases(), what="a model that is gone is attached still")
        for checkpoint in client.checkpoints():
            client.remove(checkpoint.content_digest)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_architecture_is_equal_and_shared(
    name: str,
    process: EngineProcess,
    checkpoints: dict[str, Path],
    record_property: Callable[[str, object], None],
) -> None:
    expected = EXPECTED[name]
    found = process.run(
        "result = sglang_loads.compare(path, computing)", path=str(checkpoints[name]), computing=expected.computes
    )
    assert found["unequal"] == []
    assert found["compared"] >= 17
    assert found["tokens"]
    assert found["logits"]
    share = found["shared"] / found["total"]
    record_property(name, f"{share:.2%} of {found['total']} bytes shared")
    assert share >= expected.share
    unexplained = [
        (parameter, why)
        for parameter, _, why in found["private"]
        if why != INITIALISED
        and not any(re.search(pattern, parameter) and why == reason for pattern, reason in expected.private.items())
    ]
    assert unexplained == []
    assert found["preloaded"] == 0, "it was this load that brought the bytes"


def test_what_was_resident_is_no_memory_that_the_load_has_taken(
    daemon: Daemon, process: EngineProcess, checkpoints: dict[str, Path]
) -> None:
    """SGLang sizes its cache by what is free before and after it loads: what others hold already is not in that."""
    with daemon.connect() as client:
        client.load(checkpoints["llama"])
    found = process.run(
        "runner = sglang_loads.load(path, **sglang_loads.WEIGHTD); result = runner.loader.preloaded_weights_bytes",
        path=str(checkpoints["llama"]),
    )
    assert found >= 0.99 * (checkpoints["llama"] / "model.safetensors").stat().st_size


def test_options_choose_private_parameters_and_a_least_share(
    process: EngineProcess, checkpoints: dict[str, Path]
) -> None:
    options = '{"weightd": {"private": ["*.qkv_proj.weight"], "require": 0.8}}'
    found = process.run(
        "from weightd.integrations.sglang import report\n"
        "runner = sglang_loads.load(path, model_loader_extra_config=options)\n"
        "result = [(one.name, one.reason) for one in report(runner.model).copied if one.reason != initialised]",
        path=str(checkpoints["llama"]), options=options, initialised=INITIALISED,
    )  # fmt: skip
    assert found == [
        [f"model.layers.{layer}.self_attn.qkv_proj.weight", "the option `private` names it"] for layer in range(2)
    ]
    with pytest.raises(AssertionError, match=r"LeastSharedError: require 0\.95: of LlamaForCausalLM only 8"):
        process.run(
            "sglang_loads.load(path, model_loader_extra_config=options)",
            path=str(checkpoints["llama"]), options=options.replace("0.8", "0.95"),
        )  # fmt: skip


def test_without_a_daemon_it_says_so_or_loads_by_itself(process: EngineProcess, checkpoints: dict[str, Path]) -> None:
    nowhere = '{"weightd": {"socket": "/nonexistent/w.sock"}}'
    with pytest.raises(AssertionError, match=r"DaemonUnreachableError: .*/nonexistent/w\.sock"):
        process.run(
            "sglang_loads.load(path, model_loader_extra_config=options)",
            path=str(checkpoints["llama"]), options=nowhere,
        )  # fmt: skip
    found = process.run(
        "import weightd\n"
        "runner = sglang_loads.load(path, model_loader_extra_config=options)\n"
        "try: report(runner.model)\n"
        "except weightd.InvalidReferenceError as error: result = str(error)",
        path=str(checkpoints["llama"]), options=nowhere.replace('"}', '", "fallback": "local"}'),
    )  # fmt: skip
    assert "SGLang has loaded it by itself" in found
    assert "/nonexistent/w.sock" in found


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cpu_offload_gb": 1}, r"--cpu-offload-gb \(1\) moves weights between GPU and host"),
        ({"quantization": "fp8"}, r"--quantization fp8 quantises weights while it loads them"),
        ({"load_format": "dummy"}, r"--load-format dummy: weightd has safetensors only"),
        ({"model_loader_extra_config": '{"weightd": {"nope": 1}}'}, r"has no option 'nope'; weightd knows fallback"),
        ({"model_loader_extra_config": '{"weightd": true}'}, r"must be an object with options of weightd"),
        ({"model_loader_extra_config": '{"weightd": {}, "nope": 1}'}, r"Unexpected extra config keys .*nope"),
    ],
)
def test_settings_that_cannot_go_with_shared_weights_are_refused(
    settings: dict[str, Any], sentence: str, process: EngineProcess, checkpoints: dict[str, Path], daemon: Daemon
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        process.run(
            "sglang_loads.load(path, **{**sglang_loads.WEIGHTD, **settings})",
            path=str(checkpoints["llama"]), settings=settings,
        )  # fmt: skip
    with daemon.connect() as client:
        assert client.checkpoints() == []


def test_settings_that_are_refused_are_sglangs(process: EngineProcess) -> None:
    """A setting that SGLang has renamed would be refused no longer. Values are those that SGLang has by itself."""
    found = process.run(
        "from weightd.integrations.sglang import REFUSED\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "usual = ServerArgs(model_path='none')\n"
        "result = [[name, value, getattr(usual, name)] for name, (value, _) in REFUSED.items()]"
    )
    assert [one for one in found if one[2] not in (one[1], None)] == []


def test_weights_are_not_updated_in_place(process: EngineProcess, checkpoints: dict[str, Path]) -> None:
    """Whichever way new ones come; and what is served stays as it was."""
    found = process.run(
        "import torch\n"
        "def refused(call, *arguments):\n"
        "    try: return call(*arguments)\n"
        "    except RuntimeError as error: return False, str(error)\n"
        "runner = sglang_loads.load(path, **sglang_loads.WEIGHTD)\n"
        "before = {name: one.clone() for name, one in runner.model.named_parameters()}\n"
        "new = [('model.norm.weight', torch.zeros(256, dtype=torch.bfloat16))]\n"
        "result = [\n"
        "    runner.weight_updater.update_weights_from_disk(path, 'auto'),\n"
        "    runner.weight_updater.update_weights_from_tensor(new),\n"
        "    runner.weight_updater.update_weights_from_tensor(new, 'direct'),\n"
        "    runner.weight_updater.load_weights_from_distributed(new),\n"
        "    refused(runner.model.load_weights, new),\n"
        "    refused(runner._weight_checker._reset_tensors),\n"
        "    [all(torch.equal(before[name], one) for name, one in runner.model.named_parameters()), ''],\n"
        "]",
        path=str(checkpoints["llama"]),
    )
    *refused, (unchanged, _) = found
    assert unchanged
    assert [done for done, _ in refused] == [False] * 6
    assert all("other process" in why for _, why in refused)


def test_a_method_that_is_not_known_to_leave_weights_gets_memory_of_its_own(process: EngineProcess) -> None:
    found = process.run(
        "from types import SimpleNamespace\n"
        "from sglang.srt.layers.quantization import fp8, unquant\n"
        "from weightd.integrations import sglang as integration\n"
        "def like(cls, **values):\n"
        "    one = cls.__new__(cls); one.__dict__.update(values); return one\n"
        "experts = unquant.UnquantizedFusedMoEMethod\n"
        "class Mine(unquant.UnquantizedLinearMethod): pass\n"
        "result = [integration._rewritten(one, None) for one in (\n"
        "    like(unquant.UnquantizedLinearMethod), like(unquant.UnquantizedEmbeddingMethod),\n"
        "    like(experts, use_flashinfer_trtllm_moe=False), like(experts, use_flashinfer_trtllm_moe=True),\n"
        "    like(fp8.Fp8LinearMethod), like(Mine))]"
    )
    assert found[:3] == ["", "", ""]
    assert found[3].startswith("FlashInfer's TRT-LLM kernels")
    assert found[4:] == [f"{name} is not known to leave weights as they are" for name in ("Fp8LinearMethod", "Mine")]
