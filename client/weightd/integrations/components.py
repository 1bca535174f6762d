"""Select the components of a diffusers pipeline that come from shared memory: the class and the files of each.

An index is not trusted: what it lists is a component only where the pipeline's class takes one of that name.
diffusers.py imports this module once it has checked the version of diffusers.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.pipelines import pipeline_loading_utils

from weightd._references.folders import read_json
from weightd._references.index import is_below
from weightd.errors import FormatError, InvalidReferenceError, NotFoundError

from . import weight_files

if TYPE_CHECKING:
    from pathlib import Path

    from weightd._references.files import ReferencedFile

log = logging.getLogger(__name__)

_rules: Any = pipeline_loading_utils  # Any: it has no types

_INDEX = "model_index.json"
_CONFIG = "config.json"
_WEIGHTS = "*.safetensors"


class _Part(NamedTuple):
    """A component that comes from shared memory: its class, and the files of its weights."""

    cls: Any
    files: tuple[ReferencedFile, ...]


class _NotOursError(Exception):
    """Why a component is left to diffusers."""


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a pipeline's."""
    return (folder / _INDEX).is_file()


def of_pipeline(folder: Path, given: dict[str, Any], variant: str | None) -> dict[str, _Part]:
    """A pipeline's components that come from shared memory: those with weights, and not `given`.

    Errors: NotFoundError (its folder is missing, or no component has the variant), FormatError, InvalidReferenceError.
    """
    index = _read_json(folder / _INDEX)
    cls = _pipeline_class(folder, index, given)
    taken, _ = cls._get_signature_keys(cls)
    variants = _variants(folder, variant, index)
    found: dict[str, _Part] = {}
    for name, value in index.items():
        if name.startswith("_") or name in given or not isinstance(value, list) or len(value) != 2 or value[0] is None:
            continue
        if not is_below(name):
            raise FormatError(
                f"{folder / _INDEX}: component {name[:200]!r} leads out of the folder; the file is not trusted"
            )
        if name not in taken:  # diffusers ignores it; as an argument it could be one of `from_pretrained`'s own
            log.info("%s: %r is no component of this pipeline, and is not loaded", folder, name[:200])
            continue
        try:
            part = _component(folder, name, value, variants.get(name), exact=variant is not None)
        except _NotOursError as error:
            why = str(error)  # a record that kept the error would keep frames, and what is loaded in them
            log.warning("%s: component %s is left to diffusers and shares no memory: %s", folder, name, why)
            continue
        if part is not None:
            found[name] = part
    return found


def of_model(folder: Path, variant: str | None) -> _Part:
    """A single model. Errors: NotFoundError, FormatError, InvalidReferenceError."""
    if not (folder / _CONFIG).is_file():
        raise NotFoundError(f"{folder}: has neither {_INDEX} nor {_CONFIG}; give the folder of a pipeline or a model")
    config = _read_json(folder / _CONFIG)
    name = config.get("_class_name")
    if name is None and "model_type" in config:
        raise InvalidReferenceError(
            f"{folder}: a model of transformers; load it with weightd.integrations.transformers"
        )
    try:
        cls = _class_named(folder, "diffusers", name)
    except _NotOursError as error:
        raise FormatError(f"{folder / _CONFIG}: {error}") from error
    if not issubclass(cls, diffusers.ModelMixin):
        raise FormatError(f"{folder / _CONFIG}: names {cls.__name__}, which is no model of diffusers")
    if config.get("quantization_config"):
        raise InvalidReferenceError(f"{folder}: it is quantised, which is not supported; load it with diffusers itself")
    return _Part(cls, weight_files.of_diffusers(folder, "", variant))


