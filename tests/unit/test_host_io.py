"""A loader's access to host memory: both ways of writing put the same bytes at the same place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weightd_daemon.devices import host_io
from weightd_daemon.devices.device import DeviceSegment


@pytest.mark.parametrize("by_mapping", [False, True])
def test_bytes_arrive_where_they_should(by_mapping: bool) -> None:
    descriptor = os.memfd_create("segment")
    os.ftruncate(descriptor, 8 << 20)
    io = host_io.HostSegmentIO({7: DeviceSegment(7, 8 << 20, descriptor)}, by_mapping=by_mapping)
    staging = io.staging()
    content = bytes(range(250)) * 20
    for offset in (12_345, 4 << 20):
        buffer = staging.acquire()
        buffer.view[:5000] = content
        staging.write(buffer, 5000, 7, offset)
        staging.synchronize()
        assert os.pread(descriptor, 5002, offset - 1) == b"\0" + content + b"\0"
    back = staging.acquire()
    staging.read(back, 5002, 7, 12_344)
    assert back.view[:5002] == b"\0" + content + b"\0"
    staging.close()
    io.close()
    os.close(descriptor)


def test_a_segment_that_is_shorter_than_its_books_is_not_taken_for_zeroes() -> None:
    """A buffer that is filled in part would be compared, or hashed, with bytes of the piece before."""
    descriptor = os.memfd_create("segment")
    os.ftruncate(descriptor, 4096)
    io = host_io.HostSegmentIO({7: DeviceSegment(7, 8192, descriptor)}, by_mapping=False)
    staging = io.staging()
    with pytest.raises(OSError, match="segment 7 is shorter than its books"):
        staging.read(staging.acquire(), 4097, 7, 0)
    staging.close()
    io.close()
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
    monkeypatch.setattr(host_io, "_SETTING", setting)
    assert not host_io.huge_pages_by_advice()
    setting.write_text(text)
    assert host_io.huge_pages_by_advice() is expected
