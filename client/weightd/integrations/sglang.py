"""SGLang serves on weightd's memory: `--model-loader-extra-config '{"weightd": {}}'`.

SGLang's own code chooses the files, builds the model and loads it; see `weightd.recording`. The value of "weightd" is
an object with the options of `EngineOptions`.
"""

from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING, Any, Final

import sglang
import torch

from weightd.errors import FormatError, SharedWeightsError

from . import NAME
from .engines import (
    NOT_REACHED,
    EngineLoad,
    EngineOptionError,
    EngineOptions,
    by_quantisation,
    class_name,
    reference_of,
    refuse_settings,
)
from .guards import refuse_while_shared
from .sharing import note_left
from .sharing import report as report
from .versions import require_tested

require_tested("sglang", sglang.__version__)

from sglang.srt.configs.load_config import LoadFormat  # noqa: E402  # only a version that was run
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.model_loader import loader as sglang_loader  # noqa: E402
from sglang.srt.model_loader.utils import get_model_architecture, set_default_torch_dtype  # noqa: E402
from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors  # noqa: E402
from sglang.srt.runtime_context import get_server_args  # noqa: E402
from sglang.srt.utils.weight_checker import WeightChecker  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

_WHERE: Final = f'--model-loader-extra-config {{"{NAME}": ...}}'
_HOW: Final = f'leave "{NAME}" out of --model-loader-extra-config'
_FORMATS: Final = (LoadFormat.AUTO, LoadFormat.SAFETENSORS, LoadFormat.MISTRAL)
_INDEXES: Final = {LoadFormat.MISTRAL: "consolidated.safetensors.index.json"}
_INDEX: Final = "model.safetensors.index.json"

REFUSED: Final = {
    "enable_memory_saver": (False, "gives up the memory of weights and fills it again"),
    "cpu_offload_gb": (0, "moves weights between GPU and host"),
    "offload_group_size": (-1, "moves weights between GPU and host"),
    "ple_offload_embedding": (False, "moves weights between GPU and host"),
    "enable_eplb": (False, "writes experts over others while it serves"),
    "enable_elastic_expert_backup": (False, "writes experts over others while it serves"),
    "dwdp_size": (1, "moves experts between GPUs while it serves"),
    "startup_weight_load_mode": ("serial", "writes weights after memory was measured"),
    "weight_cache_mode": ("off", "takes weights from SGLang's own cache"),
}
"""Settings of SGLang that weightd refuses: by name the harmless value, and what any other one does."""

_UNPROCESSED: Final = {
    f"sglang.srt.layers.quantization.unquant.{name}"
    for name in ("UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")
}
_EXPERTS: Final = "sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod"

_UPDATES: Final = (
    "weights cannot be updated in place: they lie on weightd's memory, which other processes read; start another "
    f"server with the new weights, or {_HOW}"
)


def model_loader(original: Callable[..., Any], load_config: Any, model_config: Any) -> Any:
    """What loads a model, where SGLang's settings name weightd. Errors: EngineOptionError."""
    options = EngineOptions.of(load_config.model_loader_extra_config[NAME], _WHERE)
    own_config = copy.copy(load_config)
    own_config.model_loader_extra_config = {
        name: value for name, value in load_config.model_loader_extra_config.items() if name != NAME
    }
    if load_config.load_format not in _FORMATS:
        named = getattr(load_config.load_format, "value", load_config.load_format)
        raise EngineOptionError(f"--load-format {named}: weightd has safetensors only; leave one of the two out")
    refuse_settings(get_server_args(), REFUSED, _HOW)
    own = original(own_config, model_config)
    if type(own) is not sglang_loader.DefaultModelLoader or _is_quantised_by_loading(model_config):
        raise EngineOptionError(
            f"--quantization {model_config.quantization} quantises weights while it loads them, which leaves nothing "
            f"to share: use a checkpoint that is quantised already, or {_HOW}"
        )
    return WeightdModelLoader(own_config, options, own)


