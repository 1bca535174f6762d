"""A driver that hangs, on the double: its GPU does not answer, everything else goes on, and nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support import checkpoints
from support.backends import Backend
from support.content import content
from support.daemon import Daemon, eventually
from support.launch import launcher
from weightd.errors import DeviceAbsentError

MIB = 1 << 20
CREATES = {"cuda_vmm": "cuMemCreate", "cuda_ipc": "cuMemAlloc"}


@pytest.mark.backends("cuda_vmm", "cuda_ipc", double_only=True)
def test_a_gpu_whose_driver_hangs_is_told_of_and_served_again_and_the_rest_never_waits(
    backend: Backend, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """That no step of the loop takes long, so that `ping` is answered, is watched in every daemon of a test."""
    hangs = tmp_path / "hangs"
    paths = [
        checkpoints.write(tmp_path / f"{name}.safetensors", {"t": ("U8", (MIB,), checkpoints.random_bytes(name, MIB))})
        for name in ("before", "new", "other")
    ]
    on = backend.with_knobs(hang=CREATES[backend.kind], hang_while=hangs)
    config = tmp_path / "w.toml"
    config.write_text("budget = '256MiB'")
    daemon = start_daemon(
        on, argv=launcher(answer=0.3), device="host,cuda:0", log_level="info", config=config, unset=("budget",)
    )
    client = daemon.connect()
    client.load(paths[0], device=backend.uuid, name="before")
    used = {device.uuid: device.used_bytes for device in client.stats().devices}[backend.uuid]
    hangs.touch()

    why = rf"{backend.uuid} is absent: it does not answer since .*, in {CREATES[backend.kind]}"
    with pytest.raises(DeviceAbsentError, match=why):
        client.load(paths[1], device=backend.uuid, name="new")
    with pytest.raises(DeviceAbsentError, match=why):
        client.load(paths[2], device=backend.uuid, name="other")
    with pytest.raises(DeviceAbsentError, match=why):
        client.attach("before")
    (absence,) = [device.absence for device in client.stats().devices if device.uuid == backend.uuid]
    assert "does not answer" in absence
    client.load(paths[1], device="host", name="elsewhere")
    with client.attach("elsewhere") as attachment:
        assert content(attachment, "t") == checkpoints.random_bytes("new", MIB)

    config.write_text("budget = '128MiB'")
    os.kill(daemon.pid, signal.SIGHUP)
    eventually(lambda: "settings read again; changed: budget" in daemon.logged())

    os.unlink(hangs)
    eventually(lambda: not any(device.absence for device in client.stats().devices), what="the GPU answers again")
    assert {device.budget_bytes for device in client.stats().devices} == {128 * MIB}

    def on_gpu() -> tuple[int, int]:
        (device,) = [device for device in client.stats().devices if device.uuid == backend.uuid]
        return device.used_bytes, device.in_flight_bytes

    eventually(lambda: on_gpu() == (used, 0), what="what came too late goes back")
    client.load(paths[1], device=backend.uuid, name="new")
    for name in ("before", "new"):
        with client.attach(name, device=backend.uuid) as attachment:
            assert content(attachment, "t") == checkpoints.random_bytes(name, MIB)
    kinds = [event.kind for event in client.events()]
    assert kinds.count("device_absent") == kinds.count("device_back") == 1