def _pipeline_class(folder: Path, index: dict[str, Any], given: dict[str, Any]) -> Any:
    """The pipeline's class, as diffusers tells; code of its own runs where the caller consents, as diffusers has it.

    Errors: FormatError (the index names no pipeline), and what diffusers raises without consent.
    """
    base: Any = diffusers.DiffusionPipeline  # Any: it has no types
    named = index.get("_class_name")
    found = None
    if isinstance(named, str) or (isinstance(named, list) and len(named) == 2):
        code, name = _rules._resolve_custom_pipeline_and_cls(folder, index, given.get("custom_pipeline"))
        known = inspect.signature(_rules._get_pipeline_class).parameters  # older versions do not ask for consent
        asked = ("load_connected_pipeline", "trust_remote_code")
        options = {option: given[option] for option in asked if option in given and option in known}
        if code is not None or (named and isinstance(named, str) and hasattr(diffusers, named)):
            found = _rules._get_pipeline_class(
                base,
                config=index,
                custom_pipeline=code,
                class_name=name,
                revision=given.get("custom_revision"),
                **options,
            )
    if not isinstance(found, type) or not issubclass(found, base):
        raise FormatError(
            f"{folder / _INDEX}: names {str(named)[:200]!r}, which is no pipeline of diffusers {diffusers.__version__}"
        )
    return found


def _component(folder: Path, name: str, value: list[Any], variant: str | None, *, exact: bool) -> _Part | None:
    """One component; None where it has no weights. With `exact` no variant is taken that nobody has asked for.

    Errors: _NotOursError, and those of `of_pipeline`.
    """
    place = folder / name
    cls = _class_named(place, *value)
    if not issubclass(cls, torch.nn.Module):
        if any(place.glob(_WEIGHTS)):
            raise _NotOursError(f"{cls.__name__} is no module of torch")
        return None
    if not place.is_dir():
        raise NotFoundError(f"{folder / _INDEX}: lists component {name!r}, but there is no such folder beside it")
    if not issubclass(cls, transformers.PreTrainedModel | diffusers.ModelMixin):
        raise _NotOursError(f"{cls.__name__} is a model of neither transformers nor diffusers")
    if not any(place.glob(_WEIGHTS)):
        raise _NotOursError(f"{place} holds no {_WEIGHTS}")
    if (place / _CONFIG).is_file() and _read_json(place / _CONFIG).get("quantization_config"):
        raise _NotOursError("it is quantised")
    return _Part(cls, _files_of(cls)(place, name, variant, exact=exact))


def _variants(folder: Path, variant: str | None, index: dict[str, Any]) -> dict[str, str]:
    """The variant of each component that has it, as diffusers tells. Errors: NotFoundError."""
    if variant is None:
        return {}
    found: dict[str, str] = _rules._identify_model_variants(folder, variant, index)
    if not found:
        raise NotFoundError(f"{folder}: no component has weights of variant {variant!r}")
    return found


def _files_of(cls: Any) -> Any:
    """The rule by which a component's files are chosen."""
    return weight_files.of_transformers if issubclass(cls, transformers.PreTrainedModel) else weight_files.of_diffusers


def _class_named(folder: Path, library: Any, name: Any) -> Any:
    """The class that a component in a folder has, as diffusers tells. Nothing is imported because an index names it.

    Errors: _NotOursError (it is no class of diffusers or transformers).
    """
    known = isinstance(library, str) and isinstance(name, str)
    in_pipelines = known and hasattr(diffusers.pipelines, library)
    if known and not in_pipelines and (folder / f"{library}.py").exists():
        raise _NotOursError(f"{library}.{name} is code of its own")
    found = None
    if in_pipelines or library in ("diffusers", "transformers"):
        with contextlib.suppress(AttributeError):  # there is none of that name
            found = _rules.simple_get_class_obj(library, name)
    if not isinstance(found, type):
        raise _NotOursError(f"class {name!r} of {library!r} is none that diffusers {diffusers.__version__} has")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object that nobody vouches for. Errors: FormatError, NotFoundError, PermissionDeniedError."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise FormatError(f"{path}: not a JSON object; download it again")
    return document