class WeightdModelLoader(sglang_loader.DefaultModelLoader):  # type: ignore[misc]  # SGLang has no types
    """SGLang's loader of model files, but for where the tensors come from and what becomes of copies."""

    def __init__(self, load_config: Any, options: EngineOptions, own: Any) -> None:
        super().__init__(load_config)
        self.preloaded_weights_bytes = 0
        self._options = options
        self._own = own
        self._load: EngineLoad | None = None

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """A model on shared memory. Errors: those of `EngineLoad`, by fallback; SharedWeightsError, BindingError."""
        device = torch.device(device_config.device)
        load = self._load = EngineLoad(self._options, device, log)
        try:
            try:
                # Before anything is built, so that SGLang can still load by itself.
                model_class, _ = get_model_architecture(model_config)
                load.attach(*self._files(self.Source.init_new(model_config, model_class)))
            except NOT_REACHED as error:
                if self._options.fallback != "local":
                    raise
                log.warning("weightd: SGLang loads weights of its own, which are not shared: %s", error)
                model: torch.nn.Module = self._own.load_model(model_config=model_config, device_config=device_config)
                note_left(model, f"SGLang has loaded it by itself, for {error}")
                return model
            return self._recorded(load, model_config, device)
        finally:
            load.close()
            self._load = None

    def _recorded(self, load: EngineLoad, model_config: Any, device: torch.device) -> torch.nn.Module:
        quantisation = sglang_loader._get_quantization_config(model_config, self.load_config)
        with set_default_torch_dtype(model_config.dtype):
            with device, load.building():
                model: torch.nn.Module = sglang_loader._initialize_model(model_config, self.load_config, quantisation)
            with load.loading():
                self.load_weights_only(model, self._get_all_weights(model_config, model), device)
            load.bind(model, lambda _, module: by_quantisation(module, _rewritten))
            with load.guarding():
                self.postprocess_weights(model, device)
        load.finish(model)
        self.preloaded_weights_bytes = load.resident_bytes
        _refuse_updates(model)
        return model.eval()

    def _get_weights_iterator(self, source: Any, **prefetched: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a source of weights, as SGLang names them: stored ones."""
        assert self._load is not None
        weights = self._load.weights(*self._files(source))
        if self.load_config.draft_model_idx is not None:
            return self._filter_mtp_weights(  # type: ignore[no-any-return]
                weights, source.prefix, self.load_config.draft_model_idx
            )
        return ((source.prefix + name, tensor) for name, tensor in weights)

    def _files(self, source: Any) -> tuple[list[str], str, str]:
        """The files that SGLang would read, the model's name, and the name of the index. Errors: FormatError."""
        folder, files, use_safetensors = self._prepare_weights(
            source.model_or_path, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
        )
        if not use_safetensors:
            raise FormatError(f"{folder}: SGLang would load {os.path.basename(files[0])}; weightd has safetensors only")
        index = _INDEXES.get(self.load_config.load_format, _INDEX)
        if source.model_config is not None:
            files = maybe_add_mtp_safetensors(files, folder, _INDEX, source.model_config.hf_config)
        return files, reference_of(folder, source.model_or_path, source.revision), index


def _is_quantised_by_loading(model_config: Any) -> bool:
    return model_config.quantization is not None and not model_config._is_already_quantized()


def _rewritten(method: Any, module: torch.nn.Module) -> str:
    """Why SGLang may write to the weights of a module that has this method; empty where it does not."""
    name = class_name(method)
    if name in _UNPROCESSED:
        return ""
    if name != _EXPERTS:
        return f"{type(method).__name__} is not known to leave weights as they are"
    if method.use_flashinfer_trtllm_moe:
        return "FlashInfer's TRT-LLM kernels want experts in blocks; --moe-runner-backend triton does not"
    if envs.SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED.get():
        return "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED reorders experts in place"
    return ""


def _refuse_updates(model: torch.nn.Module) -> None:
    """Let SGLang refuse to write over a model's weights, whichever way new ones come."""
    model._derived_weight_cache_error = _UPDATES  # type: ignore[assignment]  # SGLang's updates ask every module for it

    def load_weights(*args: object, **kwargs: object) -> None:
        raise SharedWeightsError(_UPDATES)

    model.load_weights = load_weights  # type: ignore[assignment]  # and this is for whoever does not


refuse_while_shared(WeightChecker, "_reset_tensors", lambda checker, *_, **__: [checker._get_model()])
