"""Writing into segments: both ways put the same bytes at the same place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightd_daemon.loader import target
from weightd_daemon.loader.copying import Buffer


@pytest.mark.parametrize("by_mapping", [False, True])
def test_bytes_arrive_where_they_should(by_mapping: bool) -> None:
    descriptor = os.memfd_create("segment")
    os.ftruncate(descriptor, 8 << 20)
    buffer = Buffer()
    buffer.view[:5000] = bytes(range(250)) * 20
    writer = target.Target({7: descriptor}, by_mapping=by_mapping)
    writer.write(7, buffer.view[:5000], buffer.address, 12_345)
    assert os.pread(descriptor, 5002, 12_344) == b"\0" + bytes(buffer.view[:5000]) + b"\0"
    del writer
    os.close(descriptor)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("always within_size [advise] never deny force\n", True),
        ("always within_size advise [never] deny force\n", False),
        ("[always] within_size advise never deny force\n", False),
    ],
)
def test_advice_is_read_from_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
) -> None:
    setting = tmp_path / "shmem_enabled"
    monkeypatch.setattr(target, "_SETTING", setting)
    assert not target.huge_pages_by_advice()
    setting.write_text(text)
    assert target.huge_pages_by_advice() is expected
