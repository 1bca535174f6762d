"""An engine as vLLM and SGLang are, in what is awkward about them; torch only.

It fuses stored tensors, casts, transposes, pads and ties them; it takes views of parameters before they are loaded,
keeps them in objects that are no modules, and writes in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

SIZE = 64
EXPERTS = 4


def checkpoint(seed: int = 0) -> dict[str, torch.Tensor]:
    """Stored tensors of one layer: the engine's `load_weights` takes all of them."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    square = {name: values(SIZE, SIZE) for name in ("cast", "transposed", "padded", "z", "x", "y", "in_place", "plain")}
    return {
        **{f"self_attn.{part}_proj.weight": values(SIZE, SIZE) for part in "qkv"},
        **{
            f"mlp.experts.{number}.{part}_proj.weight": values(SIZE, SIZE)
            for number in range(EXPERTS)
            for part in ("gate", "up")
        },
        **square,
        "captured": values(4 * SIZE),
        "embed": values(2 * SIZE, SIZE),
        "norm": values(SIZE),
        "running": values(SIZE),
        "twice": values(SIZE, SIZE),
    }


class Weight(nn.Parameter):
    """A parameter of a class of its own, with a loader, as vLLM's."""

    loader: object


class Router:
    """No module, and holds a parameter."""

    def __init__(self, bias: torch.Tensor) -> None:
        self.bias = bias


class Engine(nn.Module):
    """One layer. Nothing of it knows weightd."""

    running: torch.Tensor
    cos: torch.Tensor

    def __init__(self) -> None:
        super().__init__()

        def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Weight:
            made = Weight(torch.empty(*shape, dtype=dtype), requires_grad=False)
            made.loader = self
            return made

        self.qkv = weight(3 * SIZE, SIZE)
        self.experts = weight(EXPERTS, 2 * SIZE, SIZE)
        self.cast = weight(SIZE, SIZE, dtype=torch.float32)
        self.transposed = weight(SIZE, SIZE)
        self.padded = weight(SIZE + 8, SIZE)
        self.apart = weight(3 * SIZE, SIZE)
        self.in_place = weight(SIZE, SIZE)
        self.captured = weight(4 * SIZE)
        self.router = Router(self.captured)
        self.embed = weight(2 * SIZE, SIZE)
        self.head = self.embed
        self.norm = nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16), requires_grad=False)
        self.lonely = weight(SIZE)
        self.twice = weight(SIZE, SIZE)
        self.first_rows = self.qkv.data[:SIZE]  # a view, taken before there is anything to see
        self.plain = torch.empty(SIZE, SIZE, dtype=torch.bfloat16)  # neither parameter nor buffer
        self.scratch = torch.empty(16)
        self.like = torch.empty_like(self.qkv)
        self.register_buffer("cos", torch.arange(8.0).cos())
        self.register_buffer("running", torch.empty(SIZE, dtype=torch.bfloat16))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy slices, as engines do."""
        for name, stored in weights:
            part = name.rpartition(".weight")[0].rpartition(".")[2]
            if name.startswith("self_attn"):
                self.qkv.data.narrow(0, "qkv".index(part[0]) * SIZE, SIZE).copy_(stored)
            elif name.startswith("mlp.experts"):
                half = ("gate_proj", "up_proj").index(part)
                self.experts.data[int(name.split(".")[2])].narrow(0, half * SIZE, SIZE).copy_(stored)
            elif name == "transposed":
                self.transposed.data.copy_(stored.t())
            elif name == "padded":
                self.padded.data[:SIZE].copy_(stored)
                self.padded.data[SIZE:].fill_(0)
            elif name in ("x", "y", "z"):
                self.apart.data.narrow(0, "zxy".index(name) * SIZE, SIZE).copy_(stored)
            elif name == "in_place":
                self.in_place.data.copy_(stored)
                self.in_place.data.mul_(2)
            elif name == "embed":  # as a vocabulary that needs no padding
                self.embed.data[: len(stored)].copy_(stored)
                self.embed.data[len(stored) :].fill_(0)
            elif name == "twice":
                self.twice.data.copy_(stored)
                self.twice.data.copy_(stored.to(self.twice.device))
            else:
                getattr(self, name).data.copy_(stored)

    def post_process(self, writes: bool = False) -> None:
        """What engines do to loaded weights; with `writes` as some quantised layers do, in place."""
        self.experts.data.copy_(self.experts.data)
        self.transposed.data = self.transposed.data.t().contiguous()
        if writes:
            self.qkv.data[:4] = self.qkv.data[:4] * 2

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Uses every parameter, so that one that is wrong is seen."""
        q, k, v = (hidden @ self.qkv.t()).chunk(3, dim=-1)
        for gate, up in (half.split(SIZE) for half in self.experts):
            hidden = hidden + (hidden @ gate.t()) * (hidden @ up.t())
        hidden = hidden + q + k + v + hidden @ self.cast.bfloat16() + hidden @ self.transposed + hidden @ self.twice
        hidden = hidden + hidden @ self.padded[:SIZE] + (hidden @ self.apart.t())[..., :SIZE] + hidden @ self.in_place
        hidden = hidden * self.norm + self.running + self.router.bias[:SIZE] + hidden @ self.first_rows + self.plain[0]
        return hidden @ self.head.t()


def own_load(stored: Mapping[str, torch.Tensor]) -> Engine:
    """The engine as it loads by itself."""
    engine = Engine()
    for tensor in (engine.lonely, engine.scratch, engine.like):
        tensor.data.zero_()  # what nothing is loaded into is whatever memory held
    engine.load_weights(stored.items())
    return engine
