"""Preloads for a GPU that is absent and whose number is not known: they wait for it, and may turn out to mean none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import checkpoints
from weightd.errors import DeviceAbsentError, InvalidReferenceError
from weightd_daemon.config.preload_entry import PreloadConfig
from weightd_daemon.config.settings import ConfigError
from weightd_daemon.core.principal import Principal
from weightd_daemon.operations.preload import PreloadOperation


class Catalog:
    def check(self, who: object, name: str) -> None:
        if name == "/":
            raise InvalidReferenceError("no name")

    def find(self, who: object, name: str, device: str) -> None:
        raise AssertionError("no device is meant")


def absent(_: str) -> str:
    raise DeviceAbsentError("device 'cuda:0' may be GPU-0, which is absent")


def unknown(_: str) -> str:
    raise ConfigError("device 'cuda:7' is not served")


def preloading(place: Callable[[str], str], roots: list[str]) -> PreloadOperation:
    nobody: Any = None
    catalog: Any = Catalog()
    who = Principal(1000, False, "")
    return PreloadOperation(
        loads=nobody, catalog=catalog, who=who, place=place, notify=lambda **_: None, roots=roots, listed=[]
    )


def test_a_device_that_is_absent_is_no_wrong_setting_and_hides_none() -> None:
    operation = preloading(absent, [])
    operation.check([PreloadConfig(ref="a", where="here", device="cuda:0", name="n")])
    with pytest.raises(ConfigError, match="here: preload 'a': no name"):
        operation.check([PreloadConfig(ref="a", where="here", device="cuda:0", name="/")])


def test_a_number_that_means_no_gpu_after_all_is_a_preload_that_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoints.write_random(tmp_path / "m.safetensors", 1, 4096)
    operation = preloading(unknown, [str(tmp_path)])
    error = asyncio.run(operation._try(PreloadConfig(ref=str(path), wait=True)))
    assert str(error) == "device 'cuda:7' is not served"
    assert [record.message for record in caplog.records] == [f"preload of {path} failed: {error}"]
