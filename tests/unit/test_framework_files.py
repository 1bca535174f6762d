"""Which files of a folder transformers and diffusers load (weightd.integrations.weight_files)."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from weightd.errors import InvalidReferenceError, NotFoundError
from weightd.integrations.weight_files import named, of_diffusers, of_transformers
from weightd.resolve import resolve

if TYPE_CHECKING:
    from pathlib import Path

RULES = [(of_transformers, "model"), (of_diffusers, "diffusion_pytorch_model")]
both = pytest.mark.parametrize(("of", "stem"), RULES, ids=["transformers", "diffusers"])


def put(folder: Path, *names: str) -> None:
    for name in names:
        shards = {"a": name.replace(".safetensors.index", "").replace(".json", "-1-of-1.safetensors")}
        text = json.dumps({"weight_map": shards}) if name.endswith(".json") else ""
        (folder / name).write_text(text)
        if name.endswith(".json"):
            (folder / shards["a"]).touch()


def file_names(sources: tuple[Any, ...]) -> list[str]:
    return [source.file for source in sources if not source.is_index]


@both
def test_one_file_and_index(of: Any, stem: str, tmp_path: Path) -> None:
    put(tmp_path, f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors", "consolidated.safetensors")
    assert file_names(of(tmp_path)) == [f"{stem}-1-of-1.safetensors"]
    put(tmp_path, f"{stem}.safetensors")
    wins = f"{stem}.safetensors" if of is of_transformers else f"{stem}-1-of-1.safetensors"
    assert file_names(of(tmp_path)) == [wins]


@both
def test_variant(of: Any, stem: str, tmp_path: Path) -> None:
    put(tmp_path, f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.bf16.json")
    assert file_names(of(tmp_path, variant="fp16")) == [f"{stem}.fp16.safetensors"]
    assert file_names(of(tmp_path, variant="bf16")) == [f"{stem}.bf16-1-of-1.safetensors"]
    with pytest.raises(NotFoundError, match=rf"{stem}\.q4\.safetensors"):
        of(tmp_path, variant="q4")


@both
def test_only_variant_is_taken_and_said(of: Any, stem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json")
    chosen = of(tmp_path, "unet")
    assert file_names(chosen) == file_names(of(tmp_path, "unet", "fp16"))
    assert {component for component, *_ in chosen} == {"unet"}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "has weights of the variant fp16 only, which are taken" in caplog.text
    with pytest.raises(NotFoundError, match="has neither"):  # as the framework has it
        of(tmp_path, exact=True)
    put(tmp_path, f"{stem}.bf16.safetensors")
    with pytest.raises(InvalidReferenceError, match=r"only as variants \(bf16, fp16\)"):
        of(tmp_path)


@both
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_load_takes_the_same(of: Any, stem: str, index: bool, variant: str | None, tmp_path: Path) -> None:
    """So that what `weightd load` has made resident is not read once more."""
    for one in ("", ".fp16"):
        put(tmp_path, f"{stem}.safetensors.index{one}.json" if index else f"{stem}{one}.safetensors")
    put(tmp_path, "consolidated.safetensors")
    chosen = named(tmp_path, "", of(tmp_path, variant=variant), variant)
    loaded = resolve(tmp_path, variant)
    assert (chosen.name, chosen.sources) == (loaded.name, loaded.sources)
    assert [source.is_index for source in chosen.sources] == [False, True][: 1 + index]


@both
def test_nothing(of: Any, stem: str, tmp_path: Path) -> None:
    put(tmp_path, "other.safetensors")
    (tmp_path / "checkpoint-500").mkdir()
    put(tmp_path / "checkpoint-500", f"{stem}.safetensors")
    with pytest.raises(NotFoundError, match=f"one checkpoint lies below it; give it, as {tmp_path}/checkpoint-500$"):
        of(tmp_path)
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(NotFoundError):
            of(folder)
