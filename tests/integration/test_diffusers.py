"""Diffusers on shared memory: pipelines in several processes, and what two pipelines have in common."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import shutil
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import weightd
import weightd.torch
from support import models
from support.backends import HOST
from support.daemon import Daemon
from support.shared import SharedDaemons
from support.worker import Worker

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
    assert report(pipeline).shared_ratio == 1.0
    make_private(vae)
    with pytest.raises(weightd.InvalidReferenceError):
        report(vae)
    assert {one.name.split(".")[0] for one in report(pipeline).copied} == {"vae"}
    pipeline.unet.half()
    found = report(pipeline)
    reasons = {one.reason for one in found.copied if one.name.startswith("unet.")}
    assert reasons == {"cast to float16 since it was loaded"}
    assert found.shared_bytes == sum(parameter.nbytes for parameter in pipeline.text_encoder.parameters())


def test_names_of_old_attention_blocks(daemon: Daemon, pipelines: list[Path], tmp_path: Path) -> None:
    """As the VAEs of Stable Diffusion 1 have them."""
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
    with pytest.raises(weightd.InvalidReferenceError, match=r"float16 is asked for, but torch\.float32 is stored"):
        from_pretrained(pipelines[0], torch_dtype=torch.float16, **models.WITHOUT)
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
    from weightd.integrations.diffusers import from_pretrained

    path = shutil.copytree(pipelines[0] / "vae", tmp_path / "vae")
    weights = path / "diffusion_pytorch_model.safetensors"
    save_file({name: t for name, t in load_file(weights).items() if name != "encoder.conv_in.bias"}, weights)
    with pytest.raises(weightd.FormatError, match=r"lacks 'encoder\.conv_in\.bias', which AutoencoderKL has"):
        from_pretrained(path)


# -- what diffusers loads, loads ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of these tests' own for code that diffusers copies, and imports from there."""
    from diffusers.utils import dynamic_modules_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def altered(own_modules: None, pipelines: list[Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a pipeline with other keys in its index."""

    def make(**keys: object) -> Path:
        path = shutil.copytree(pipelines[0], tmp_path / "altered")
        index = json.loads((path / "model_index.json").read_text())
        (path / "model_index.json").write_text(json.dumps(index | keys))
        return path

    return make


def test_a_class_that_transformers_has_renamed(daemon: Daemon, altered: Callable[..., Path]) -> None:
    """As most repositories of Stable Diffusion 1 name it; diffusers knows the name of today."""
    import transformers

    from weightd.integrations.diffusers import from_pretrained, report

    path = altered(feature_extractor=["transformers", "CLIPFeatureExtractor"])
    transformers.CLIPImageProcessor().save_pretrained(path / "feature_extractor")
    pipeline = from_pretrained(path, tokenizer=None, safety_checker=None)
    assert "CLIP" in type(pipeline.feature_extractor).__name__
    assert report(pipeline).shared_ratio == 1.0


@pytest.mark.parametrize("listed", [True, False], ids=["code of its own", "as written"])
def test_keys_that_are_no_components(daemon: Daemon, altered: Callable[..., Path], listed: bool) -> None:
    from weightd.integrations.diffusers import from_pretrained, report

    name = {"_class_name": ["my_pipeline", "MyPipeline"]} if listed else {}
    path = altered(_ignore_files=["a.safetensors", "b.safetensors"], **name)
    (path / "my_pipeline.py").write_text(
        "from diffusers import StableDiffusionPipeline\nclass MyPipeline(StableDiffusionPipeline):\n    pass\n"
    )
    code = {"trust_remote_code": True} if listed else {}
    pipeline = from_pretrained(path, **models.WITHOUT, **code)
    assert type(pipeline).__name__ == ("MyPipeline" if listed else "StableDiffusionPipeline")
    assert report(pipeline).shared_ratio == 1.0


@pytest.mark.parametrize(
    "value", [["os", "system"], ["diffusers", "NoSuchModel"], ["mine", "Model"]], ids=["module", "class", "code"]
)
def test_a_component_that_cannot_be_resolved_is_left_to_diffusers(
    daemon: Daemon, altered: Callable[..., Path], value: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing is imported because an index names it: what comes of it is diffusers' own answer."""
    from weightd.integrations import components
    from weightd.integrations import diffusers as integration

    path = altered(unet=value)
    (path / "unet" / "mine.py").write_text("raise ValueError('imported')")
    parts = components.of_pipeline(path, models.WITHOUT, None)
    assert sorted(parts) == ["text_encoder", "vae"]
    assert "component unet is left to diffusers and shares no memory" in caplog.text
    with pytest.raises((AttributeError, TypeError, ValueError)):  # by version
        integration.from_pretrained(path, **models.WITHOUT)


def test_an_index_does_not_consent_to_code(daemon: Daemon, altered: Callable[..., Path], tmp_path: Path) -> None:
    """Components are arguments of diffusers' `from_pretrained`, and so is the consent."""
    from diffusers import DiffusionPipeline

    from weightd.integrations.diffusers import from_pretrained

    path = altered(trust_remote_code=["diffusers", "AutoencoderKL"], scheduler=["sched", "Scheduler"])
    shutil.copytree(path / "vae", path / "trust_remote_code")
    ran = tmp_path / "ran"
    (path / "scheduler" / "sched.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ValueError('imported')\n")
    has_run = []
    for load in (DiffusionPipeline.from_pretrained, from_pretrained):
        with pytest.raises(ValueError, match=r"trust_remote_code|imported"):
            load(path, **models.WITHOUT)
        has_run.append(ran.exists())
        ran.unlink(missing_ok=True)
    assert has_run[0] == has_run[1]


@pytest.mark.parametrize("name", ["variant", "custom_pipeline", "use_safetensors", "load_connected_pipeline", "more"])
def test_what_the_class_of_the_pipeline_does_not_take_is_no_component(
    daemon: Daemon, altered: Callable[..., Path], name: str
) -> None:
    from weightd.integrations.diffusers import from_pretrained, report

    path = altered(**{name: ["diffusers", "AutoencoderKL"]})
    shutil.copytree(path / "vae", path / name)
    assert report(from_pretrained(path, **models.WITHOUT)).shared_ratio == 1.0
    (checkpoint,) = daemon.connect().checkpoints()
    assert checkpoint.total_bytes == sum(
        tensor.nbytes
        for part in ("unet", "vae", "text_encoder")
        for file in (path / part).glob("*.safetensors")
        for tensor in load_file(file).values()
    )


@pytest.mark.parametrize(
    "name",
    ["NoSuchPipeline", "UNet2DModel", "", 7, None, [], ["mine", "Pipeline"]],
    ids=str,
)
def test_an_index_that_names_no_pipeline(daemon: Daemon, altered: Callable[..., Path], name: object) -> None:
    from weightd.integrations.diffusers import from_pretrained

    with pytest.raises(weightd.FormatError, match=r"model_index\.json: names .*, which is no pipeline of diffusers"):
        from_pretrained(altered(_class_name=name), **models.WITHOUT)


@pytest.mark.parametrize("name", ["../outside", "/outside", "unet/../../outside", ""])
def test_a_component_outside_the_folder_is_refused(daemon: Daemon, altered: Callable[..., Path], name: str) -> None:
    from weightd.integrations.diffusers import from_pretrained

    path = altered(**{name: ["diffusers", "AutoencoderKL"]})
    shutil.copytree(path / "vae", path.parent / "outside")
    with pytest.raises(weightd.FormatError, match=r"leads out of the folder; the file is not trusted"):
        from_pretrained(path, **models.WITHOUT)
    assert daemon.connect().checkpoints() == []


def test_a_component_that_is_left_to_diffusers_is_in_the_report(
    daemon: Daemon, pipelines: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from weightd.integrations.diffusers import from_pretrained, report

    path = shutil.copytree(pipelines[0], tmp_path / "pickled")
    weights = path / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    pipeline = from_pretrained(path, **models.WITHOUT)
    assert "component vae is left to diffusers and shares no memory" in caplog.text
    found = report(pipeline)
    assert {one.name.split(".")[0] for one in found.copied} == {"vae"}
    assert found.copied_bytes == sum(parameter.nbytes for parameter in pipeline.vae.parameters())


def test_a_variant(daemon: Daemon, pipelines: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Given, or the only one there is; beside other weights only where it is given."""
    import torch
    from diffusers import DiffusionPipeline

    from weightd.integrations.diffusers import from_pretrained, report

    half = DiffusionPipeline.from_pretrained(pipelines[0], torch_dtype=torch.float16, **models.WITHOUT)
    only, both = tmp_path / "only", shutil.copytree(pipelines[0], tmp_path / "both")
    half.save_pretrained(only, variant="fp16")
    for path in only.glob("unet/*.fp16.safetensors"):
        shutil.copy(path, both / path.relative_to(only))

    def dtypes(path: Path, **arguments: object) -> dict[str, torch.dtype]:
        pipeline = from_pretrained(path, **models.WITHOUT, **arguments)
        assert report(pipeline).shared_ratio == 1.0
        return {name: getattr(pipeline, name).dtype for name in ("unet", "text_encoder", "vae")}

    names, full, fp16 = ("unet", "text_encoder", "vae"), torch.float32, torch.float16
    assert dtypes(only, variant="fp16") == dtypes(only) == dict.fromkeys(names, fp16)
    assert "of the variant fp16 only" in caplog.text
    assert dtypes(both) == dict.fromkeys(names, full)
    assert dtypes(both, variant="fp16") == {"unet": fp16, "text_encoder": full, "vae": full}
    assert dtypes(both, torch_dtype={"unet": fp16, "default": full}, variant="fp16")["unet"] is fp16
    with pytest.raises(weightd.NotFoundError, match="no component has weights of variant 'fp8'"):
        from_pretrained(both, variant="fp8")
    assert from_pretrained(both / "unet", variant="fp16").dtype is fp16
    with pytest.raises(weightd.NotFoundError, match=r"diffusion_pytorch_model\.fp16\.safetensors"):
        from_pretrained(both, subfolder="vae", variant="fp16")


def test_another_variant_is_never_taken_for_the_one_that_is_asked_for(
    daemon: Daemon, pipelines: list[Path], tmp_path: Path
) -> None:
    """As diffusers, which takes a component's plain weights or none."""
    from diffusers import DiffusionPipeline

    from weightd.integrations.diffusers import from_pretrained

    path = shutil.copytree(pipelines[0], tmp_path / "mixed")
    for part, variant in (("unet", "bf16"), ("vae", "fp16")):
        weights = path / part / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(f".{variant}.safetensors"))
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        DiffusionPipeline.from_pretrained(path, variant="bf16", **models.WITHOUT)
    with pytest.raises(weightd.NotFoundError, match=r"vae: has neither diffusion_pytorch_model\.safetensors"):
        from_pretrained(path, variant="bf16", **models.WITHOUT)
    assert daemon.connect().checkpoints() == []


@pytest.mark.parametrize("asked", [{}, {"dtype": "float16"}, {"torch_dtype": {"vae": "float16", "default": "float16"}}])
def test_a_component_that_is_left_to_diffusers_has_the_dtype_of_the_others(
    daemon: Daemon, pipelines: list[Path], tmp_path: Path, asked: dict[str, Any]
) -> None:
    """The one that is asked for, else the one that most is stored in."""
    import torch
    from diffusers import DiffusionPipeline

    from weightd.integrations.diffusers import from_pretrained

    half = DiffusionPipeline.from_pretrained(pipelines[0], **models.WITHOUT).to(dtype=torch.float16)
    half.save_pretrained(tmp_path)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(weightd.InvalidReferenceError, match="torch has no such dtype"):
        from_pretrained(tmp_path, dtype={"vae": "float7", "default": "float16"}, **models.WITHOUT)
    pipeline = from_pretrained(tmp_path, **asked, **models.WITHOUT)
    assert {pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype} == {torch.float16}


def test_a_component_that_is_left_to_diffusers_goes_to_the_device() -> None:
    """But not one that diffusers, or who gave it, has put on another."""
    from torch import nn

    from weightd.integrations import diffusers as integration

    parts = {"ours": nn.Linear(2, 2), "left": nn.Linear(2, 2), "bare": nn.Identity()}
    integration._move_left(parts, {"ours"}, "meta")
    assert {name: part.weight.is_meta for name, part in parts.items() if name != "bare"} == {
        "ours": False,
        "left": True,
    }
    integration._move_left(parts, (), "cpu")
    assert parts["left"].weight.is_meta


def test_buffers_have_the_dtype_that_diffusers_gives_them(daemon: Daemon, tmp_path: Path) -> None:
    """Those of the checkpoint, whatever they are stored in, and those that are computed."""
    import torch
    from diffusers import UNet1DModel

    from weightd.integrations.diffusers import from_pretrained, report

    model = UNet1DModel(
        sample_size=16, block_out_channels=(8, 8, 32), extra_in_channels=16,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )  # fmt: skip
    stored, computed = "mid_block.down.kernel", "mid_block.up.kernel"
    model.half().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = {name: tensor for name, tensor in load_file(weights).items() if name != computed}
    save_file({**state, stored: state[stored].float()}, weights)
    theirs = UNet1DModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    ours = from_pretrained(tmp_path)
    for name, buffer in theirs.named_buffers():
        assert ours.get_buffer(name).dtype is buffer.dtype, name
        assert torch.equal(ours.get_buffer(name), buffer), name
    assert torch.get_default_dtype() is torch.float32
    assert report(ours).missing == (computed,)
    assert "the checkpoint lacks mid_block.up.kernel" in str(report(ours))


def test_one_thread_loads_at_a_time(daemon: Daemon, tmp_path: Path) -> None:
    """Otherwise most models are without memory: while one is made, torch makes all parameters on its meta device."""
    from weightd.integrations.diffusers import from_pretrained, report

    path = models.write_flux(tmp_path / "flux")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: from_pretrained(path), range(12)))
    assert not [tensor for model in made for tensor in [*model.parameters(), *model.buffers()] if tensor.is_meta]
    assert {report(model).shared_ratio for model in made} == {1.0}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model_index.json", "config.json", "unet/config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 200_000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (65 << 20, "over the limit"),
    ],
    ids=["deep", "no text", "list", "huge"],
)
def test_json_that_nobody_vouches_for(
    pipelines: list[Path], tmp_path: Path, name: str, content: Any, message: str
) -> None:
    from weightd.integrations.diffusers import from_pretrained

    path = tmp_path / "copy"
    path.mkdir()
    if name == "unet/config.json":
        shutil.copytree(pipelines[0], path, dirs_exist_ok=True)
    with open(path / name, "wb") as file:
        file.truncate(content) if isinstance(content, int) else file.write(content)
    with pytest.raises(weightd.FormatError, match=rf"{name}: .*{message}"):
        from_pretrained(path)


