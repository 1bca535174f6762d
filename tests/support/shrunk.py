"""Small random models of every type that transformers knows, made of shrunk default configurations."""

from __future__ import annotations

import contextlib
import zlib
from pathlib import Path
from typing import Any

import torch

_SMALL = {
    "hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 2, "num_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "vocab_size": 120, "max_position_embeddings": 64, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "image_size": 32, "patch_size": 8,
    "projection_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "depth": 2,
    "moe_intermediate_size": 256, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "d_ff": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "shared_expert_intermediate_size": 16, "image_token_id": 5, "video_token_id": 6, "audio_token_id": 7,
    "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64,
}  # fmt: skip
_LARGEST = 25_000_000
"""Parameters of a model that is still small."""

_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING", "MODEL_MAPPING",
)  # fmt: skip


def types() -> list[str]:
    """Every type of model that the installed transformers has a configuration for."""
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def classes(kind: str) -> list[Any]:
    """The classes for a type: with its first head, and the bare one."""
    import transformers

    config = transformers.CONFIG_MAPPING[kind]
    found: list[Any] = []
    for name in _MAPPINGS:
        mapping = getattr(transformers, name)
        if config in mapping.keys():  # noqa: SIM118  # a lazy mapping, which knows no `in`
            with contextlib.suppress(ValueError):  # it names a class that the version does not have
                there = mapping[config]
                found.append(there[0] if isinstance(there, tuple) else there)
    return list(dict.fromkeys(found[:1] + found[-1:]))


def build(cls: Any, kind: str, dtype: torch.dtype) -> Any | None:
    """A model of random weights and buffers; None where the shrunk configuration makes no small model."""
    import transformers

    torch.manual_seed(zlib.crc32(f"{kind} {cls.__name__}".encode()))  # no two share bytes
    try:
        config = _shrunk(transformers.CONFIG_MAPPING[kind])
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in cls(config).parameters()) > _LARGEST:
                return None
        model = cls(config).eval().to(dtype)
    except Exception:  # noqa: BLE001  # whatever a class says of a configuration that nobody has written by hand
        return None
    stored = model.state_dict()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in stored and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.1)
    return model


def save(model: Any, folder: Path) -> bool:
    """Save a model; whether transformers can."""
    try:
        model.save_pretrained(folder)
    except Exception:  # noqa: BLE001  # whatever it says of a model that nobody has trained
        return False
    return (folder / "model.safetensors").exists()


def contents(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also those that are not saved."""
    return {**dict(model.named_buffers()), **model.state_dict()}


def differences(ours: Any, theirs: Any) -> list[str]:
    """The parameters and buffers in which two models differ, in any bit."""
    mine, other = contents(ours), contents(theirs)
    found = sorted(mine.keys() ^ other.keys())
    return found + [
        name
        for name in sorted(mine.keys() & other.keys())
        if (mine[name].dtype, mine[name].shape) != (other[name].dtype, other[name].shape)
        or not torch.equal(_bits(mine[name]), _bits(other[name]))
    ]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def is_expert(name: str) -> bool:
    """Whether a parameter is of the experts that a router chooses from."""
    return ".experts." in name and "shared" not in name


def experts(model: Any) -> int:
    """Bytes of a model's experts."""
    return sum(parameter.nbytes for name, parameter in model.named_parameters() if is_expert(name))


def _shrunk(cls: Any) -> Any:
    base = cls()
    known = base.to_dict()
    small = {key: value for key, value in _SMALL.items() if type(known.get(key)) is int}
    for key in getattr(base, "sub_configs", None) or {}:
        if getattr(base, key, None) is not None:
            small[key] = _shrunk(type(getattr(base, key))).to_dict()
    return cls(**small)
