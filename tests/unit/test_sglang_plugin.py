"""The plugin for SGLang: nothing is imported before it is needed, and SGLang's loaders are asked for all but ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import ROOT

LOADER = '''\
"""A stand-in for SGLang's module of loaders."""


def get_model_loader(load_config, model_config=None):
    """SGLang's own."""
    return "own"
'''
HOOKS = '''\
"""A stand-in for SGLang's registry of hooks."""
import enum, functools, importlib


class HookType(enum.Enum):
    AROUND = "around"


class HookRegistry:
    @classmethod
    def register(cls, target, hook, kind):
        assert kind is HookType.AROUND
        name, function = target.rsplit(".", 1)
        module = importlib.import_module(name)
        setattr(module, function, functools.partial(hook, getattr(module, function)))
'''
INTEGRATION = '''\
"""A stand-in for the integration, which needs SGLang."""


def model_loader(original, load_config, model_config):
    return "ours", original(load_config, model_config)
'''


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    for name, source in {
        "sglang/__init__": "", "sglang/srt/__init__": "", "sglang/srt/model_loader/__init__": "",
        "sglang/srt/model_loader/loader": LOADER, "sglang/srt/plugins/__init__": "",
        "sglang/srt/plugins/hook_registry": HOOKS, "integration": INTEGRATION,
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


def python(source: str, stand_in: Path) -> str:
    """What a new interpreter prints, for which the stand-in is SGLang."""
    path = os.pathsep.join([str(ROOT / "client"), str(stand_in)])
    done = subprocess.run(
        [sys.executable, "-c", source], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = "import sys\nfrom weightd.integrations import plugins\nplugins.sglang()\n"
LOADERS = "from sglang.srt.model_loader import loader\n"
ASK = """
import types, weightd.integrations, integration
sys.modules["weightd.integrations.sglang"] = weightd.integrations.sglang = integration
for extra in ({}, None, {"num_threads": 2}, {"weightd": {}}):
    print(loader.get_model_loader(types.SimpleNamespace(model_loader_extra_config=extra)))
"""


def test_a_process_that_needs_no_loader_imports_nothing(stand_in: Path) -> None:
    names = "{'sglang', 'torch', 'grpc', 'weightd.integrations.sglang'}"
    assert python(CALL + f"print(*(sys.modules.keys() & {names}))", stand_in) == ""


@pytest.mark.parametrize("source", [CALL + LOADERS, LOADERS + CALL])
def test_sglang_is_asked_for_all_but_what_names_weightd(source: str, stand_in: Path) -> None:
    assert python(source + ASK, stand_in).splitlines() == ["own", "own", "own", "('ours', 'own')"]


def test_the_function_is_sglangs_by_name(stand_in: Path) -> None:
    assert python(CALL + LOADERS + "print(loader.get_model_loader.__doc__)", stand_in) == "SGLang's own."
