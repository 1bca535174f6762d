"""Checkpoints for tests of engines: one tiny random model of each architecture, a real model, and a fine-tune of it.

`python -m support.engine_models FOLDER NAME...` writes those that are not there; `written` runs it in a process of its
own, for it needs transformers. All weights are bfloat16.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.daemon import environment
from support.gguf_files import smollm2
from support.leash import leashed

if TYPE_CHECKING:
    import numpy as np
    import torch

LIMIT = 300
"""Seconds that writing may take."""

SMOLLM2, FINE_TUNE = "smollm2", "smollm2-tuned"
CHANGED = ("model.layers.5.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight")
"""The tensors that the fine-tune has other values in than SmolLM2; their names, shapes and sizes are the same."""

_SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 1024, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
_DENSE = _SIZES | {"intermediate_size": 512}
_DENSE_64 = _DENSE | {"head_dim": 64}
_DEEPSEEK = _DENSE | {
    "num_key_value_heads": 4, "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip
_EXPERTS_16 = {"moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 2, "decoder_sparse_step": 1}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _DENSE_64),
    "llama-1003": ("LlamaConfig", _DENSE_64 | {"vocab_size": 1003}),  # an engine pads it to a multiple of 64
    "qwen2": ("Qwen2Config", _DENSE),
    "qwen3": ("Qwen3Config", _DENSE_64),
    "phi3": ("Phi3Config", _DENSE | {"pad_token_id": 0}),
    "gemma2": ("Gemma2Config", _DENSE_64 | {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", _DENSE_64 | {"tie_word_embeddings": True}),
    "mixtral": (
        "MixtralConfig",
        _SIZES | {"intermediate_size": 256, "head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2-moe": ("Qwen2MoeConfig", _DENSE | _EXPERTS_16 | {"num_experts": 8, "shared_expert_intermediate_size": 256}),
    "qwen3-moe": ("Qwen3MoeConfig", _DENSE_64 | _EXPERTS_16),
    "olmoe": ("OlmoeConfig", _SIZES | {"intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek-v2": ("DeepseekV2Config", _DEEPSEEK | {"n_group": 1, "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3Config", _DEEPSEEK | {"n_group": 2, "q_lora_rank": 128, "topk_method": "noaux_tc"}),
    "gpt-oss": (
        "GptOssConfig",
        _SIZES
        | {
            "intermediate_size": 256, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
            "sliding_window": 128,
        },
    ),
    "gpt2": ("GPT2Config", {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 1003, "n_positions": 512}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 512, "vocab_size": 1024,
            "max_position_embeddings": 512, "word_embed_proj_dim": 256,
        },
    ),
    "olmo2": ("Olmo2Config", _DENSE),
    "starcoder2": ("Starcoder2Config", _DENSE),
}  # fmt: skip
"""Tiny models by name: the class of their configuration in transformers, and its arguments."""

EVERY = (*ARCHITECTURES, SMOLLM2, FINE_TUNE)


def written(folder: Path, names: Iterable[str] = EVERY) -> dict[str, Path]:
    """Checkpoint folders by name; writes those that are not there below `folder`, for which processes take turns.

    Raises AssertionError with what the process that writes has said.
    """
    paths = {name: folder / name for name in names}
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        absent = [name for name, path in paths.items() if not path.exists()]
        if absent:
            done = subprocess.run(
                leashed([sys.executable, "-m", "support.engine_models", str(folder), *absent]),
                env=environment() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, timeout=LIMIT, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-4000:]
    return paths


# -- in the process that writes ----------------------------------------------------------------------------------------


def main() -> None:
    """Write each named checkpoint beside its place and move it there, so that it is whole or absent."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in sorted(names, key=EVERY.index):  # the fine-tune is made from SmolLM2
        unfinished = folder / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        special: dict[str, Callable[[Path], None]] = {SMOLLM2: _write_smollm2, FINE_TUNE: _write_fine_tune}
        special.get(name, lambda path, name=name: _write_random(name, path))(unfinished)
        unfinished.rename(folder / name)


def _write_random(name: str, path: Path) -> None:
    import torch
    import transformers

    kind, options = ARCHITECTURES[name]
    torch.manual_seed(EVERY.index(name))  # equal tensors of two checkpoints are stored once, and apart from others
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options), dtype=torch.bfloat16)
    for parameter in model.parameters():  # biases and norms start as zeros and ones: equal tensors would be stored once
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):  # in float32 in DeepSeek's files, and not zero
            buffer.data = torch.randn(buffer.shape) * 0.02
    model.save_pretrained(path)


_LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
"""What llama.cpp calls a module, and what transformers does."""


def _write_smollm2(path: Path) -> None:
    """SmolLM2-135M as transformers has it: llama.cpp's file dequantised, with its tokenizer."""
    import torch
    import transformers
    from gguf import GGUFReader, dequantize

    file = smollm2()
    reader = GGUFReader(file)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    heads = {"attn_q": field("llama.attention.head_count"), "attn_k": field("llama.attention.head_count_kv")}
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        *block, module, _ = tensor.name.split(".")
        values = dequantize(tensor.data, tensor.tensor_type)
        if module in heads:
            values = _in_halves(values, heads[module])
        prefix = f"model.layers.{block[1]}." if block else ""
        state[f"{prefix}{_LLAMA_NAMES[module]}.weight"] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    config = transformers.LlamaConfig(
        vocab_size=len(state["model.embed_tokens.weight"]),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        max_position_embeddings=field("llama.context_length"),
        tie_word_embeddings="lm_head.weight" not in state,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    absent, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(absent) <= {"lm_head.weight"}, absent
    model.tie_weights()
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(path)


def _in_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a rotary projection as transformers has them: llama.cpp pairs neighbours, transformers halves."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_fine_tune(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = path.parent / SMOLLM2
    shutil.copytree(base, path, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(base / "model.safetensors")
    for name in CHANGED:
        state[name] = state[name] * 1.01
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    sizes = [os.path.getsize(folder / "model.safetensors") for folder in (base, path)]
    assert sizes[0] == sizes[1], sizes


if __name__ == "__main__":
    main()
