"""The trials of a release: each extra has one, and its modules are there."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from support.daemon import ROOT

check_dist = pytest.importorskip("tools.check_dist")

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_extra_is_tried() -> None:
    assert check_dist.TRIALS.keys() == {"", *EXTRAS}
    for extra, trial in check_dist.TRIALS.items():
        tried = set(filter(None, trial.extras.split(",")))
        assert tried <= EXTRAS.keys()
        assert extra in tried or not extra


@pytest.mark.parametrize("extra", check_dist.TRIALS)
def test_its_modules_are_there(extra: str) -> None:
    ours = [name for name in check_dist.TRIALS[extra].modules.split() if name.startswith("weightd")]
    assert [name for name in ours if not (path_of(name).is_file() or path_of(name, "__init__").is_file())] == []


def path_of(module: str, *inside: str) -> Path:
    root = {"weightd": "client", "weightd_daemon": "daemon", "weightd_fleet": "fleet"}[module.partition(".")[0]]
    return (ROOT / root).joinpath(*module.split("."), *inside).with_suffix(".py")


def test_extras_that_need_torch_say_so() -> None:
    def needs(extra: str) -> bool:
        inner = {name for line in EXTRAS[extra] if line.startswith("weightd[") for name in line[8:-1].split(",")}
        return any(line.startswith("torch") for line in EXTRAS[extra]) or any(map(needs, inner))

    for extra in EXTRAS:
        tried = check_dist.TRIALS[extra]
        assert tried.torch == any(needs(name) for name in tried.extras.split(",")), extra


def test_a_python_that_does_not_start_is_none() -> None:
    assert check_dist.version_of("/nonexistent/python") is None
    assert check_dist.version_of("/bin/false") is None
