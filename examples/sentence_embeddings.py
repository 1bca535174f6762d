"""sentence-transformers, unmodified: after `install()` its models come from shared memory.

    weightd serve & python examples/sentence_embeddings.py [--device cuda:0] [REFERENCE]

REFERENCE is a directory or org/name in the local Hugging Face cache; MiniLM, which `make demo` installs, if left out.
"""

from __future__ import annotations

import argparse

from _minilm import SENTENCES, package_folder

from weightd.integrations.transformers import install, report

install()  # before anything is loaded; it does not matter when sentence-transformers is imported

from sentence_transformers import SentenceTransformer  # noqa: E402


def main() -> None:
    """Embed sentences, and print how close they are to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", nargs="?", default=package_folder())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    encoder = SentenceTransformer(
        str(options.reference), device=options.device, model_kwargs={"device_map": options.device}
    )
    vectors = encoder.encode(SENTENCES, convert_to_tensor=True, normalize_embeddings=True)
    for sentence, closeness in zip(SENTENCES, (vectors @ vectors[0]).tolist(), strict=True):
        print(f"{closeness:7.4f}  {sentence}")
    print(report(encoder[0].auto_model))


if __name__ == "__main__":
    main()
