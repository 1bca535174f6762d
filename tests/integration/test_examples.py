"""Every script of examples/ that needs a daemon, run as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.daemon import ROOT, Daemon, environment

EXAMPLES = ROOT / "examples"
# By test_demo.py, test_readme.py, test_servers.py, test_onnx_runtime.py, test_wire_client.py,
# tests/engines/test_switched_engines.py and tests/fleet_engines/test_ray_serve.py.
# With an underscore: no scripts.
RUN_ELSEWHERE = {
    "demo.py", "two_checkpoints.py", "fastapi_workers.py", "gunicorn_workers.py", "onnx_sessions.py",
    "model_family.py", "ray_serve.py", "switched_engines.py", "wire_client.py",
}  # fmt: skip


def run(daemon: Daemon, name: str, *arguments: str | Path) -> str:
    finished = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env=environment(daemon.socket), capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stdout


@pytest.fixture
def pipelines(tmp_path: Path) -> list[Path]:
    """Two that differ in one tensor."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        unet.conv_in.weight.add_(1)
    pipeline.save_pretrained(tmp_path / "other")
    return [tmp_path / "one", tmp_path / "other"]


def test_torch(daemon: Daemon) -> None:
    assert "on shared memory; outputs equal: True" in run(daemon, "torch_module.py")


def test_transformers(daemon: Daemon) -> None:
    assert "BertModel: 100 % of the parameters shared" in run(daemon, "transformers_model.py")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_diffusers(daemon: Daemon, pipelines: list[Path]) -> None:
    printed = run(daemon, "diffusers_pipeline.py", *pipelines)
    assert printed.count("DDPMPipeline: 100 % of the parameters shared") == 2
    assert "saved 49." in printed


def test_sentence_transformers(daemon: Daemon) -> None:
    printed = run(daemon, "sentence_embeddings.py")
    assert " 0.7529  A kitten is napping on the couch." in printed
    assert "100 % of the parameters shared" in printed


def test_none_is_left_out() -> None:
    scripts = {path.name for path in EXAMPLES.glob("[!_]*.py")}
    tested = {"torch_module.py", "transformers_model.py", "diffusers_pipeline.py", "sentence_embeddings.py"}
    assert scripts == tested | RUN_ELSEWHERE
