"""Train a small family of models, to try `weightd plan --scan` with. It needs torch and safetensors.

    python examples/model_family.py [FOLDER] [--steps 12]
    weightd plan --scan FOLDER

All of it is real training, on Python's own sources as text, in float32, stored in bfloat16:

    base             a transformer that predicts the next byte
    adapter-merged   the base with a LoRA on q and v, trained and merged
    fine-tune        the base, all parameters trained on with AdamW at a learning rate of 1e-5
    pipeline         the base as a frozen text encoder, and a denoiser trained on what it says, as diffusers lays it out
"""

from __future__ import annotations

import argparse
import itertools
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

WIDTH, LAYERS, HEADS, CONTEXT, BATCH, RANK = 320, 4, 5, 64, 4, 8
ATTENDED = ("q_proj", "v_proj")


class Block(nn.Module):
    """Attention and a perceptron, each on what came before."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm, self.output_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, state: Tensor) -> Tensor:
        """Both have the shape (batch, context, WIDTH)."""
        normed = self.input_norm(state)
        q, k, v = (
            project(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        state = state + self.o_proj(attended)
        return state + self.down_proj(functional.gelu(self.up_proj(self.output_norm(state))))


class Model(nn.Module):
    """A transformer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def encode(self, tokens: Tensor) -> Tensor:
        """From bytes (batch, context) to states (batch, context, WIDTH)."""
        state = self.embed_tokens(tokens) + self.embed_positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            state = layer(state)
        return self.norm(state)

    def loss(self, tokens: Tensor) -> Tensor:
        """How badly the next byte is predicted."""
        return functional.cross_entropy(
            self.lm_head(self.encode(tokens[:, :-1])).flatten(0, 1), tokens[:, 1:].flatten()
        )


class LowRank(nn.Module):
    """A linear layer that stays as it is, and a trained change of rank RANK."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, state: Tensor) -> Tensor:
        """Both have the shape (batch, context, WIDTH)."""
        return self.linear(state) + self.up(self.down(state))

    def merged(self) -> nn.Linear:
        """One linear layer that does the same."""
        with torch.no_grad():
            self.linear.weight += self.up.weight @ self.down.weight
        return self.linear


def text(part: str) -> Iterator[Tensor]:
    """Batches of Python's sources: files of the standard library, or of one of its folders."""
    files = sorted(Path(sysconfig.get_path("stdlib"), part).glob("*.py"))
    raw = b"".join(file.read_bytes() for file in files[:60])
    every = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    while True:
        begins = torch.randint(0, len(every) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([every[begin : begin + CONTEXT] for begin in begins])


def train(
    parameters: Iterable[nn.Parameter], loss: Callable[[Tensor], Tensor], part: str, steps: int, rate: float
) -> None:
    """Train on so many batches."""
    optimizer = torch.optim.AdamW([each for each in parameters if each.requires_grad], lr=rate)
    for tokens in itertools.islice(text(part), steps):
        optimizer.zero_grad()
        loss(tokens).backward()
        optimizer.step()


def save(model: nn.Module, path: Path) -> None:
    """Store a model in bfloat16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path)
    print(f"wrote {path}: {len(tensors)} tensors, {path.stat().st_size / 2**20:.1f} MiB")


def copy(model: Model) -> Model:
    """The same model, to be trained further."""
    other = Model()
    other.load_state_dict(model.state_dict())
    return other


def main() -> None:
    """Train and write all four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("family"))
    parser.add_argument("--steps", type=int, default=12, help="of each training [default: 12]")
    options = parser.parse_args()
    torch.manual_seed(0)

    base = Model()
    train(base.parameters(), base.loss, ".", options.steps, 3e-4)
    save(base, options.folder / "base" / "model.safetensors")

    adapted = copy(base).requires_grad_(False)
    for layer in adapted.layers:
        for name in ATTENDED:
            setattr(layer, name, LowRank(getattr(layer, name)))
    train(adapted.parameters(), adapted.loss, "asyncio", options.steps, 1e-3)
    for layer in adapted.layers:
        for name in ATTENDED:
            setattr(layer, name, getattr(layer, name).merged())
    save(adapted, options.folder / "adapter-merged" / "model.safetensors")

    tuned = copy(base)
    train(tuned.parameters(), tuned.loss, "asyncio", options.steps, 1e-5)
    save(tuned, options.folder / "fine-tune" / "model.safetensors")

    encoder = base.requires_grad_(False)
    denoiser = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def denoising(tokens: Tensor) -> Tensor:
        state = encoder.encode(tokens)
        noise = torch.randn_like(state)
        return functional.mse_loss(denoiser(state + noise), noise)

    train(denoiser.parameters(), denoising, "asyncio", options.steps, 3e-4)
    pipeline = options.folder / "pipeline"
    save(encoder, pipeline / "text_encoder" / "model.safetensors")
    save(denoiser, pipeline / "denoiser" / "diffusion_pytorch_model.safetensors")
    parts = {"text_encoder": ["transformers", "Encoder"], "denoiser": ["diffusers", "Denoiser"]}
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **parts}))


if __name__ == "__main__":
    main()
