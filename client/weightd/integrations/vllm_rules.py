"""Which settings of vLLM cannot go with shared weights, and which of its methods leave weights as they are loaded.

vLLM itself is not needed here: classes go by their names, and objects by what they have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from . import NAME
from .engines import EngineOptionError, class_name, refuse_settings

if TYPE_CHECKING:
    import torch

HOW: Final = f"start vLLM without --load-format {NAME}"
WHERE: Final = "--model-loader-extra-config"

_MODEL: Final = {"enable_sleep_mode": (False, "gives up the memory of weights and fills it again")}
_PARALLEL: Final = {"enable_eplb": (False, "writes experts over others while it serves")}
_UVA: Final = {"cpu_offload_gb": (0, "moves weights between GPU and host")}
_PREFETCH: Final = {"offload_group_size": (0, "moves weights between GPU and host")}
_WHOLE: Final = {"weight_transfer_config": (None, "writes new weights over those that are served")}

_LAYERS: Final = "vllm.model_executor.layers"
_UNPROCESSED: Final = {
    f"{_LAYERS}.linear.UnquantizedLinearMethod",
    f"{_LAYERS}.vocab_parallel_embedding.UnquantizedEmbeddingMethod",
}
_EXPERTS: Final = f"{_LAYERS}.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod"
_UNSHUFFLED: Final = {"TRITON", "BATCHED_TRITON", "CPU"}
"""Backends for experts that read them as they are loaded, or make new tensors of them, by their names in vLLM."""
_FP8: Final = f"{_LAYERS}.quantization.fp8.Fp8LinearMethod"
_COMPRESSED: Final = f"{_LAYERS}.quantization.compressed_tensors.compressed_tensors.CompressedTensorsLinearMethod"
_BLOCK_KERNELS: Final = {
    "CutlassFp8BlockScaledMMKernel", "DeepGemmFp8BlockScaledMMKernel", "TritonFp8BlockScaledMMKernel",
}  # fmt: skip
_INT8_KERNELS: Final = {"CutlassInt8ScaledMMLinearKernel", "TritonInt8ScaledMMLinearKernel"}
_FP8_KERNELS: Final = {"ChannelWiseTorchFP8ScaledMMLinearKernel", "CutlassFP8ScaledMMLinearKernel"}
_QUANTISED: Final = "weight"
"""The parameter of a quantised layer that kernels take as it is. Its scales, which are small, they re-arrange."""


def refuse_configuration(config: Any) -> None:
    """Refuse what vLLM's configuration says about writing to weights, or moving them. Errors: EngineOptionError."""
    refuse_settings(config.model_config, _MODEL, HOW)
    refuse_settings(config.parallel_config, _PARALLEL, HOW)
    refuse_settings(config.offload_config.uva, _UVA, HOW)
    refuse_settings(config.offload_config.prefetch, _PREFETCH, HOW)
    refuse_settings(config, _WHOLE, HOW)
    if config.model_config.quantization == "torchao":
        raise EngineOptionError(f"--quantization torchao makes tensors of its own of what it reads: {HOW}")


def refuse_online_quantisation(model: torch.nn.Module) -> None:
    """Refuse a model that is quantised while it is loaded: nothing of it would be stored. Errors: EngineOptionError."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "uses_meta_device", False):
            raise EngineOptionError(
                f"{name} would be quantised while it is loaded ({type(method).__name__}), which leaves nothing to "
                f"share: use a checkpoint that is quantised already, or {HOW}"
            )


def private_reason(name: str, module: torch.nn.Module) -> str:
    """Why vLLM may write to a parameter of a module after it is loaded; empty where it does not.

    A module without a quantisation method is left alone, and so are parameters under the methods that are known here.
    """
    method: Any = getattr(module, "quant_method", None)
    if method is None:
        return ""
    known = class_name(method)
    if known in _UNPROCESSED:
        return ""
    if known == _EXPERTS:
        backend = getattr(method.unquantized_backend, "name", "")
        return "" if backend in _UNSHUFFLED else f"kernels of {backend} shuffle experts; --moe-backend triton does not"
    if name.rpartition(".")[2] == _QUANTISED and _takes_weight(known, method, module):
        return ""
    return f"{type(method).__name__} is not known to leave it as it is loaded"


def _takes_weight(known: str, method: Any, module: Any) -> bool:
    """Whether a quantised layer uses its weight as it is stored, or a view of it."""
    if known == _FP8:
        return bool(method.block_quant) and not method.use_marlin and _takes_blocks(method.fp8_linear)
    scheme: Any = getattr(module, "scheme", None) if known == _COMPRESSED else None
    if type(scheme).__name__ == "CompressedTensorsW8A8Int8":
        return type(scheme.kernel).__name__ in _INT8_KERNELS
    if type(scheme).__name__ == "CompressedTensorsW8A8Fp8":
        strategy, kernel = getattr(scheme.strategy, "name", ""), scheme.fp8_linear
        return (strategy == "CHANNEL" and type(kernel).__name__ in _FP8_KERNELS) or (
            strategy == "BLOCK" and _takes_blocks(kernel)
        )
    return False


def _takes_blocks(kernel: Any) -> bool:
    """DeepGEMM quantises weights anew, in place, where scales are powers of two."""
    return type(kernel).__name__ in _BLOCK_KERNELS and not getattr(kernel, "use_deep_gemm_e8m0", False)
