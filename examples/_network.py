"""The network that the recipes for servers serve: tokens to scores, as deep as its checkpoint.

    python examples/_network.py CHECKPOINT [DEPTH]

writes a checkpoint with random weights: 16 MiB for each layer, 16 layers if DEPTH is left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    import weightd

WIDTH, TOKENS, CLASSES = 2048, 256, 8


class Network(nn.Module):
    """Classify texts: the mean of the tokens' embeddings goes through `depth` layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores, shape (texts, CLASSES), of token numbers, shape (texts, tokens)."""
        hidden = self.embed(tokens).mean(1)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        return self.head(hidden)


def attached(attachment: weightd.Attachment) -> Network:
    """The network on attached tensors: none of them is copied."""
    names = {key.name for key in attachment.tensors}
    depth = sum(name.startswith("layers.") and name.endswith(".weight") for name in names)
    with torch.device("meta"):  # without memory: load_into replaces every parameter
        network = Network(depth)
    attachment.load_into(network)
    return network.eval()


def tokens_of(text: str) -> torch.Tensor:
    """Token numbers of one text, shape (1, tokens): its bytes. Errors: ValueError (empty)."""
    if not text:
        raise ValueError("the text is empty")
    return torch.tensor([list(text.encode())])


def write(path: Path, depth: int) -> None:
    """Write a checkpoint of `depth` layers; its bytes are the same each time."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Network(depth).state_dict().items()}
    # The variance with which layers keep the size of what goes through them.
    save_file({name: torch.randn(shape) * (2 / WIDTH) ** 0.5 for name, shape in shapes.items()}, path)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16)
