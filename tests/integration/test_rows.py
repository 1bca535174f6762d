"""Tensors that are to lie in a row, when several threads bring equal bytes at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support import checkpoints
from support.daemon import Daemon
from support.gated import stalling_argv

StartDaemon = Callable[..., Daemon]
MIB = 1 << 20
EXPERTS = 4


def twin_layers(path: Path) -> Path:
    """A checkpoint of two layers with the same bytes, each of two rows: gate and up of all experts, and down."""
    arrays: dict[str, np.ndarray] = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for part in ("down", "gate", "up"):
                bits = np.frombuffer(checkpoints.random_bytes((expert, part), MIB // 8), np.uint32).view(np.float32)
                arrays[f"layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"] = bits.reshape(128, -1)
    return checkpoints.write(path, arrays)


@pytest.mark.parametrize("hash_first", [False, True])
def test_threads_that_bring_equal_rows_at_once_spoil_neither(
    start_daemon: StartDaemon, hash_first: bool, tmp_path: Path
) -> None:
    """One thread still copies the first layer's row when another is done with the second layer's."""
    stalled, awaited = (f"layers.{layer}.mlp.experts.1.gate_proj.weight" for layer in (0, 1))
    size = 3 * EXPERTS * MIB // 8
    daemon = start_daemon(
        argv=stalling_argv(stalled, awaited, limit=2.0 if hash_first else 10.0),
        reader_threads=2,
        budget=2 * size - MIB // 8 if hash_first else 16 * MIB,
    )
    with daemon.connect() as client, client.attach(twin_layers(tmp_path / "m.safetensors")) as attachment:
        assert sorted(view.name for view in attachment.views.values()) == [
            f"layers.{layer}.mlp.experts.{fused}" for layer in range(2) for fused in ("down_proj", "gate_up_proj")
        ]
        assert client.stats().devices[0].live_bytes == size
