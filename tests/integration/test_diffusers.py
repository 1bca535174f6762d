"""Diffusers on shared memory: pipelines in several processes, and what two pipelines have in common."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightd
import weightd.torch
from support import models
from support.backends import HOST
from support.daemon import Daemon
from support.shared import SharedDaemons
from support.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def shared_daemons() -> Iterator[SharedDaemons]:
    daemons = SharedDaemons()
    yield daemons
    while weightd.torch._shared:
        weightd.torch._shared.popitem()[1].close()
    daemons.close()


@pytest.fixture
def daemon(shared_daemons: SharedDaemons, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    with shared_daemons.on(HOST) as found:
        monkeypatch.setenv("WEIGHTD_SOCKET", str(found.socket))
        yield found
        gc.collect()
        with weightd.connect(found.socket) as client:
            client.verify()  # nothing that diffusers did has changed a byte


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pipelines with the same VAE."""
    folder = tmp_path_factory.mktemp("pipelines")
    return [models.write_stable_diffusion(folder / f"sd{seed}", seed) for seed in (11, 12)]


def tensors(folder: Path) -> Counter[bytes]:
    """The bytes of every tensor of a pipeline, and how many names have them."""
    from safetensors.torch import load_file

    found = [tensor for path in folder.glob("*/*.safetensors") for tensor in load_file(path).values()]
    return Counter(tensor.numpy().tobytes() for tensor in found)


def unique_bytes(folders: list[Path]) -> int:
    """What pipelines take together. Below 64 KiB, names of one checkpoint share nothing (decision 0005)."""
    counted = [tensors(folder) for folder in folders]
    contents = set().union(*counted)
    return sum(len(c) * (1 if len(c) >= 64 << 10 else max(one[c] for one in counted)) for c in contents)


def test_pipelines_are_shared_and_compute_what_private_ones_do(daemon: Daemon, pipelines: list[Path]) -> None:
    workers = [Worker(daemon.socket) for _ in range(2)]
    try:
        for worker in workers:
            worker.start(
                "from support import models; result = models.compare_pipelines(paths)",
                paths=[str(p) for p in pipelines],
            )
        for worker in workers:
            for found in worker.finish():
                assert found == {"ratio": 1.0, "copied": [], "equal": True, "written": 0}
        assert daemon.connect().stats().checkpoints == 2
    finally:
        for worker in workers:
            worker.close()


