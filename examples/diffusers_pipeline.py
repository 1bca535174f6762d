"""Diffusers: pipelines on shared memory; what several of them have in common is in memory once.

    weightd serve & python examples/diffusers_pipeline.py [--device cuda:0] REFERENCE...

Each REFERENCE is a pipeline's directory, or org/name in the local Hugging Face cache.
"""

from __future__ import annotations

import argparse

import weightd
from weightd.integrations.diffusers import from_pretrained, report


def main() -> None:
    """Load pipelines, and say what they share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("references", nargs="+", metavar="REFERENCE")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    pipelines = {reference: from_pretrained(reference, device=options.device) for reference in options.references}
    for reference, pipeline in pipelines.items():
        print(f"{reference}: {type(pipeline).__name__}: {report(pipeline)}")
    with weightd.connect() as client:
        stats = client.stats()
    print(
        f"all checkpoints: {stats.logical_bytes} bytes, in memory {stats.resident_bytes}, saved {stats.saved_ratio:.1%}"
    )


if __name__ == "__main__":
    main()
