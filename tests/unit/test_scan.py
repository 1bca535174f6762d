"""Finding the checkpoints below folders: each its own, what is skipped with its reason, and an end to every circle."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support import checkpoints, gguf_files
from weightd import scan as scanning
from weightd.errors import InvalidReferenceError, NotFoundError
from weightd.scan import scan

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


def model(folder: Path, name: str = "model.safetensors") -> Path:
    """A folder with one small checkpoint file."""
    checkpoints.write(folder / name, {"t": ("U8", (4,), b"abcd")})
    return folder


def gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_files.whole({"t": (0, (4,), bytes(16))}))
    return path


def found(*folders: Path) -> list[str]:
    """Names of what is found, relative to the first folder where they are paths below it."""
    return [one.name.removeprefix(f"{folders[0]}/") for one in scan(folders).found]


def skipped(folder: Path) -> dict[str, str]:
    return {skip.path.removeprefix(f"{folder}/"): skip.reason for skip in scan([folder]).skipped}


def test_each_kind_of_checkpoint_is_one(tmp_path: Path) -> None:
    model(tmp_path / "b" / "deep" / "er")
    model(tmp_path / "a")
    model(tmp_path / "sharded", "model-1-of-2.safetensors")
    checkpoints.write(tmp_path / "sharded" / "model-2-of-2.safetensors", {"u": ("U8", (1,), b"x")})
    model(tmp_path / "pipe" / "unet", "diffusion_pytorch_model.safetensors")
    model(tmp_path / "pipe" / "vae", "diffusion_pytorch_model.safetensors")
    checkpoints.describe_pipeline(tmp_path / "pipe")
    gguf(tmp_path / "quantised" / "q4.gguf")
    (tmp_path / "empty").mkdir()
    model(tmp_path / ".hidden")
    result = scan([tmp_path])
    assert [one.name for one in result.found] == [
        f"{tmp_path}/{name}" for name in ("a", "b/deep/er", "pipe", "quantised", "sharded")
    ]
    assert result.skipped == []
    assert [source.component for source in result.found[2].sources] == ["unet", "vae"]


def test_a_run_of_training_and_its_steps_are_checkpoints_each(tmp_path: Path) -> None:
    model(tmp_path / "run")
    model(tmp_path / "run" / "checkpoint-500")
    (tmp_path / "run" / "checkpoint-500" / "optimizer.pt").write_bytes(b"pickle")
    assert found(tmp_path) == ["run", "run/checkpoint-500"]
    assert skipped(tmp_path) == {}


def test_files_side_by_side_are_checkpoints_each(tmp_path: Path) -> None:
    model(tmp_path, "base.safetensors")
    model(tmp_path, "tuned.safetensors")
    gguf(tmp_path / "quants" / "q4.gguf")
    gguf(tmp_path / "quants" / "q8.gguf")
    gguf_files.split(tmp_path / "quants", "split", [{"t": (0, (4,), bytes(16))}, {"u": (0, (4,), bytes(16))}])
    assert found(tmp_path) == [
        "base.safetensors", "tuned.safetensors", "quants/q4.gguf", "quants/q8.gguf", "quants/split-00001-of-00002.gguf",
    ]  # fmt: skip


def test_files_beside_what_a_folder_is_loaded_from(tmp_path: Path) -> None:
    model(tmp_path / "m")
    model(tmp_path / "m", "model.fp16.safetensors")
    gguf(tmp_path / "m" / "model-q4.gguf")
    assert found(tmp_path) == ["m", "m/model-q4.gguf"]
    assert skipped(tmp_path) == {"m/model.fp16.safetensors": f"is not among the files that {tmp_path}/m is loaded from"}


def test_what_cannot_be_a_checkpoint_is_skipped_with_its_reason(tmp_path: Path) -> None:
    model(tmp_path / "good")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    model(tmp_path / "part", "model-1-of-2.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors.index.json").write_text("{")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text('{"unet": ["diffusers", "UNet"]}')
    model(tmp_path / os.fsdecode(b"not-\xff-utf8"))
    reasons = skipped(tmp_path)
    assert found(tmp_path) == ["good"]
    assert any("not valid UTF-8; rename it" in reason for reason in reasons.values())
    for path, reason in (
        ("pickled/pytorch_model.bin", "a pickle, which can run code"),
        ("part", "shard 2 of 2 is missing"),
        ("broken", "not valid JSON"),
        ("pipe", "lists component 'unet', but there is no such folder"),
    ):
        assert reason in reasons[path], reasons


def test_links_in_a_circle_and_two_ways_to_a_folder(tmp_path: Path) -> None:
    model(tmp_path / "models" / "v3")
    (tmp_path / "models" / "current").symlink_to("v3")
    (tmp_path / "models" / "v3" / "up").symlink_to(tmp_path / "models")
    (tmp_path / "models" / "self").symlink_to("self")
    assert found(tmp_path) == ["models/v3"], "under its own name, though the link comes first"
    assert skipped(tmp_path) == {
        "models/current": f"is the same folder as {tmp_path}/models/v3",
        "models/v3/up": f"is the same folder as {tmp_path}/models",
    }
    assert found(tmp_path / "models", tmp_path, tmp_path / "models" / "v3") == ["v3"], "whichever is given"


def test_a_folder_outside_is_reached_by_a_link(tmp_path: Path) -> None:
    model(tmp_path / "store" / "m")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m").symlink_to(tmp_path / "store" / "m")
    assert found(tmp_path / "models") == ["m"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)  # its word would count
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def repository(hub: Path, name: str, *commits: str) -> Path:
    folder = hub / f"models--{name.replace('/', '--')}"
    for commit in commits:
        model(folder / "snapshots" / commit)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commits[0] if commits else COMMIT)
    return folder


def test_the_cache_is_scanned_by_repository_and_revision(hub: Path) -> None:
    repository(hub, "org/name", COMMIT, OTHER)
    model(repository(hub, "org/several", COMMIT) / "snapshots" / COMMIT / "onnx" / "below", "other.safetensors")
    repository(hub, "org/gone").joinpath("snapshots").mkdir()
    model(hub / "datasets--org--data" / "snapshots" / COMMIT)
    (repository(hub, "org/tokens") / "snapshots" / COMMIT).mkdir(parents=True)
    result = scan()
    assert [one.name for one in result.found] == ["org/name", f"org/name@{OTHER}", "org/several"]
    assert {Path(skip.path).name: skip.reason for skip in result.skipped} == {
        "datasets--org--data": "is a dataset or a space of the Hugging Face cache, not a model",
        "models--org--gone": "has no snapshot; download the repository again",
    }
    assert [one.name for one in scan([hub.parent]).found] == [one.name for one in result.found], "from above as well"


def test_a_repository_with_several_files_is_each_of_them(hub: Path) -> None:
    folder = repository(hub, "org/quants", COMMIT) / "snapshots" / COMMIT
    (folder / "model.safetensors").unlink()
    for name in ("q4", "q8"):
        gguf(folder / f"{name}.gguf")
    assert [one.name for one in scan().found] == [str(folder / f"{name}.gguf") for name in ("q4", "q8")]


def test_a_folder_of_a_repositorys_name_does_not_stand_for_it(hub: Path, tmp_path: Path) -> None:
    folder = repository(hub, "org/name", COMMIT)
    model(tmp_path / "org" / "name")
    assert [one.name for one in scan().found] == [str(folder / "snapshots" / COMMIT)]


def test_roots_must_be_folders(tmp_path: Path, hub: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no Hugging Face cache; give the folders to scan"):
        scan()
    with pytest.raises(NotFoundError):
        scan([tmp_path / "missing"])
    with pytest.raises(InvalidReferenceError, match="is a file"):
        scan([gguf(tmp_path / "q.gguf")])


def test_no_more_than_a_plan_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "MOST_CHECKPOINTS", 2)
    for name in "abc":
        model(tmp_path / name)
    assert found(tmp_path) == ["a", "b"]
    assert "beyond the 2 checkpoints of a plan" in skipped(tmp_path)["c"]