@pytest.mark.parametrize("name", ["model_index.json", "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    from weightd.integrations.diffusers import from_pretrained

    os.mkfifo(tmp_path / name)
    with pytest.raises(weightd.NotFoundError, match=r"has neither model_index\.json nor config\.json"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("transformer_2", weightd.NotFoundError, "transformer_2"),
        ("unet/diffusion_pytorch_model.safetensors", weightd.InvalidReferenceError, "is a file"),
        ("scheduler", weightd.NotFoundError, r"has neither model_index\.json nor config\.json"),
        ("text_encoder", weightd.InvalidReferenceError, r"load it with weightd\.integrations\.transformers"),
    ],
)
def test_what_is_no_folder_of_a_model_is_never_another_one(
    daemon: Daemon, pipelines: list[Path], name: str, error: type[Exception], message: str
) -> None:
    from weightd.integrations.diffusers import from_pretrained

    with pytest.raises(error, match=message):
        from_pretrained(pipelines[0] / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": {"unet": 0, "vae": "cpu"}}, "means 2 devices"),
        ({"device_map": "meta"}, "means meta, where no memory can be attached"),
        ({"quantization_config": object()}, "quantization_config is not supported"),
        ({"cache_dir": "/elsewhere"}, "set HF_HUB_CACHE"),
        ({"use_safetensors": False}, "asks for pickles"),
        ({"dtype": "float7"}, "torch has no such dtype"),
    ],
)
def test_arguments_that_cannot_be(
    daemon: Daemon, pipelines: list[Path], arguments: dict[str, Any], message: str
) -> None:
    from weightd.integrations.diffusers import from_pretrained

    with pytest.raises(weightd.InvalidReferenceError, match=message):
        from_pretrained(pipelines[0], **models.WITHOUT, **arguments)


def test_a_device_map_that_comes_to_the_cpu_is_shared(
    daemon: Daemon, pipelines: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightd.integrations.diffusers import from_pretrained, report

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    pipeline = from_pretrained(pipelines[0], device_map="balanced", **models.WITHOUT)
    assert report(pipeline).shared_ratio == 1.0
