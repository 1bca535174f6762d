"""References against a real daemon: files, sharded folders, pipelines, the Hugging Face cache."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import weightd
from support import checkpoints
from support.backends import EVERY, Backend
from support.content import content
from support.shared import SharedDaemons
from weightd.resolve import resolve

CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
A, B, C = (letter * 40 for letter in "abc")

everywhere = pytest.mark.backends(*EVERY, swept="cuda_ipc")


@pytest.fixture
def client(shared_daemons: SharedDaemons, backend: Backend) -> Iterator[weightd.Client]:
    """A client of a daemon that holds nothing."""
    with shared_daemons.on(backend) as daemon, weightd.connect(daemon.socket, timeout=20.0) as client:
        yield client


def filled(value: float, count: int = 5) -> np.ndarray:
    return np.full(count, value, np.float32)


def values(attachment: weightd.Attachment) -> dict[tuple[str, str], list[float]]:
    """Every tensor's bytes as float32, by (component, name)."""
    return {
        tuple(key): np.frombuffer(content(attachment, key.name, key.component), np.float32)[:1].tolist()  # type: ignore[misc]  # two strings
        for key in attachment.tensors
    }


def sharded(folder: Path) -> Path:
    """Two shards and their index, beside a file that the index does not list."""
    checkpoints.write(folder / "model-00001-of-00002.safetensors", {"a": filled(1)}, {"format": "pt"})
    checkpoints.write(folder / "model-00002-of-00002.safetensors", {"b": filled(2), "c": filled(3)})
    checkpoints.write(folder / "consolidated.safetensors", {"a": filled(9)})
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    shards["c"] = shards["b"]
    checkpoints.index(folder, shards)
    return folder


