"""Select the files that a framework loads from a folder, by the framework's own rule; the folder may contain others."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from weightd._references import folders
from weightd._references.files import ReferencedFile, in_order
from weightd._references.survey import checkpoints_below
from weightd.errors import InvalidReferenceError
from weightd.resolve import Resolved, is_path, reference_name

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


def of_transformers(
    folder: Path, component: str = "", variant: str | None = None, *, exact: bool = False
) -> tuple[ReferencedFile, ...]:
    """What transformers loads: the one file, else the shards of the index, of a variant where one is given.

    Without a variant, where the folder has weights of one variant only, that is taken, and a warning says so; with
    `exact` it is not, as transformers does not.
    Errors: NotFoundError, FormatError (a damaged index), InvalidReferenceError (there are only variants, and several).
    """
    return _of(folders.TRANSFORMERS, folder, component, variant, exact=exact)


def of_diffusers(
    folder: Path, component: str = "", variant: str | None = None, *, exact: bool = False
) -> tuple[ReferencedFile, ...]:
    """What diffusers loads: the shards of the index, else the one file. The rest is as in `of_transformers`."""
    return _of(folders.DIFFUSERS, folder, component, variant, exact=exact)


def at_revision(reference: str | os.PathLike[str], revision: str | None) -> str | os.PathLike[str]:
    """A reference with the `revision=` that a framework was given, which means nothing for a folder.

    Errors: InvalidReferenceError (it names another one itself).
    """
    if not revision or is_path(reference):
        return reference
    name, _, own = os.fspath(reference).partition("@")
    if own not in ("", revision):
        raise InvalidReferenceError(f"{os.fspath(reference)}: revision {revision!r} is asked for as well; say one")
    return f"{name}@{revision}"


def named(
    reference: str | os.PathLike[str], subfolder: str, files: tuple[ReferencedFile, ...], variant: str | None = None
) -> Resolved:
    """Files as a checkpoint that bears the name of a reference, and of the variant asked for, as it would elsewhere."""
    name = reference_name(reference, variant)
    return Resolved(f"{name}/{subfolder}" if subfolder else name, in_order(files))


def _of(
    rule: folders.ReferenceRule, folder: Path, component: str, variant: str | None, *, exact: bool
) -> tuple[ReferencedFile, ...]:
    chosen = folders.weights_name(folder, rule, variant)
    if chosen is None and variant is None and not exact:
        only = folders.only_variant(folder, rule)
        chosen = folders.weights_name(folder, rule, only) if only else None
        if only and chosen:
            log.warning("%s", folders.variant_note(folder, only))
    if chosen is None:
        raise folders.not_there(folder, rule, variant, "" if exact else checkpoints_below(folder))
    return folders.sources_of(folder, component, chosen)
