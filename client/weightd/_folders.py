"""Which files of one folder are its weights, by the rules of the frameworks that wrote them."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from ._files import show, translated
from .errors import InvalidReferenceError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


_SHARD: Final = re.compile(r"-[0-9]+-of-[0-9]+$")


class Rule(NamedTuple):
    """What one framework calls its weights, and whether it looks for their index before the single file."""

    weights: str
    index_first: bool

    def names(self, variant: str | None) -> tuple[str, ...]:
        """The names that it looks for, the first one that is there wins."""
        one, index = _with_variant(self.weights, variant), _with_variant(f"{self.weights}.index.json", variant)
        if not self.index_first:
            return one, index
        # Versions of diffusers before 0.32 put an index's variant elsewhere, and later ones still read it.
        return index, *([f"{self.weights}.{variant}.index.json"] if variant else []), one


TRANSFORMERS: Final = Rule("model.safetensors", index_first=False)
DIFFUSERS: Final = Rule("diffusion_pytorch_model.safetensors", index_first=True)


def weights_name(folder: Path, rule: Rule, variant: str | None) -> str | None:
    """The file or the index that a framework loads from a folder; None where it finds neither."""
    return next((name for name in rule.names(variant) if os.path.isfile(folder / name)), None)


def only_variant(folder: Path, rule: Rule) -> str | None:
    """The variant of which alone a folder has weights; None where it has none.

    Errors: InvalidReferenceError (several variants), PermissionDeniedError, NotFoundError (no such folder).
    """
    stem, suffix = map(re.escape, os.path.splitext(rule.weights))
    pattern = re.compile(rf"{stem}\.(?P<one>.+){suffix}|{stem}{suffix}\.index\.(?P<index>.+)\.json")
    try:
        matches = map(pattern.fullmatch, os.listdir(folder))
    except OSError as error:
        raise translated(folder, error) from error
    variants = {match["one"] or match["index"] for match in matches if match}
    found = sorted(variant for variant in variants if not _SHARD.search(variant))
    if len(found) > 1:
        raise InvalidReferenceError(
            f"{show(folder)}: has {rule.weights} only as variants ({', '.join(map(show, found[:10]))}); say which"
        )
    return found[0] if found else None


def not_there(folder: Path, rule: Rule, variant: str | None) -> NotFoundError:
    """The error where a folder has no weights of a variant."""
    one, *_, index = sorted(rule.names(variant), key=len)
    kind = f" of variant {variant}" if variant else ""
    return NotFoundError(f"{show(folder)}: has neither {one} nor {index}, the weights{kind} that would be loaded")


def _with_variant(name: str, variant: str | None) -> str:
    """`model.fp16.safetensors`, `model.safetensors.index.fp16.json`."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}.{variant}{suffix}" if variant else name
