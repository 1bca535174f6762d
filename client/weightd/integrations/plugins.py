"""What engines' plugin systems call in every process of theirs: it imports nothing that is not needed to be found.

Front ends and helpers load plugins as well as workers. So neither torch nor grpc nor an engine is imported here, and no
daemon is called: an integration is imported where an engine asks for weights and its settings name weightd.
"""

from __future__ import annotations

import functools
import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from . import NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_VLLM_LOADERS = "vllm.model_executor.model_loader"
_SGLANG_LOADERS = "sglang.srt.model_loader.loader"


def vllm() -> None:
    """Let vLLM load models from weightd with `--load-format weightd` (entry point `vllm.general_plugins`)."""
    _once_imported(_VLLM_LOADERS, _register_with_vllm)


def sglang() -> None:
    """Let SGLang load models from weightd, where its settings say so (entry point `sglang.srt.plugins`)."""
    if _SGLANG_LOADERS not in sys.modules:
        _once_imported(_SGLANG_LOADERS, _replace_in_sglang)
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_SGLANG_LOADERS}.get_model_loader", _sglang_model_loader, HookType.AROUND)


# -- after imports -----------------------------------------------------------------------------------------------------


def _once_imported(name: str, act: Callable[[Any], None]) -> None:
    """Call a function with a module of an engine, now or after the engine has imported it itself.

    Engines' loaders take seconds to import, and many of their processes never need them.
    """
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(one, _AfterImport) and one.name == name for one in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, act))


class _AfterImport:
    """A finder of modules that lets a function follow the import of one module; it finds no other."""

    def __init__(self, name: str, act: Callable[[Any], None]) -> None:
        self.name = name
        self._act = act

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self._act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]  # of this one import
        return spec


# -- vLLM --------------------------------------------------------------------------------------------------------------


def _register_with_vllm(loaders: Any) -> None:
    """Register a loader that is imported when it is first asked for: it refuses versions of vLLM that were not run."""
    if NAME in loaders._LOAD_FORMAT_TO_MODEL_LOADER:  # of which vLLM would warn
        return

    class WeightdModelLoader(loaders.BaseModelLoader):  # type: ignore[misc]  # known at run time only
        def __new__(cls, load_config: Any) -> Any:
            from . import vllm as integration

            return integration.WeightdModelLoader(load_config)

    loaders.register_model_loader(NAME)(WeightdModelLoader)


# -- SGLang ------------------------------------------------------------------------------------------------------------


def _replace_in_sglang(loaders: Any) -> None:
    """Do what SGLang's registry of hooks does, before anybody has the function."""
    loaders.get_model_loader = functools.wraps(loaders.get_model_loader)(
        functools.partial(_sglang_model_loader, loaders.get_model_loader)
    )


def _sglang_model_loader(original: Callable[..., Any], load_config: Any, model_config: Any = None) -> Any:
    """In place of SGLang's `get_model_loader`, which is asked for all models that are not ours."""
    if NAME not in (load_config.model_loader_extra_config or {}):
        return original(load_config, model_config)
    from . import sglang as integration

    return integration.model_loader(original, load_config, model_config)
