"""The plugin for vLLM: nothing is imported before it is needed, and vLLM's loaders know us when they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import ROOT

LOADERS = '''\
"""A stand-in for vLLM's package of loaders."""
_LOAD_FORMAT_TO_MODEL_LOADER = {}


class BaseModelLoader:
    pass


def register_model_loader(name):
    def register(loader):
        assert name not in _LOAD_FORMAT_TO_MODEL_LOADER
        assert issubclass(loader, BaseModelLoader)
        _LOAD_FORMAT_TO_MODEL_LOADER[name] = loader
        return loader

    return register
'''


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    package = tmp_path / "vllm" / "model_executor" / "model_loader"
    package.mkdir(parents=True)
    for folder in (package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text(LOADERS)
    return tmp_path


def python(source: str, stand_in: Path) -> str:
    """What a new interpreter prints, for which the stand-in is vLLM."""
    path = os.pathsep.join([str(ROOT / "client"), str(stand_in)])
    done = subprocess.run(
        [sys.executable, "-c", source], env={"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = "import sys\nfrom weightd.integrations import plugins\nplugins.vllm()\n"
LOOK = "import vllm.model_executor.model_loader as loaders\nprint(*loaders._LOAD_FORMAT_TO_MODEL_LOADER)"


def test_a_process_that_needs_no_loader_imports_nothing(stand_in: Path) -> None:
    names = "{'vllm', 'torch', 'grpc', 'weightd.integrations.vllm'}"
    assert python(CALL + f"print(*(sys.modules.keys() & {names}))", stand_in) == ""


@pytest.mark.parametrize(
    "source", [CALL + LOOK, LOOK + "\n" + CALL + LOOK, CALL + CALL + LOOK, CALL + LOOK + "\n" + CALL]
)
def test_vllm_knows_the_format_once_it_has_its_loaders(source: str, stand_in: Path) -> None:
    assert python(source, stand_in).split() == ["weightd"]


def test_other_modules_are_imported_as_ever(stand_in: Path) -> None:
    assert (
        python(CALL + "import vllm.model_executor, json\nprint(json.dumps(len(sys.meta_path) > 0))", stand_in) == "true"
    )
