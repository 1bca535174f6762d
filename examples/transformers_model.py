"""transformers: one changed import, and a model computes on shared memory.

    weightd serve & python examples/transformers_model.py [--device cuda:0] [REFERENCE]

REFERENCE is a directory or org/name in the local Hugging Face cache; MiniLM, which `make demo` installs, if left out.
"""

from __future__ import annotations

import argparse

import torch
from _minilm import package_folder

from weightd.integrations.transformers import from_pretrained, report


def main() -> None:
    """Load a model, run it once, and say what of it is shared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", nargs="?", default=package_folder())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = from_pretrained(options.reference, device=options.device)
    ids = torch.arange(100, 116, device=model.device)[None]
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    print(f"{type(model).__name__}: {report(model)}")
    print(f"output of shape {tuple(output.shape)}")


if __name__ == "__main__":
    main()