def pipeline(folder: Path) -> Path:
    """Three components with weights and one without, and the whole once more at the top."""
    checkpoints.write(folder / "unet" / "diffusion_pytorch_model.safetensors", {"w": filled(1), "v": filled(2)})
    checkpoints.write(folder / "vae" / "diffusion_pytorch_model.safetensors", {"w": filled(3)})
    checkpoints.write(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", {"w": filled(8)})
    sharded(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder


PIPELINE = {
    ("text_encoder", "a"): [1], ("text_encoder", "b"): [2], ("text_encoder", "c"): [3],
    ("unet", "w"): [1], ("unet", "v"): [2], ("vae", "w"): [3],
}  # fmt: skip


def test_single_file(client: weightd.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": filled(1), "b": filled(2)}, {"k": "v"})
    info = client.load(path)
    assert info.names == (str(path),)
    monkeypatch.chdir(tmp_path)
    for reference in (path, str(path), "m.safetensors", "./m.safetensors", str(path.parent / "." / "m.safetensors")):
        with client.attach(reference) as attachment:
            assert attachment.components == ("",)
            assert values(attachment) == {("", "a"): [1], ("", "b"): [2]}
            assert attachment.metadata() == {"k": "v"}
        assert client.inspect(reference).checkpoint.content_digest == info.content_digest
    assert [checkpoint.names for checkpoint in client.checkpoints()] == [(str(path),)]


@pytest.mark.parametrize("name", ["prod", "org/prod"])
def test_what_is_both_a_name_and_a_path_is_refused(
    name: str, client: weightd.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints.write(tmp_path / "one.safetensors", {"a": filled(1)})
    checkpoints.write(tmp_path / name / "model.safetensors", {"a": filled(2)})
    named = client.load(path, name=name)
    with client.attach(name) as attachment:
        assert attachment.content_digest == named.content_digest
    monkeypatch.chdir(tmp_path)
    both = rf"give \./{name} for the path, or the checkpoint's digest"
    with pytest.raises(weightd.InvalidReferenceError, match=both):
        client.attach(name)
    assert client.inspect(name).checkpoint.content_digest == named.content_digest, "nothing else is resident"
    checkpoints.rest(tmp_path / name / "model.safetensors")
    client.load(f"./{name}", name="other")
    for call in (client.attach, client.inspect, client.pin, client.unpin, client.verify, client.remove):
        with pytest.raises(weightd.InvalidReferenceError, match=both):
            call(name)
    client.attach("other").close()  # it waited for that
    client.remove("other")
    for reference in (f"./{name}", Path(name)):
        with pytest.raises(weightd.NotFoundError):
            client.inspect(reference)
        with client.attach(reference) as attachment:
            assert values(attachment) == {("", "a"): [2]}
        assert client.inspect(reference).checkpoint.names == (str(tmp_path / name),)
        client.remove(reference)
    assert client.inspect(named.content_digest).checkpoint.names == (name,)
    client.remove(named.content_digest)
    with client.attach(name) as attachment:
        assert values(attachment) == {("", "a"): [2]}


def test_where_a_checkpoint_with_a_name_came_from(client: weightd.Client, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {"a": filled(1)})
    client.load(path, name="base")
    assert client.inspect("base").reference == str(path)
    client.load(checkpoints.write(tmp_path / "copy.safetensors", {"a": filled(1)}), name="other")
    assert client.inspect("other").reference == str(path)  # the files that are listed are those, too


def test_sharded_directory(client: weightd.Client, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    checkpoints.rest(*folder.iterdir())  # only then the daemon keeps in mind which files they were
    report = client.load_report(folder)
    assert report is not None
    assert (report.name, report.tensors, report.total_bytes) == (str(folder), 3, 60)
    with client.attach(folder) as attachment:
        assert values(attachment) == {("", "a"): [1], ("", "b"): [2], ("", "c"): [3]}
        assert attachment.metadata(file="model-00001-of-00002.safetensors") == {"format": "pt"}
        assert attachment.metadata(file="model-00002-of-00002.safetensors") is None
        with pytest.raises(weightd.InvalidReferenceError, match="2 files"):
            attachment.metadata()
    sources = client.inspect(folder).sources
    assert [source.file for source in sources] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@everywhere
def test_pipeline(client: weightd.Client, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipe")
    expected = dict(PIPELINE)
    checkpoints.write(folder / "whole.safetensors", {"all": filled(7)})
    index = {"_class_name": ["own", "P"], "_ignore_files": ["a", "b"], "feature": [None, None]}
    index |= {component: ["library", "Class"] for component in ("unet", "vae", "text_encoder")}
    (folder / "model_index.json").write_text(json.dumps(index))
    client.load(folder, name="pipe")
    with client.attach("pipe") as attachment:
        assert set(attachment.components) == {component for component, _ in expected}
        assert values(attachment) == expected
    with client.attach("pipe", components=["vae"]) as attachment:
        assert values(attachment) == {("vae", "w"): [3]}
    with client.attach("pipe", tensors=[("unet", "v")]) as attachment:
        assert values(attachment) == {("unet", "v"): [2]}
    details = client.inspect("pipe")
    assert {part.name: part.tensors for part in details.components} == {
        "text_encoder": 3, "unet": 2, "vae": 1,
    }  # fmt: skip


def test_variant_of_a_pipeline(client: weightd.Client, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Components that lack it are taken as they are; both are resident then, under names of their own."""
    folder = checkpoints.describe_pipeline(pipeline(tmp_path / "pipe"))
    plain, half = client.load(folder), client.load(resolve(folder, "fp16"))
    assert (plain.names, half.names) == ((str(folder),), (f"fp16:{folder}",))
    with client.attach(resolve(folder, "fp16")) as attachment:
        assert values(attachment) == PIPELINE | {("vae", "w"): [8]}
    with client.attach(folder) as attachment:
        assert values(attachment) == PIPELINE
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert caplog.messages == []
    with client.attach(folder) as attachment:
        assert values(attachment) == PIPELINE | {("vae", "w"): [8]}
    assert caplog.messages == [f"{folder / 'vae'}: has weights of the variant fp16 only, which are taken"]


def cached(cache: Path, repository: str, commits: dict[str, float], refs: dict[str, str]) -> Path:
    """A repository in the cache as huggingface_hub lays it out: blobs, snapshots of symlinks to them, refs."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    for commit, value in commits.items():
        blob = checkpoints.write(folder / "blobs" / f"blob-{commit}", {"w": filled(value)})
        link = folder / "snapshots" / commit / "model.safetensors"
        link.parent.mkdir(parents=True)
        link.symlink_to(Path("../../blobs") / blob.name)
    for ref, commit in refs.items():
        path = folder / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return folder


def test_hugging_face_cache(client: weightd.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in CACHE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)  # read the environment of before
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    cached(cache, "org/name", {A: 1, B: 2, C: 3}, {"main": A, "v2": B, "refs/pr/1": C})
    expected = {"org/name": 1, "org/name@v2": 2, "org/name@refs/pr/1": 3, f"org/name@{A}": 1, f"org/name@{B}": 2}
    for reference, value in expected.items():
        info = client.load(reference)
        assert reference in info.names
        with client.attach(reference) as attachment:
            assert values(attachment) == {("", "w"): [value]}, reference
    assert client.stats().checkpoints == 3
    # A new download moves main, as `hf download` does; the name goes with the next load.
    (cache / "models--org--name" / "refs" / "main").write_text(B)
    with client.attach("org/name") as attachment:
        assert values(attachment) == {("", "w"): [1]}
    assert "org/name" in client.load("org/name").names
    with client.attach("org/name") as attachment:
        assert values(attachment) == {("", "w"): [2]}

    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # whose folder "hub" it is
    assert client.load("org/name@v2").content_digest == client.inspect("org/name").checkpoint.content_digest


def test_hugging_face_cache_misses(client: weightd.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    with pytest.raises(weightd.NotFoundError, match="hf download org/name"):
        client.load("org/name")
    folder = cached(cache, "org/name", {A: 1}, {"main": A})
    with pytest.raises(weightd.NotFoundError, match="hf download org/name --revision v9"):
        client.load("org/name@v9")
    shutil.rmtree(folder / "blobs")
    with pytest.raises(weightd.NotFoundError, match=r"model\.safetensors"):
        client.load("org/name")


@pytest.mark.parametrize("component", ["", "unet"])
def test_one_name_in_two_files_of_a_component(component: str, client: weightd.Client, tmp_path: Path) -> None:
    folder = tmp_path / "m" / component
    checkpoints.write(folder / "m-1-of-2.safetensors", {"a": filled(1), "b": filled(2)})
    checkpoints.write(folder / "m-2-of-2.safetensors", {"b": filled(2), "c": filled(3)})
    if component:
        checkpoints.describe_pipeline(tmp_path / "m")
    with pytest.raises(weightd.FormatError, match="tensor 'b' is in another file") as caught:
        client.load(tmp_path / "m")
    assert str(caught.value).startswith(f"{folder / 'm-2-of-2.safetensors'}: ")
    assert client.checkpoints() == []


OVERLAY = "model-00000-overlay.safetensors"  # sorts before the shards: the order of files is not what decides


def overlaid(folder: Path) -> Path:
    """Two shards, and a file that the index names for a tensor which a shard still has."""
    sharded(folder)
    checkpoints.write(folder / "below" / OVERLAY, {"b": filled(7), "d": filled(4)})
    shards = {"a": "model-00001-of-00002.safetensors", "b": f"below/{OVERLAY}"}
    checkpoints.index(folder, shards | {"c": "model-00002-of-00002.safetensors"})
    return folder


OVERLAID = {("", "a"): [1], ("", "b"): [7], ("", "c"): [3], ("", "d"): [4]}


@everywhere
@pytest.mark.parametrize("component", ["", "text_encoder"])
def test_the_index_decides_whose_tensor_counts(component: str, client: weightd.Client, tmp_path: Path) -> None:
    overlaid(tmp_path / "m" / component)
    if component:
        checkpoints.describe_pipeline(tmp_path / "m")
    expected = {(component, name): value for (_, name), value in OVERLAID.items()}
    report = client.load_report(tmp_path / "m")
    assert report is not None
    assert (report.tensors, report.total_bytes) == (4, 80)
    with client.attach(tmp_path / "m") as attachment:
        assert values(attachment) == expected
        assert attachment.metadata(component=component, file="model-00001-of-00002.safetensors") == {"format": "pt"}
    sources = [source.file for source in client.inspect(tmp_path / "m").sources]
    assert sources == [f"below/{OVERLAY}", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_files_are_known_by_their_index_too(client: weightd.Client, tmp_path: Path) -> None:
    """The same files under another index are other content, and are not answered from memory as if they were not."""
    folder = overlaid(tmp_path / "m")
    checkpoints.rest(*folder.rglob("*.*"))
    before = client.load_report(folder)
    again = client.load_report(folder)
    assert before is not None
    assert again is not None
    assert (before.read_bytes > 0, again.read_bytes, again.content_digest) == (True, 0, before.content_digest)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoints.index(folder, index | {"b": "model-00002-of-00002.safetensors", "d": f"below/{OVERLAY}"})
    checkpoints.rest(*folder.rglob("*.*"))
    with client.attach(folder) as attachment:
        assert values(attachment) == OVERLAID | {("", "b"): [2]}
        assert attachment.content_digest != before.content_digest


@pytest.mark.parametrize(
    ("said", "words"),
    [({}, "does not say whose counts"), ({"b": "model-00001-of-00002.safetensors"}, "says that it is in 'model-00001")],
)
def test_an_index_that_does_not_decide(
    said: dict[str, str], words: str, client: weightd.Client, tmp_path: Path
) -> None:
    folder = overlaid(tmp_path / "m")
    shards = {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors", "d": f"below/{OVERLAY}"}
    checkpoints.index(folder, shards | said)
    with pytest.raises(weightd.FormatError, match=f"tensor 'b' is in another file too, and the index {words}"):
        client.load(folder)
    assert client.checkpoints() == []


def test_a_folder_of_models_is_no_checkpoint(client: weightd.Client, tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000"):
        sharded(tmp_path / "out" / name)
    (tmp_path / "out" / "training_args.bin").touch()
    with pytest.raises(weightd.InvalidReferenceError) as caught:
        client.load(tmp_path / "out")
    listed = f"{tmp_path}/out/checkpoint-1000 {tmp_path}/out/checkpoint-500"
    assert str(caught.value) == (
        f"{tmp_path}/out: has no weights of its own; 2 checkpoints lie below it; give those that you mean, as {listed}"
    )
    assert client.checkpoints() == []


def test_what_cannot_be_loaded(client: weightd.Client, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "m.bin").write_bytes(b"")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    incomplete = sharded(tmp_path / "incomplete")
    (incomplete / "model-00002-of-00002.safetensors").unlink()
    for reference, error, words in (
        (tmp_path / "empty", weightd.NotFoundError, "neither safetensors nor GGUF files"),
        (tmp_path / "m.bin", weightd.InvalidReferenceError, "pickle"),
        (tmp_path / "broken", weightd.NotFoundError, "broken"),
        (tmp_path / "gone.safetensors", weightd.NotFoundError, "gone"),
        (incomplete, weightd.NotFoundError, "model-00002-of-00002"),
        ("not a reference", weightd.InvalidReferenceError, "neither an existing path nor a repository id"),
    ):
        with pytest.raises(error, match=words):
            client.load(reference)
    assert client.checkpoints() == []


@everywhere
def test_a_file_that_has_changed_is_other_content(client: weightd.Client, tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path / "m.safetensors", {"w": filled(1)})
    before = client.load(path).content_digest
    with client.attach(path) as old:
        checkpoints.write(path, {"w": filled(2)})
        with client.attach(path) as new:
            assert values(new) == {("", "w"): [2]}
            assert new.content_digest != before
        assert values(old) == {("", "w"): [1]}
        assert client.inspect(path).checkpoint.content_digest != before
