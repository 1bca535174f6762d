"""Plain torch: a module made without memory gets attached tensors for its parameters.

    weightd serve & python examples/torch_module.py [--device cuda:0]

A second process that runs this shares the memory with the first: `weightd ps` shows both.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import weightd


def network() -> nn.Module:
    """Some network."""
    return nn.Sequential(nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 10))


def main() -> None:
    """Save a network, put it together again from shared memory, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    trained = network().eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_file(trained.state_dict(), path)
        with torch.device("meta"):
            module = network().eval()
        with weightd.connect() as client, client.attach(path, device=device) as attachment:
            attachment.load_into(module)  # parameters are shared, the norm's running means are private copies
    images = torch.rand(4, 512)
    equal = torch.allclose(module(images.to(device)).cpu(), trained(images), atol=1e-5)
    print(f"{sum(p.nbytes for p in module.parameters())} bytes of parameters on shared memory; outputs equal: {equal}")


if __name__ == "__main__":
    main()
