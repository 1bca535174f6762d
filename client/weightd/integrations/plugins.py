"""What engines' plugin systems call in every process of theirs: it imports nothing that is not needed to be found.

Front ends and helpers load plugins as well as workers. So neither torch nor grpc nor an engine is imported here, and no
daemon is called: an integration is imported where an engine asks for weights and its settings name weightd.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

from . import NAME

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_VLLM_LOADERS = "vllm.model_executor.model_loader"


def vllm() -> None:
    """Let vLLM load models from weightd with `--load-format weightd` (entry point `vllm.general_plugins`).

    vLLM's loaders take seconds to import, and its front end never needs them: ours is registered after vLLM has
    imported them itself.
    """
    if _VLLM_LOADERS in sys.modules:
        _register_with_vllm(sys.modules[_VLLM_LOADERS])
    elif not any(isinstance(one, _AfterVllmsLoaders) for one in sys.meta_path):
        sys.meta_path.insert(0, _AfterVllmsLoaders())


class _AfterVllmsLoaders:
    """A finder of modules that lets `_register_with_vllm` follow the import of vLLM's loaders; it finds no other."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _VLLM_LOADERS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_with_vllm(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one import
        return spec


def _register_with_vllm(loaders: Any) -> None:
    """Register a loader that is imported when it is first asked for: it refuses versions of vLLM that were not run."""
    if NAME in loaders._LOAD_FORMAT_TO_MODEL_LOADER:  # of which vLLM would warn
        return

    class WeightdModelLoader(loaders.BaseModelLoader):  # type: ignore[misc]  # known at run time only
        def __new__(cls, load_config: Any) -> Any:
            from . import vllm as integration

            return integration.WeightdModelLoader(load_config)

    loaders.register_model_loader(NAME)(WeightdModelLoader)