def test_two_pipelines_with_one_text_encoder_take_their_unique_bytes(daemon: Daemon, tmp_path: Path) -> None:
    """In shards, too."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(9)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(**size, vocab_size=2000))
    paths = [
        models.write_stable_diffusion(tmp_path / f"p{seed}", seed, text_encoder=encoder, max_shard_size="900KB")
        for seed in (21, 22)
    ]
    from weightd.integrations.diffusers import from_pretrained, report

    kept = [from_pretrained(path, **models.WITHOUT) for path in paths]
    assert [report(pipeline).shared_ratio for pipeline in kept] == [1.0, 1.0]
    stats = daemon.connect().stats()
    assert stats.resident_bytes == unique_bytes(paths)
    assert stats.saved_bytes > encoder.num_parameters() * 4


def test_a_single_model(daemon: Daemon, tmp_path: Path) -> None:
    import torch
    from diffusers import FluxTransformer2DModel

    from weightd.integrations.diffusers import from_pretrained, report

    path = models.write_flux(tmp_path / "flux", max_shard_size="50KB")
    model = from_pretrained(path)
    assert isinstance(model, FluxTransformer2DModel)
    assert report(model).shared_ratio == 1.0
    private = FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.bfloat16)
    assert torch.equal(models.run_flux(model), models.run_flux(private))
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.save_pretrained(tmp_path / "saved")
    private.save_pretrained(tmp_path / "private")
    name = "diffusion_pytorch_model.safetensors"
    assert models.equal_files(str(tmp_path / "saved" / name), str(tmp_path / "private" / name))


def test_a_component_alone_and_one_that_is_given(daemon: Daemon, pipelines: list[Path]) -> None:
    from weightd.integrations.diffusers import from_pretrained, make_private, report

    vae = from_pretrained(pipelines[0], subfolder="vae")
    pipeline = from_pretrained(pipelines[1], vae=vae, **models.WITHOUT)
    assert pipeline.vae is vae
    assert {part.name.split(".")[0] for part in report(pipeline).buffers} <= {"text_encoder", "unet", "vae"}
    make_private(vae)
    with pytest.raises(weightd.InvalidReferenceError):
        report(vae)
    assert report(pipeline).shared_ratio == 1.0


def test_names_of_old_attention_blocks(daemon: Daemon, pipelines: list[Path], tmp_path: Path) -> None:
    """As the VAEs of Stable Diffusion 1 have them."""
    from safetensors.torch import load_file, save_file

    from weightd.integrations.diffusers import from_pretrained, report

    path = shutil.copytree(pipelines[0] / "vae", tmp_path / "vae")
    weights = path / "diffusion_pytorch_model.safetensors"
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in load_file(weights).items():
        for new, old in renamed.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        state[name] = tensor
    save_file(state, weights)
    assert any(".query." in name for name in state)
    assert report(from_pretrained(path)).shared_ratio == 1.0


def test_another_dtype_is_an_error_unless_it_may_copy(daemon: Daemon, pipelines: list[Path]) -> None:
    import torch

    from weightd.integrations.diffusers import from_pretrained, report

    with pytest.raises(weightd.InvalidReferenceError, match=r"float16 is asked for, but torch\.float32 is stored"):
        from_pretrained(pipelines[0], dtype="float16", **models.WITHOUT)
    with pytest.raises(weightd.InvalidReferenceError, match=r"torch_dtype is not supported .*; say dtype="):
        from_pretrained(pipelines[0], torch_dtype=torch.float16)
    pipeline = from_pretrained(pipelines[0], dtype="float16", allow_copy=True, **models.WITHOUT)
    assert report(pipeline).shared_ratio == 0.0
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float16}
    assert report(pipeline.unet).copied[0].reason == "torch.float16 was asked for"


def test_writers_are_refused_while_weights_are_shared(daemon: Daemon, pipelines: list[Path]) -> None:
    from weightd.integrations.diffusers import from_pretrained, make_private

    pipeline = from_pretrained(pipelines[0], **models.WITHOUT)
    state = pipeline.unet.state_dict()
    for method, write in {
        "fuse_lora": pipeline.unet.fuse_lora,
        "load_state_dict": lambda: pipeline.unet.load_state_dict(state),
    }.items():
        message = f"{method} writes into weights, and those of UNet2DConditionModel are shared with .*make_private"
        with pytest.raises(weightd.InvalidReferenceError, match=message):
            write()
    for components in (["unet"], ["text_encoder"]):
        with pytest.raises(weightd.InvalidReferenceError, match="fuse_lora writes into weights"):
            pipeline.fuse_lora(components=components)
    for private in (copy.deepcopy(pipeline.unet), pickle.loads(pickle.dumps(pipeline.unet))):
        private.load_state_dict(state)
    make_private(pipeline.unet)
    pipeline.unet.load_state_dict(state)
    with pytest.raises(ValueError, match="PEFT"):  # diffusers' own answer: that package is not installed
        pipeline.unet.fuse_lora()


def test_norms_of_a_control_lora_are_not_written_in_place(daemon: Daemon, tmp_path: Path) -> None:
    """diffusers loads them into the transformer itself."""
    import torch
    from diffusers import FluxPipeline

    from weightd.integrations.diffusers import from_pretrained

    model = from_pretrained(models.write_flux(tmp_path / "flux"))
    name = next(name for name, _ in model.named_parameters() if "norm_q" in name)
    norm = {f"transformer.{name}": torch.full_like(model.get_parameter(name), 7)}
    with pytest.raises(weightd.InvalidReferenceError, match="load_state_dict writes into weights"):
        FluxPipeline._load_norm_into_transformer(norm, transformer=model, prefix=None, discard_original_layers=False)


def test_a_buffer_that_is_computed_need_not_be_in_the_checkpoint(daemon: Daemon, tmp_path: Path) -> None:
    import torch
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import load_file, save_file

    from weightd.integrations.diffusers import from_pretrained, report

    path = tmp_path / "sd3"
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, num_layers=1, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
    ).save_pretrained(path)  # fmt: skip
    weights = path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    expected = state.pop("pos_embed.pos_embed")
    save_file(state, weights)
    model = from_pretrained(path)
    assert report(model).shared_ratio == 1.0
    assert torch.equal(model.pos_embed.pos_embed, expected)


def test_only_what_the_pipeline_uses_is_loaded(daemon: Daemon, pipelines: list[Path], tmp_path: Path) -> None:
    from weightd.integrations.diffusers import from_pretrained, report

    path = shutil.copytree(pipelines[0], tmp_path / "more")
    shutil.copytree(pipelines[1], path / "checkpoint-500")
    (path / "vae" / "half.safetensors").write_bytes(b"half")
    pipeline = from_pretrained(path, text_encoder=None, **models.WITHOUT)
    assert pipeline.text_encoder is None
    (checkpoint,) = daemon.connect().checkpoints()
    assert checkpoint.total_bytes == report(pipeline).shared_bytes


def test_memory_goes_with_the_pipeline(daemon: Daemon, pipelines: list[Path]) -> None:
    from weightd.integrations.diffusers import from_pretrained

    pipeline = from_pretrained(pipelines[0], **models.WITHOUT)
    gone = weakref.ref(pipeline.unet)
    pipeline.maybe_free_model_hooks()
    del pipeline
    gc.collect()
    assert gone() is None
    assert daemon.connect().leases() == []


def test_a_missing_component_is_named(daemon: Daemon, pipelines: list[Path], tmp_path: Path) -> None:
    from weightd.integrations.diffusers import from_pretrained

    path = shutil.copytree(pipelines[0], tmp_path / "cut")
    shutil.rmtree(path / "unet")
    with pytest.raises(weightd.NotFoundError, match="lists component 'unet', but there is no such folder"):
        from_pretrained(path)
    assert daemon.connect().checkpoints() == []


def test_a_missing_tensor_is_named(daemon: Daemon, pipelines: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from weightd.integrations.diffusers import from_pretrained

    path = shutil.copytree(pipelines[0] / "vae", tmp_path / "vae")
    weights = path / "diffusion_pytorch_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if name != "encoder.conv_in.bias"}, weights)
    with pytest.raises(weightd.FormatError, match=r"lacks 'encoder\.conv_in\.bias', which AutoencoderKL has"):
        from_pretrained(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"unet": ["os", "system"]}, "names class 'system' of 'os'"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "names class 'NoSuchModel' of 'diffusers'"),
    ],
)
def test_a_hostile_index_imports_nothing(
    daemon: Daemon, pipelines: list[Path], tmp_path: Path, index: dict[str, object], message: str
) -> None:
    from weightd.integrations.diffusers import from_pretrained

    path = shutil.copytree(pipelines[0], tmp_path / "hostile")
    known = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(known | index))
    with pytest.raises(weightd.FormatError, match=message):
        from_pretrained(path)
