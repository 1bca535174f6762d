"""What vLLM may do with weights that are shared: settings that are refused, and methods that leave weights alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightd.integrations.engines import EngineOptionError
from weightd.integrations.versions import ALLOW_UNTESTED, UntestedVersionError, require_tested
from weightd.integrations.vllm_rules import private_reason, refuse_configuration, refuse_online_quantisation

LAYERS = "vllm.model_executor.layers"


def configuration(**changed: Any) -> Any:
    """A configuration of vLLM's that can be, but for what is changed, by names with two underscores for a dot."""
    found = SimpleNamespace(
        model_config=SimpleNamespace(enable_sleep_mode=False, quantization=None),
        parallel_config=SimpleNamespace(enable_eplb=False),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
        weight_transfer_config=None,
    )
    for place, value in changed.items():
        holder: Any = found
        *way, last = place.split("__")
        for name in way:
            holder = getattr(holder, name)
        setattr(holder, last, value)
    return found


def named(full_name: str, **attributes: Any) -> Any:
    """An object whose class has this name."""
    module, _, name = full_name.rpartition(".")
    return type(name, (), {"__module__": module, **attributes})()


def layer(method: object, **attributes: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    module.quant_method = method  # type: ignore[assignment]  # as vLLM does
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_usual_settings_pass() -> None:
    refuse_configuration(configuration())
    refuse_configuration(configuration(model_config__quantization="fp8"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_config__enable_sleep_mode": True}, "--enable-sleep-mode"),
        ({"parallel_config__enable_eplb": True}, "--enable-eplb"),
        ({"offload_config__uva__cpu_offload_gb": 4.0}, "--cpu-offload-gb"),
        ({"offload_config__prefetch__offload_group_size": 2}, "--offload-group-size"),
        ({"weight_transfer_config": object()}, "--weight-transfer-config"),
        ({"model_config__quantization": "torchao"}, "--quantization torchao"),
    ],
)
def test_a_setting_that_writes_to_weights_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineOptionError, match=words) as refused:
        refuse_configuration(configuration(**changed))
    assert "start vLLM without --load-format weightd" in str(refused.value)


@pytest.mark.parametrize("version", ["0.28.0", "0.30.1", "0.31.0+cpu", "0.32.0"])
def test_versions_that_were_run_pass(version: str) -> None:
    assert require_tested("vllm", version) == (0, int(version.split(".")[1]))


@pytest.mark.parametrize("version", ["0.27.1", "0.33.0", "1.0.0"])
def test_other_versions_are_refused_in_words(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    with pytest.raises(UntestedVersionError, match=rf"vllm {version} is not known .* was run with 0\.28 to 0\.32"):
        require_tested("vllm", version)


def test_quantisation_while_loading_is_refused_by_the_layer_that_has_it() -> None:
    model = torch.nn.Module()
    model.plain = layer(named(f"{LAYERS}.linear.UnquantizedLinearMethod"))
    refuse_online_quantisation(model)
    model.proj = layer(named(f"{LAYERS}.x.OnlineMethod", uses_meta_device=True))
    with pytest.raises(EngineOptionError, match=r"^proj would be quantised while it is loaded \(OnlineMethod\)"):
        refuse_online_quantisation(model)


@pytest.mark.parametrize(
    "method",
    [
        None,
        named(f"{LAYERS}.linear.UnquantizedLinearMethod"),
        named(f"{LAYERS}.vocab_parallel_embedding.UnquantizedEmbeddingMethod"),
        *(
            named(
                f"{LAYERS}.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod",
                unquantized_backend=SimpleNamespace(name=backend),
            )
            for backend in ("TRITON", "CPU")
        ),
    ],
)
def test_what_is_used_as_it_is_loaded_may_be_shared(method: object) -> None:
    assert private_reason("layer.weight", layer(method)) == ""


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (named(f"{LAYERS}.quantization.auto_awq.AWQMarlinLinearMethod"), "AWQMarlinLinearMethod is not known"),
        (named("somewhere.UnquantizedLinearMethod"), "UnquantizedLinearMethod is not known"),
        (
            named(
                f"{LAYERS}.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod",
                unquantized_backend=SimpleNamespace(name="FLASHINFER_TRTLLM"),
            ),
            "kernels of FLASHINFER_TRTLLM shuffle experts; --moe-backend triton does not",
        ),
    ],
)
def test_other_methods_get_private_weights(method: object, words: str) -> None:
    assert words in private_reason("layer.weight", layer(method))


def fp8(kernel: str, *, block: bool = True, marlin: bool = False, e8m0: bool = False) -> Any:
    return named(
        f"{LAYERS}.quantization.fp8.Fp8LinearMethod",
        block_quant=block, use_marlin=marlin, fp8_linear=named(f"k.{kernel}", use_deep_gemm_e8m0=e8m0),
    )  # fmt: skip


DEEP_GEMM = "DeepGemmFp8BlockScaledMMKernel"


@pytest.mark.parametrize(
    ("method", "shared"),
    [
        (fp8(DEEP_GEMM), True),
        (fp8("CutlassFp8BlockScaledMMKernel"), True),
        (fp8(DEEP_GEMM, e8m0=True), False),
        (fp8(DEEP_GEMM, block=False), False),
        (fp8(DEEP_GEMM, marlin=True), False),
        (fp8("CPUFp8BlockScaledMMKernel"), False),
    ],
)
def test_blocks_of_fp8_are_shared_where_the_kernel_takes_them(method: object, shared: bool) -> None:
    assert (private_reason("layer.weight", layer(method)) == "") is shared
    assert private_reason("layer.weight_scale_inv", layer(method)), "scales are re-arranged"


COMPRESSED = f"{LAYERS}.quantization.compressed_tensors.compressed_tensors.CompressedTensorsLinearMethod"


@pytest.mark.parametrize(
    ("scheme", "shared"),
    [
        (named("s.CompressedTensorsW8A8Int8", kernel=named("k.CutlassInt8ScaledMMLinearKernel")), True),
        (named("s.CompressedTensorsW8A8Int8", kernel=named("k.CPUInt8ScaledMMLinearKernel")), False),
        (
            named(
                "s.CompressedTensorsW8A8Fp8",
                strategy=SimpleNamespace(name="CHANNEL"), fp8_linear=named("k.CutlassFP8ScaledMMLinearKernel"),
            ),
            True,
        ),
        (
            named(
                "s.CompressedTensorsW8A8Fp8",
                strategy=SimpleNamespace(name="TENSOR"), fp8_linear=named("k.CutlassFP8ScaledMMLinearKernel"),
            ),
            False,
        ),
        (named("s.CompressedTensorsWNA16"), False),
    ],
)  # fmt: skip
def test_w8a8_weights_are_shared_where_the_kernel_takes_them(scheme: object, shared: bool) -> None:
    assert (private_reason("layer.weight", layer(named(COMPRESSED), scheme=scheme)) == "") is shared
