"""What a word means that is a path and a checkpoint's name, where the daemon's answer is no plain yes or no."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest

from weightd._operations import Operations
from weightd.errors import DeviceError


class Lost(Operations):
    """A daemon whose checkpoint of that name was lost with its device."""

    def _rpc(self) -> NoReturn:
        raise AssertionError("no call is needed")

    def _attach(self, *_: Any) -> NoReturn:
        raise DeviceError("checkpoint prod was lost; load it again")


@pytest.mark.parametrize("to_load", [False, True])
def test_a_lost_name_is_meant_but_by_who_would_load_the_path(
    to_load: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prod").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Lost()._means_name("prod", "", to_load=to_load) is not to_load
