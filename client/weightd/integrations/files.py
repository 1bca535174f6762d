"""Which files of a folder a framework loads, by its own rule: there may be much else, such as other checkpoints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from weightd._files import SourcePath
from weightd.errors import NotFoundError
from weightd.resolve import Resolved, indexed_files, is_path, reference_name

if TYPE_CHECKING:
    from pathlib import Path

_TRANSFORMERS = "model.safetensors"
_DIFFUSERS = "diffusion_pytorch_model.safetensors"


def of_transformers(folder: Path, component: str = "") -> tuple[SourcePath, ...]:
    """The one file, else the shards of the index. Errors: NotFoundError, FormatError (a damaged index)."""
    if (folder / _TRANSFORMERS).exists():
        return (SourcePath(component, _TRANSFORMERS, folder / _TRANSFORMERS),)
    return _indexed(folder, component, _TRANSFORMERS)


def of_diffusers(folder: Path, component: str = "") -> tuple[SourcePath, ...]:
    """The shards of the index, else the one file. Errors: as of_transformers."""
    if (folder / f"{_DIFFUSERS}.index.json").exists() or not (folder / _DIFFUSERS).exists():
        return _indexed(folder, component, _DIFFUSERS)
    return (SourcePath(component, _DIFFUSERS, folder / _DIFFUSERS),)


def named(reference: str | os.PathLike[str], subfolder: str, files: tuple[SourcePath, ...]) -> Resolved:
    """Files as a checkpoint that bears the name of a reference, as it would elsewhere."""
    name = reference_name(reference) if is_path(reference) else os.fspath(reference)
    return Resolved(f"{name}/{subfolder}" if subfolder else name, tuple(sorted(files)))


def _indexed(folder: Path, component: str, weights: str) -> tuple[SourcePath, ...]:
    index = f"{weights}.index.json"
    if not (folder / index).exists():
        raise NotFoundError(f"{folder}: has neither {weights} nor {index}, which is what is loaded of it")
    return tuple(SourcePath(component, name, folder / name) for name in indexed_files(folder, index))
