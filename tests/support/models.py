"""Tiny models of transformers and diffusers: written as checkpoints with random weights, and run once.

Imported by the processes that tests spawn, and by tests themselves; frameworks are imported when first needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from examples import _minilm

from support.memory import written

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip
TRANSFORMERS = ("minilm", "llama", "llama-tied", "mixtral", "qwen3-moe", "t5")


def quiet() -> Any:
    """transformers, without its advice."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def write(name: str, folder: Path, dtype: str = "float32", **options: Any) -> Path:
    """A checkpoint of transformers below `folder`; `options` are those of `save_pretrained`. MiniLM is real."""
    import torch

    transformers = quiet()
    if name == "minilm":
        return _minilm.package_folder()
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZES),
        "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
        "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
        ),
        "t5": lambda: transformers.T5Config(
            d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=320, decoder_start_token_id=0
        ),
    }
    config = configs[name]()
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    torch.manual_seed(7)
    model = kind.from_config(config).to(getattr(torch, dtype))
    path = folder / name
    model.save_pretrained(path, **options)
    return path


def auto_class(name: str) -> Any:
    """The Auto class that users of such a model name."""
    transformers = quiet()
    kinds = {"minilm": transformers.AutoModel, "t5": transformers.AutoModelForSeq2SeqLM}
    return kinds.get(name, transformers.AutoModelForCausalLM)


def run(name: str, model: Any) -> Any:
    """The output of one forward pass on fixed input."""
    import torch

    ids = torch.arange(1, 25).view(2, 12)
    more = {"decoder_input_ids": ids} if name == "t5" else {}
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)[0]


def compare(name: str, path: str) -> dict[str, Any]:
    """Load a checkpoint through weightd and privately, run both, and say what came of it."""
    import torch

    from weightd.integrations import transformers as integration

    before = written(os.getpid())
    attached = integration.from_pretrained(path, model_class=auto_class(name))
    found = integration.report(attached)
    output = run(name, attached)
    private = auto_class(name).from_pretrained(path, dtype=attached.dtype)
    return {
        "ratio": found.shared_ratio,
        "shared": found.shared_bytes,
        "copied": {one.name: one.reason for one in found.copied},
        "equal": torch.equal(output, run(name, private)),
        "frozen": not any(parameter.requires_grad for parameter in attached.parameters()),
        "tied": len(list(attached.parameters())) == len(list(private.parameters())),
        "class": type(attached).__name__ == type(private).__name__,
        "written": written(os.getpid()) - before,
    }


# -- diffusers ---------------------------------------------------------------------------------------------------------

WITHOUT = {"tokenizer": None, "feature_extractor": None, "safety_checker": None}
"""What a pipeline is given instead of components that nobody needs to run it on embeddings."""


def write_stable_diffusion(folder: Path, seed: int, *, text_encoder: Any = None, **options: Any) -> Path:
    """A tiny Stable Diffusion pipeline; pipelines of different seeds differ in everything but the VAE."""
    import diffusers
    import torch

    transformers = quiet()
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
    )  # fmt: skip
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )  # fmt: skip
    text = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000
    )
    diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder or transformers.CLIPTextModel(text),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False, **WITHOUT,
    ).save_pretrained(folder, **options)  # fmt: skip
    return folder


def write_flux(folder: Path, **options: Any) -> Path:
    """A tiny Flux transformer in bfloat16, as a single model."""
    import diffusers
    import torch

    torch.manual_seed(3)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(folder, **options)
    return folder


def run_stable_diffusion(pipeline: Any) -> Any:
    """Two steps from fixed noise and fixed embeddings."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    embedding = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    return pipeline(
        prompt_embeds=embedding, negative_prompt_embeds=embedding / 2, num_inference_steps=2, output_type="pt",
        height=16, width=16, generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip


def run_flux(model: Any) -> Any:
    """One forward pass on fixed input."""
    import torch

    torch.manual_seed(5)
    size = {"dtype": model.dtype}
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 16, 4, **size), encoder_hidden_states=torch.randn(1, 7, 32, **size),
            pooled_projections=torch.randn(1, 32, **size), timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3),
        )[0]  # fmt: skip


def compare_pipelines(paths: list[str]) -> list[dict[str, Any]]:
    """Load pipelines through weightd, and each privately; run them, and say what came of it."""
    import torch
    from diffusers import StableDiffusionPipeline

    from weightd.integrations import diffusers as integration

    before = written(os.getpid())
    found = []
    attached = [integration.from_pretrained(path, **WITHOUT) for path in paths]
    for path, pipeline in zip(paths, attached, strict=True):
        private = StableDiffusionPipeline.from_pretrained(path, **WITHOUT)
        found.append(
            {
                "ratio": integration.report(pipeline).shared_ratio,
                "copied": [one.name for one in integration.report(pipeline).copied],
                "equal": torch.equal(run_stable_diffusion(pipeline), run_stable_diffusion(private)),
                "written": written(os.getpid()) - before,
            }
        )
    return found


def equal_files(one: str, other: str) -> bool:
    """Whether two safetensors files hold the same tensors."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
