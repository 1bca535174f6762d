"""weightd.resolve: files, directories, pipelines and the Hugging Face cache, turned into sources."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from support.descriptors import open_descriptors
from support.malformed import VALID
from weightd import resolve as module
from weightd._references.index import MAX_JSON_BYTES
from weightd.errors import (
    FormatError,
    InvalidReferenceError,
    NotFoundError,
    PermissionDeniedError,
    ResourceLimitError,
    WeightdError,
)
from weightd.resolve import ReferencedFile, Resolved, folder_of, is_path, open_sources, reference_name, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, home and cache."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)  # its word would count
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def put(path: Path, content: bytes | str | dict[str, object] = VALID) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def index(*shards: str) -> dict[str, object]:
    return {"metadata": {"total_size": 1}, "weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}


def found(reference: str | os.PathLike[str], variant: str | None = None) -> list[str]:
    return [f"{component}:{file}" for component, file, *_ in resolve(reference, variant).sources]


class TestNames:
    def test_paths_become_absolute(self, tmp_path: Path) -> None:
        (tmp_path / "cwd/a").mkdir()
        assert reference_name("./a/../b.safetensors") == str(tmp_path / "cwd/b.safetensors")
        assert reference_name("../x") == str(tmp_path / "x")
        assert reference_name("/a//b/./c") == "/a/b/c"
        assert reference_name("~/m") == str(tmp_path / "home/m")
        assert reference_name(".") == str(tmp_path / "cwd")
        assert reference_name(Path("m.safetensors")) == str(tmp_path / "cwd/m.safetensors")

    def test_names_stay(self) -> None:
        for name in ("org/name", "org/name@main", "name", "my model"):
            assert reference_name(name) == name
            assert not is_path(name)

    def test_existing_path_wins(self, tmp_path: Path) -> None:
        put(tmp_path / "cwd/org/name/model.safetensors")
        assert is_path("org/name")
        assert reference_name("org/name") == str(tmp_path / "cwd/org/name")
        assert found("org/name") == [":model.safetensors"]

    def test_a_link_is_not_folded_away(self, tmp_path: Path) -> None:
        """`link/..` is where the kernel goes, and the name says so: it is not the folder that the link lies in."""
        link = tmp_path / "current"
        link.symlink_to("release/v2")
        (tmp_path / "release/v2").mkdir(parents=True)
        for place in ("shared", "release/shared"):
            put(tmp_path / place / "vae.safetensors", place)
        for given in (f"{tmp_path}/current/../shared/vae.safetensors", "../current/../shared/vae.safetensors"):
            for reference in (given, Path(given)):
                with open_sources(resolve(reference)) as opened:
                    assert os.pread(opened.fds[0], 99, 0) == b"release/shared"
                assert reference_name(reference) == f"{tmp_path}/current/../shared/vae.safetensors"
        assert reference_name(f"{tmp_path}/release/v2/../shared") == f"{tmp_path}/release/shared"
        assert reference_name(f"{tmp_path}/current/../../shared") == f"{tmp_path}/current/../../shared"
        assert folder_of(f"{tmp_path}/current/..").samefile(tmp_path / "release")
        shutil.rmtree(tmp_path / "shared")
        assert found("../current/../shared/vae.safetensors") == [":vae.safetensors"]

    @pytest.mark.parametrize("end", ["/", "/.", "/..", "/../m.safetensors"])
    def test_a_file_is_no_folder(self, tmp_path: Path, end: str) -> None:
        path = put(tmp_path / "m.safetensors")
        with pytest.raises(NotFoundError, match="no such file or directory"):
            resolve(f"{path}{end}")

    def test_what_is_there_is_not_expanded(self, tmp_path: Path) -> None:
        put(tmp_path / "cwd/~/model.safetensors", "here")
        put(tmp_path / "home/model.safetensors", "home")
        with open_sources(resolve("~/model.safetensors")) as opened:
            assert os.pread(opened.fds[0], 99, 0) == b"here"

    def test_the_current_directory_is_gone(self, tmp_path: Path) -> None:
        (tmp_path / "cwd").rmdir()
        for reference in ("./m", Path("m")):
            with pytest.raises(NotFoundError, match="current directory is gone"):
                resolve(reference)
            with pytest.raises(NotFoundError, match="current directory is gone"):
                folder_of(reference)

    def test_variants_have_names_of_their_own(self, tmp_path: Path) -> None:
        put(tmp_path / "cwd/m/model.safetensors")
        put(tmp_path / "cwd/m/model.fp16.safetensors")
        assert resolve("m", "fp16").name == f"fp16:{tmp_path}/cwd/m" == reference_name("m", "fp16")
        assert resolve("m").name == f"{tmp_path}/cwd/m"
        assert reference_name("org/name@main", "fp16") == "fp16:org/name@main"

    def test_symlinks_are_kept(self, tmp_path: Path) -> None:
        put(tmp_path / "v1/model.safetensors")
        (tmp_path / "current").symlink_to("v1")
        resolved = resolve(tmp_path / "current")
        assert resolved.name == str(tmp_path / "current")
        assert resolved.sources[0].path == tmp_path / "current/model.safetensors"

    @pytest.mark.parametrize("bad", ["", "a\0b", "/a\0b"])
    def test_impossible(self, bad: str) -> None:
        with pytest.raises(InvalidReferenceError, match="empty or holds a NUL"):
            resolve(bad)

    def test_not_utf8(self, tmp_path: Path) -> None:
        path = os.path.join(str(tmp_path), os.fsdecode(b"\xff.safetensors"))
        Path(path).write_bytes(VALID)
        with pytest.raises(InvalidReferenceError, match="not valid UTF-8"):
            resolve(path)


class TestSingleFile:
    def test_file(self, tmp_path: Path) -> None:
        path = put(tmp_path / "m.safetensors")
        assert resolve(str(path)) == Resolved(str(path), (ReferencedFile("", "m.safetensors", path),))

    def test_file_without_suffix(self, tmp_path: Path) -> None:
        assert found(put(tmp_path / "blob")) == [":blob"]

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl", "M.PT"])
    def test_pickles(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InvalidReferenceError) as caught:
            resolve(put(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)
        assert f"save_file(torch.load('{name}', weights_only=True)" in str(caught.value)

    def test_index_file(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidReferenceError, match="give its directory"):
            resolve(put(tmp_path / "model.safetensors.index.json", index("a.safetensors")))

    @pytest.mark.parametrize(
        "name", ["./m.safetensors", "m.safetensors", "m.gguf", "/nowhere/m", "~/m", "m.safetensors/x/../y"]
    )
    def test_missing(self, name: str) -> None:
        with pytest.raises((NotFoundError, InvalidReferenceError)) as caught:
            resolve(name)
        assert isinstance(caught.value, NotFoundError) == (name != "m.safetensors/x/../y")

    def test_dangling_symlink(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").symlink_to("gone")
        with pytest.raises(NotFoundError, match="no such file"):
            resolve(tmp_path / "m.safetensors")

    def test_symlink_to_itself(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").symlink_to("m.safetensors")
        with pytest.raises(WeightdError, match="cannot be opened"):
            resolve(tmp_path / "m.safetensors")

    def test_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "m.safetensors")
        with pytest.raises(InvalidReferenceError, match="not a regular file"):
            resolve(tmp_path / "m.safetensors")

    def test_path_too_long(self) -> None:
        with pytest.raises(InvalidReferenceError, match="longer than a path"):
            resolve("/" + "a" * 5000)


class TestDirectory:
    def test_index(self, tmp_path: Path) -> None:
        shards = ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"]
        put(tmp_path / "m/model.safetensors.index.json", index(*shards, shards[0]))
        for name in (*shards, "consolidated.safetensors"):
            put(tmp_path / "m" / name)
        assert found(tmp_path / "m") == [*(":" + name for name in sorted(shards)), ":model.safetensors.index.json"]
        assert [source.is_index for source in resolve(tmp_path / "m").sources] == [False, False, True]

    def test_shards_below_the_folder(self, tmp_path: Path) -> None:
        put(tmp_path / "model.safetensors.index.json", index("a/b/x.safetensors", "y.safetensors"))
        put(tmp_path / "a/b/x.safetensors")
        put(tmp_path / "y.safetensors")
        assert found(tmp_path)[:2] == [":a/b/x.safetensors", ":y.safetensors"]

    def test_several_indexes(self, tmp_path: Path) -> None:
        for stem in ("a", "b"):
            put(tmp_path / f"{stem}.safetensors.index.json", index(f"{stem}.safetensors"))
            put(tmp_path / f"{stem}.safetensors")
        with pytest.raises(InvalidReferenceError, match=r"several indexes \(a\.safe.*, b\.safe"):
            resolve(tmp_path)
        put(tmp_path / "diffusion_pytorch_model.safetensors.index.json", index("b.safetensors"))
        assert found(tmp_path)[0] == ":b.safetensors"

    def test_stale_index(self, tmp_path: Path) -> None:
        """transformers takes the one file, so its index may lead nowhere."""
        put(tmp_path / "model.safetensors")
        put(tmp_path / "model.safetensors.index.json", index("model-00001-of-00002.safetensors"))
        assert found(tmp_path) == [":model.safetensors"]
        put(tmp_path / "model-00001-of-00002.safetensors")
        assert found(tmp_path) == [":model.safetensors"]

    def test_missing_shard(self, tmp_path: Path) -> None:
        put(tmp_path / "model.safetensors.index.json", index("model-1.safetensors", "model-2.safetensors"))
        put(tmp_path / "model-1.safetensors")
        (tmp_path / "model-2.safetensors").symlink_to("gone")
        with pytest.raises(NotFoundError) as caught:
            resolve(tmp_path)
        assert str(tmp_path / "model-2.safetensors") in str(caught.value)
        assert "model.safetensors.index.json" in str(caught.value)

    @pytest.mark.parametrize(
        "shard", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "a\\b.safetensors", "", ".", "a\0"]
    )
    def test_shard_that_leads_away(self, tmp_path: Path, shard: str) -> None:
        put(tmp_path / "x.safetensors")
        put(tmp_path / "m/model.safetensors.index.json", index(shard))
        with pytest.raises(FormatError, match="leads out of the folder"):
            resolve(tmp_path / "m")

    @pytest.mark.parametrize(
        ("content", "fault"),
        [
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"\xff", "not valid JSON"),
            (b"[" * 100_000, "not valid JSON"),
            (b"[]", "no weight_map"),
            (b"{}", "no weight_map"),
            (b'{"weight_map":[]}', "no weight_map"),
            (b'{"weight_map":{}}', "no weight_map"),
            (b'{"weight_map":{"a":1}}', "not a file name"),
            (b'{"weight_map":{"a":"model.json"}}', "not a safetensors file"),
        ],
    )
    def test_damaged_index(self, tmp_path: Path, content: bytes, fault: str) -> None:
        put(tmp_path / "model.safetensors.index.json", content)
        with pytest.raises(FormatError, match=fault):
            resolve(tmp_path)

    def test_index_of_pickles(self, tmp_path: Path) -> None:
        put(tmp_path / "model.safetensors.index.json", index("model-1.bin"))
        with pytest.raises(InvalidReferenceError, match="a pickle"):
            resolve(tmp_path)

    def test_huge_index(self, tmp_path: Path) -> None:
        path = put(tmp_path / "model.safetensors.index.json", b"{}")
        os.truncate(path, MAX_JSON_BYTES + 1)
        with pytest.raises(FormatError, match="over the limit"):
            resolve(tmp_path)

    def test_index_that_is_a_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x.safetensors.index.json")
        with pytest.raises(InvalidReferenceError, match="not a regular file"):
            resolve(tmp_path)

    @pytest.mark.parametrize(
        ("there", "taken"),
        [
            (["model", "model.fp16", "consolidated", "original/model"], ["model"]),
            (["diffusion_pytorch_model", "diffusion_pytorch_model.fp16"], ["diffusion_pytorch_model"]),
            (["m-2-of-2", "m-1-of-2", "consolidated"], ["m-1-of-2", "m-2-of-2"]),
            (["model-1-of-1", "x-1-of-1"], ["model-1-of-1"]),
            (["m-1-of-2", "m-2-of-2", "m-1-of-3"], ["m-1-of-2", "m-2-of-2"]),
            (["model-1-of-1", "model.fp16-1-of-1", "model-1-of-1.bf16"], ["model-1-of-1"]),
            (["tuned", "tuned.fp16", "vae/model"], ["tuned"]),
            (["adapter_model"], ["adapter_model"]),
            (["model.fp16-1-of-2", "model.fp16-2-of-2"], ["model.fp16-1-of-2", "model.fp16-2-of-2"]),
            (["model.fp16", "consolidated"], ["model.fp16"]),
        ],
        ids=lambda names: "+".join(names),
    )
    def test_the_root_is_all(self, tmp_path: Path, there: list[str], taken: list[str]) -> None:
        for name in there:
            put(tmp_path / f"{name}.safetensors")
        for beside in ("config.json", "pytorch_model.bin", ".hidden.safetensors", "m.gguf", "model.safetensors.lock"):
            put(tmp_path / beside, "{}")
        assert found(tmp_path) == [f":{name}.safetensors" for name in taken]

    @pytest.mark.parametrize("there", [["a", "b"], ["a-1-of-1", "b-1-of-1"], ["m-1-of-1", "m-00001-of-00001"]])
    def test_several_checkpoints(self, tmp_path: Path, there: list[str]) -> None:
        for name in there:
            put(tmp_path / f"{name}.safetensors")
        listed = ", ".join(f"{name}.safetensors" for name in sorted(there))
        with pytest.raises(InvalidReferenceError) as caught:
            resolve(tmp_path)
        assert f"has several checkpoints ({listed}); give one of them, as {tmp_path}/" in str(caught.value)

    def test_several_sets_of_shards(self, tmp_path: Path) -> None:
        """A shard that is given is loaded alone, so that is no advice."""
        for name in ("a-1-of-2", "a-2-of-2", "b-1-of-1"):
            put(tmp_path / f"{name}.safetensors")
        with pytest.raises(InvalidReferenceError) as caught:
            resolve(tmp_path)
        advice = "move each set of shards to a folder of its own, or add the index of the one that you mean"
        expected = f"{tmp_path}: has several checkpoints (a-1-of-2.safetensors, b-1-of-1.safetensors); {advice}"
        assert str(caught.value) == expected
        put(tmp_path / "a.safetensors.index.json", index("a-1-of-2.safetensors", "a-2-of-2.safetensors"))
        assert found(tmp_path)[:2] == [":a-1-of-2.safetensors", ":a-2-of-2.safetensors"]

    @pytest.mark.parametrize(("there", "missing"), [((1,), 2), ((2,), 1), ((1, 3), 2)])
    def test_incomplete_set(self, tmp_path: Path, there: tuple[int, ...], missing: int) -> None:
        for number in there:
            put(tmp_path / f"model-{number:05}-of-00003.safetensors")
        put(tmp_path / "consolidated.safetensors")
        with pytest.raises(NotFoundError, match=f"shard {missing} of 3 is missing"):
            resolve(tmp_path)

    def test_a_set_that_says_too_much(self, tmp_path: Path) -> None:
        put(tmp_path / "model-1-of-99999999999999.safetensors")
        with pytest.raises(NotFoundError, match="shard 2 of 99999999999999 is missing"):
            resolve(tmp_path)

    def test_one_shard_by_name(self, tmp_path: Path) -> None:
        path = put(tmp_path / "model-00001-of-00004.safetensors")
        resolved = resolve(path)
        assert [source.file for source in resolved.sources] == [path.name]
        assert resolved.hint == f"{path}: is shard 1 of 4 alone; give its folder for all of them"
        assert resolve(put(tmp_path / "m-00001-of-00001.safetensors")).hint == ""

    def test_variant(self, tmp_path: Path) -> None:
        for name in ["model.safetensors", "model.fp16.safetensors", "model.bf16-1-of-1.safetensors"]:
            put(tmp_path / name)
        put(tmp_path / "model.safetensors.index.bf16.json", index("model.bf16-1-of-1.safetensors"))
        assert found(tmp_path, "fp16") == [":model.fp16.safetensors"]
        assert found(tmp_path, "bf16") == [":model.bf16-1-of-1.safetensors", ":model.safetensors.index.bf16.json"]
        with pytest.raises(NotFoundError, match="no weights of variant q8; leave it out"):
            resolve(tmp_path, "q8")
        with pytest.raises(InvalidReferenceError, match="is a file, which has no variant fp16"):
            resolve(tmp_path / "model.safetensors", "fp16")
        for bad in ("", "../x", "a/b", "."):
            with pytest.raises(InvalidReferenceError, match="a part of file names"):
                resolve(tmp_path, bad)

    def test_only_variant_is_said(self, tmp_path: Path) -> None:
        put(tmp_path / "model.fp16.safetensors")
        resolved = resolve(tmp_path)
        assert [source.file for source in resolved.sources] == ["model.fp16.safetensors"]
        assert resolved.notes == (f"{tmp_path}: has weights of the variant fp16 only, which are taken",)
        assert resolve(tmp_path, "fp16").notes == ()
        put(tmp_path / "model.bf16.safetensors")
        with pytest.raises(InvalidReferenceError, match=r"only as variants \(bf16, fp16\); say which with --variant"):
            resolve(tmp_path)

    def test_unreadable_and_foreign_things_beside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are not even looked at, also by root, whom no mode keeps out."""
        put(tmp_path / "model.safetensors")
        put(tmp_path / "runs/events", "x")
        (tmp_path / "self").symlink_to("self")
        os.mkfifo(tmp_path / "model.safetensors.index.json")

        def refuse(path: object) -> None:
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert found(tmp_path) == [":model.safetensors"]

    def test_only_pickles(self, tmp_path: Path) -> None:
        put(tmp_path / "pytorch_model.bin")
        put(tmp_path / "optimizer.pt")  # is first, and no weights
        with pytest.raises(InvalidReferenceError, match=r"torch\.load"):
            resolve(tmp_path)

    def test_nothing(self, tmp_path: Path) -> None:
        put(tmp_path / "m/config.json", "{}")
        with pytest.raises(NotFoundError, match="neither safetensors nor GGUF files in this directory"):
            resolve(tmp_path / "m")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_unreadable_folder(self, tmp_path: Path) -> None:
        put(tmp_path / "vae/m.safetensors")
        (tmp_path / "vae").chmod(0)
        with pytest.raises(PermissionDeniedError, match="vae"):
            resolve(tmp_path / "vae")
        (tmp_path / "vae").chmod(0o700)


class TestFoldersOfModels:
    """Never one checkpoint: the error says what is there, and what to type."""

    def message(self, reference: str | os.PathLike[str]) -> str:
        with pytest.raises(InvalidReferenceError) as caught:
            resolve(reference)
        head, _, tail = str(caught.value).partition(": has no weights of its own; ")
        assert Path(head) == Path(reference)
        return tail

    def test_models(self, tmp_path: Path) -> None:
        put(tmp_path / "m/a b/model.safetensors")
        put(tmp_path / "m/org/name/model_index.json", "{}")
        put(tmp_path / "m/org/name/vae/x.safetensors")
        put(tmp_path / "m/notes/readme.txt", "")
        (tmp_path / "m/again").symlink_to("..")
        root = f"{tmp_path}/m"
        expected = f"2 checkpoints lie below it; give those that you mean, as '{root}/a b' {root}/org/name"
        assert self.message(tmp_path / "m") == expected

    def test_one(self, tmp_path: Path) -> None:
        put(tmp_path / "m/Q4_K/m.gguf")
        assert self.message(tmp_path / "m") == f"one checkpoint lies below it; give it, as {tmp_path}/m/Q4_K"

    def test_many(self, tmp_path: Path) -> None:
        for number in range(12):
            put(tmp_path / f"m/{number:02}/model.safetensors")
        assert self.message(tmp_path / "m").endswith(f"{tmp_path}/m/04 and 7 more")

    def test_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = tmp_path / "hf/hub"
        TestCache.add(hub, "org/name", COMMIT, "main")
        TestCache.add(hub, "org/name", "f" * 40)
        TestCache.add(hub, "gpt2", COMMIT, "main")
        elsewhere = f"{hub}/models--gpt2/snapshots/{COMMIT} {hub}/models--org--name/snapshots/{COMMIT}"
        assert elsewhere in self.message(hub)
        monkeypatch.setenv("HF_HUB_CACHE", str(hub))
        everything = f"3 checkpoints lie below it; give those that you mean, as gpt2 org/name org/name@{'f' * 40}"
        assert self.message(hub) == self.message(tmp_path / "hf") == everything
        assert self.message(hub / "models--gpt2") == "one checkpoint lies below it; give it, as gpt2"
        for reference in ("gpt2", "org/name", f"org/name@{'f' * 40}"):
            assert found(reference) == [":model.safetensors"]


class TestGguf:
    PARTS = ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf")

    def put_parts(self, folder: Path) -> list[Path]:
        return [put(folder / name) for name in self.PARTS]

    def test_file(self, tmp_path: Path) -> None:
        path = put(tmp_path / "m.Q4_K.gguf")
        assert resolve(path) == Resolved(str(path), (ReferencedFile("", "m.Q4_K.gguf", path),))

    def test_any_part_is_all_by_the_name_of_the_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        paths = self.put_parts(tmp_path)
        put(tmp_path / "other.gguf")
        expected = Resolved(str(paths[0]), tuple(ReferencedFile("", path.name, path) for path in paths))
        assert [resolve(path) for path in paths] == [expected] * 3
        monkeypatch.chdir(tmp_path)
        assert resolve(self.PARTS[1]) == expected

    def test_a_file_has_no_variant(self, tmp_path: Path) -> None:
        for path in (*self.put_parts(tmp_path), put(tmp_path / "m.gguf")):
            with pytest.raises(InvalidReferenceError, match="is a file, which has no variant fp16"):
                resolve(path, "fp16")

    @pytest.mark.parametrize("missing", [0, 1, 2])
    @pytest.mark.parametrize("given", [0, 2])
    def test_missing_part(self, tmp_path: Path, missing: int, given: int) -> None:
        paths = self.put_parts(tmp_path)
        paths[missing].unlink()
        for reference in (paths[given], tmp_path):
            with pytest.raises(NotFoundError) as caught:
                resolve(reference)
            assert str(caught.value) == f"{paths[missing]}: part {missing + 1} of 3 is missing; download it"

    def test_part_whose_bytes_are_gone(self, tmp_path: Path) -> None:
        paths = self.put_parts(tmp_path)
        paths[1].unlink()
        paths[1].symlink_to("gone")
        with pytest.raises(NotFoundError, match=r"m-00002-of-00003\.gguf: part 2 of 3 is missing"):
            resolve(paths[0])

    @pytest.mark.parametrize("name", ["m-00004-of-00003.gguf", "m-00000-of-00000.gguf", "m-1-of-2.gguf", "-of-.gguf"])
    def test_names_that_are_no_part(self, tmp_path: Path, name: str) -> None:
        assert found(put(tmp_path / name)) == [f":{name}"]

    def test_part_of_one(self, tmp_path: Path) -> None:
        assert found(put(tmp_path / "m-00001-of-00001.gguf")) == [":m-00001-of-00001.gguf"]

    def test_directory_with_one(self, tmp_path: Path) -> None:
        put(tmp_path / "m.gguf")
        put(tmp_path / ".cache/other.gguf")
        put(tmp_path / "config.json", "{}")
        put(tmp_path / "pytorch_model.bin")
        assert found(tmp_path) == [":m.gguf"]

    def test_directory_with_several(self, tmp_path: Path) -> None:
        self.put_parts(tmp_path)
        put(tmp_path / "mmproj.gguf")
        put(tmp_path / "Q8/m.gguf")
        with pytest.raises(InvalidReferenceError) as caught:
            resolve(tmp_path)
        listed = "m-00001-of-00003.gguf, mmproj.gguf"
        assert str(caught.value) == f"{tmp_path}: holds several GGUF files ({listed}); give one of them"

    def test_directory_with_many(self, tmp_path: Path) -> None:
        for number in range(30):
            put(tmp_path / f"m{number:02}.gguf")
        with pytest.raises(InvalidReferenceError, match=r"m09\.gguf and 20 more\); give one of them"):
            resolve(tmp_path)

    def test_safetensors_win(self, tmp_path: Path) -> None:
        put(tmp_path / "m.gguf")
        put(tmp_path / "other.safetensors")
        assert found(tmp_path) == [":other.safetensors"]


class TestPipeline:
    INDEX: ClassVar[dict[str, object]] = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }

    def test_pipeline(self, tmp_path: Path) -> None:
        put(tmp_path / "model_index.json", self.INDEX)
        put(tmp_path / "vae/diffusion_pytorch_model.safetensors")
        put(tmp_path / "scheduler/scheduler_config.json", "{}")
        put(tmp_path / "v1-5-pruned.safetensors")  # the same once more, in one file
        put(tmp_path / "not_listed/model.safetensors")
        assert found(tmp_path) == ["vae:diffusion_pytorch_model.safetensors"]

    def test_keys_that_are_no_components(self, tmp_path: Path) -> None:
        document = {
            "_class_name": ["my_pipeline", "MyPipeline"],
            "_ignore_files": ["a", "b"],
            "vae": ["diffusers", "V"],
        }
        put(tmp_path / "model_index.json", dict(document))
        put(tmp_path / "vae/diffusion_pytorch_model.safetensors")
        assert found(tmp_path) == ["vae:diffusion_pytorch_model.safetensors"]

    @pytest.mark.parametrize(
        ("library", "taken"), [("diffusers", "shard"), ("transformers", "model"), ("own", "model")]
    )
    def test_each_framework_has_its_rule(self, tmp_path: Path, library: str, taken: str) -> None:
        """diffusers looks for its index before its file, and transformers the other way round."""
        put(tmp_path / "model_index.json", {"part": [library, "X"]})
        put(tmp_path / "part/model.safetensors")
        put(tmp_path / "part/diffusion_pytorch_model.safetensors")
        put(tmp_path / "part/diffusion_pytorch_model.safetensors.index.json", index("shard.safetensors"))
        put(tmp_path / "part/shard.safetensors")
        assert found(tmp_path)[0] == f"part:{taken}.safetensors"

    def test_variants(self, tmp_path: Path) -> None:
        put(tmp_path / "model_index.json", {name: ["diffusers", "X"] for name in ("unet", "vae", "text")})
        for name in (
            "unet/diffusion_pytorch_model",
            "unet/diffusion_pytorch_model.fp16",
            "vae/diffusion_pytorch_model",
        ):
            put(tmp_path / f"{name}.safetensors")
        put(tmp_path / "text/model.fp16.safetensors")
        stem = "diffusion_pytorch_model"
        text = "text:model.fp16.safetensors"
        assert found(tmp_path) == [text, f"unet:{stem}.safetensors", f"vae:{stem}.safetensors"]
        assert resolve(tmp_path).notes == (f"{tmp_path}/text: has weights of the variant fp16 only, which are taken",)
        assert found(tmp_path, "fp16") == [text, f"unet:{stem}.fp16.safetensors", f"vae:{stem}.safetensors"]
        plain = f"{tmp_path}/vae: has no weights of variant fp16; its plain ones are taken"
        assert resolve(tmp_path, "fp16").notes == (plain,)
        with pytest.raises(NotFoundError, match="no weights of variant bf16"):
            resolve(tmp_path, "bf16")

    @pytest.mark.parametrize(
        "other",
        [
            "diffusion_pytorch_model.fp16.safetensors",
            "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
            "model.fp16.safetensors",
            "own.fp16.safetensors",
            "own-00001-of-00001.fp16.safetensors",
        ],
    )
    def test_another_variant_never_stands_for_the_one_asked_for(self, tmp_path: Path, other: str) -> None:
        put(tmp_path / "model_index.json", {name: ["diffusers", "X"] for name in ("a", "b")})
        put(tmp_path / "a/diffusion_pytorch_model.bf16.safetensors")
        put(tmp_path / "b" / other)
        with pytest.raises(NotFoundError, match="/b: has no weights of variant bf16, and no plain ones"):
            resolve(tmp_path, "bf16")
        put(tmp_path / "b/own.safetensors")
        expected = ["a:diffusion_pytorch_model.bf16.safetensors", "b:own.safetensors"]
        assert found(tmp_path, "bf16") == expected

    @pytest.mark.parametrize("beside", ["sd.fp16.safetensors", "model.fp16.safetensors", "own.safetensors", "m.gguf"])
    def test_files_of_the_root_stand_for_no_component(self, tmp_path: Path, beside: str) -> None:
        put(tmp_path / "model_index.json", {name: ["diffusers", "X"] for name in ("unet", "vae")})
        put(tmp_path / "unet/diffusion_pytorch_model.safetensors")
        put(tmp_path / "vae/config.json", "{}")
        put(tmp_path / beside)
        with pytest.raises(NotFoundError, match="has no weights of variant fp16; leave it out"):
            resolve(tmp_path, "fp16")
        (tmp_path / "unet/diffusion_pytorch_model.safetensors").rename(tmp_path / "unet/pytorch_model.bin")
        with pytest.raises(InvalidReferenceError, match="unet: is left out, for its weights are pickles; convert"):
            resolve(tmp_path)
        (tmp_path / "unet/pytorch_model.bin").unlink()
        with pytest.raises(NotFoundError, match=r"no component of model_index\.json has weights; download them"):
            resolve(tmp_path)
        put(tmp_path / "unet/Q4/m.gguf")
        with pytest.raises(InvalidReferenceError, match=r"one checkpoint lies below it; give it, as .*/unet/Q4"):
            resolve(tmp_path)

    def test_component_of_pickles(self, tmp_path: Path) -> None:
        put(tmp_path / "model_index.json", {name: ["diffusers", "X"] for name in ("unet", "safety")})
        put(tmp_path / "unet/diffusion_pytorch_model.safetensors")
        put(tmp_path / "safety/pytorch_model.bin")
        assert found(tmp_path) == ["unet:diffusion_pytorch_model.safetensors"]
        assert "safety: is left out, for its weights are pickles" in resolve(tmp_path).notes[0]

    def test_modules(self, tmp_path: Path) -> None:
        """sentence-transformers: where the folder has no weights itself, its modules have."""
        modules = [{"path": "0_Transformer"}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
        put(tmp_path / "modules.json", json.dumps(modules))
        put(tmp_path / "0_Transformer/model.safetensors")
        put(tmp_path / "1_Pooling/config.json", "{}")
        put(tmp_path / "2_Dense/model.safetensors")
        put(tmp_path / "onnx/model.safetensors")
        assert found(tmp_path) == ["0_Transformer:model.safetensors", "2_Dense:model.safetensors"]
        put(tmp_path / "model.safetensors")
        assert found(tmp_path) == [":model.safetensors"]

    @pytest.mark.parametrize("content", ["{}", "[1]", "[{}]", '[{"path": 1}]', '[{"path": "../x"}]', "["])
    def test_damaged_modules(self, tmp_path: Path, content: str) -> None:
        put(tmp_path / "m/modules.json", content)
        put(tmp_path / "x/model.safetensors")
        with pytest.raises(FormatError, match=r"modules\.json"):
            resolve(tmp_path / "m")

    def test_missing_component(self, tmp_path: Path) -> None:
        put(tmp_path / "model_index.json", self.INDEX)
        put(tmp_path / "vae/diffusion_pytorch_model.safetensors")
        with pytest.raises(NotFoundError, match=r"model_index\.json: lists component 'scheduler'"):
            resolve(tmp_path)

    def test_component_that_leads_away(self, tmp_path: Path) -> None:
        put(tmp_path / "m/model_index.json", {"../x": ["a", "b"]})
        put(tmp_path / "m/y.safetensors")
        put(tmp_path / "x/y.safetensors")
        with pytest.raises(FormatError, match=r"'\.\./x' leads out of the folder"):
            resolve(tmp_path / "m")

    @pytest.mark.parametrize("content", ["[]", "{", "1"])
    def test_damaged(self, tmp_path: Path, content: str) -> None:
        put(tmp_path / "model_index.json", content)
        put(tmp_path / "vae/y.safetensors")
        with pytest.raises(FormatError, match=r"not valid JSON|not a JSON object"):
            resolve(tmp_path)

    def test_lists_nothing(self, tmp_path: Path) -> None:
        put(tmp_path / "model_index.json", "{}")
        put(tmp_path / "m.safetensors")
        put(tmp_path / "vae/y.safetensors")
        assert found(tmp_path) == [":m.safetensors"]


class TestCache:
    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        return tmp_path / "hub"

    @staticmethod
    def add(cache: Path, repository: str, commit: str = COMMIT, *refs: str) -> Path:
        """A repository as huggingface_hub lays it out: snapshots of symlinks to blobs."""
        folder = cache / ("models--" + repository.replace("/", "--"))
        put(folder / "blobs/aa")
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to("../../blobs/aa")
        for ref in refs:
            put(folder / "refs" / ref, commit)
        return snapshot

    def test_main(self, cache: Path) -> None:
        snapshot = self.add(cache, "org/name", COMMIT, "main")
        self.add(cache, "org/name", "f" * 40)
        expected = (ReferencedFile("", "model.safetensors", snapshot / "model.safetensors"),)
        assert resolve("org/name") == Resolved("org/name", expected)
        assert resolve("org/name@main") == Resolved("org/name@main", expected)
        assert resolve(f"org/name@{COMMIT}").sources == expected
        assert resolve("org/name@" + "f" * 40).sources != expected

    def test_bare_name_and_revisions(self, cache: Path) -> None:
        snapshot = self.add(cache, "gpt2", COMMIT, "v1.0", "refs/pr/1", "feature/x")
        for revision in ("v1.0", "refs/pr/1", "feature/x"):
            assert resolve(f"gpt2@{revision}").sources[0].path.parent == snapshot

    def test_snapshot_with_one_gguf(self, cache: Path) -> None:
        snapshot = self.add(cache, "org/name-GGUF", COMMIT, "main")
        (snapshot / "model.safetensors").rename(snapshot / "model.Q4_K.gguf")
        assert found("org/name-GGUF") == [":model.Q4_K.gguf"]
        (snapshot / "model.Q8_0.gguf").symlink_to("../../blobs/aa")
        with pytest.raises(InvalidReferenceError, match=r"model\.Q4_K\.gguf, model\.Q8_0\.gguf\); give one of them"):
            resolve("org/name-GGUF")
        assert found(snapshot / "model.Q8_0.gguf") == [":model.Q8_0.gguf"]

    def test_only_snapshot_without_ref(self, cache: Path) -> None:
        """huggingface_hub does not guess that it is main."""
        snapshot = self.add(cache, "org/name")
        assert resolve(f"org/name@{COMMIT}").sources[0].path.parent == snapshot
        for reference in ("org/name", "org/name@main"):
            with pytest.raises(NotFoundError):
                resolve(reference)

    @pytest.mark.parametrize("name", ["org/model.gguf", "org/model.safetensors", "model.gguf"])
    def test_repository_that_is_called_as_a_file_is(self, cache: Path, name: str) -> None:
        with pytest.raises(NotFoundError, match=f"no such file, and no repository in the cache .*hf download {name}"):
            resolve(name)
        snapshot = self.add(cache, name, COMMIT, "main")
        assert [source.path for source in resolve(name).sources] == [snapshot / "model.safetensors"]

    def test_not_cached(self, cache: Path) -> None:
        with pytest.raises(NotFoundError) as caught:
            resolve("org/name")
        assert str(cache) in str(caught.value)
        assert "hf download org/name`" in str(caught.value)
        with pytest.raises(NotFoundError, match="hf download org/name --revision v2`"):
            resolve("org/name@v2")

    def test_ref_without_its_snapshot(self, cache: Path) -> None:
        put(cache / "models--org--name/refs/main", COMMIT)
        self.add(cache, "org/name", "f" * 40)
        with pytest.raises(NotFoundError, match="hf download"):
            resolve("org/name")

    def test_snapshot_without_weights(self, cache: Path) -> None:
        snapshot = self.add(cache, "org/name", COMMIT, "main")
        (snapshot / "model.safetensors").unlink()
        with pytest.raises(NotFoundError, match="holds neither safetensors nor GGUF files; run `hf download org/name`"):
            resolve("org/name")

    @pytest.mark.parametrize("content", ["", "../..", "a/b", "..", "a" * 200 + "\nb", COMMIT + "\n"])
    def test_hostile_ref(self, cache: Path, content: str) -> None:
        self.add(cache, "org/name")
        put(cache / "models--org--name/refs/main", content)
        with pytest.raises(FormatError, match="does not hold a commit"):
            resolve("org/name")

    @pytest.mark.parametrize(
        "bad",
        [
            "a/b/c",
            "org/",
            "org/na me",
            "a--b/c",
            "org/..",
            "a..b/c",
            "-a/b",
            "a/b.",
            "müller/x",
            "org/name\n",
            "@main",
            "a.git",
            "a" * 97,
        ],
    )
    def test_bad_repository(self, cache: Path, bad: str) -> None:
        with pytest.raises(InvalidReferenceError, match="neither an existing path nor a repository id"):
            resolve(bad)

    @pytest.mark.parametrize("bad", ["", "..", "a/../b", "/a", "a/", "a//b", "a\\b", "a b", "a\nb", "./a"])
    def test_bad_revision(self, cache: Path, bad: str) -> None:
        with pytest.raises(InvalidReferenceError, match="not a branch, tag or commit"):
            resolve(f"org/name@{bad}")

    def test_where_the_cache_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def looked_in() -> str:
            with pytest.raises(NotFoundError) as caught:
                resolve("org/name")
            return str(caught.value).split("not in the cache ")[1].split(";")[0]

        assert looked_in() == str(tmp_path / "home/.cache/huggingface/hub")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert looked_in() == "/xdg/huggingface/hub"
        monkeypatch.setenv("HF_HOME", "~/hf")
        assert looked_in() == str(tmp_path / "home/hf/hub")
        monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", "~/older")
        assert looked_in() == str(tmp_path / "home/older")
        monkeypatch.setenv("HF_HUB_CACHE", "$HOME/hub")
        assert looked_in() == str(tmp_path / "home/hub")
        # Where the package is in memory, it has read the environment already.
        monkeypatch.setitem(sys.modules, "huggingface_hub.constants", SimpleNamespace(HF_HUB_CACHE="/its/own"))
        assert looked_in() == "/its/own"


class TestFolderOf:
    """A framework's reference: a folder, or a repository. Nothing stands for its parent."""

    @pytest.mark.parametrize("reference", ["m", "./m", "../cwd/m"])
    def test_folder(self, tmp_path: Path, reference: str) -> None:
        put(tmp_path / "cwd/m/model.safetensors")
        assert folder_of(reference).samefile(tmp_path / "cwd/m")
        assert folder_of(Path(reference)).samefile(tmp_path / "cwd/m")

    @pytest.mark.parametrize("gone", ["./m/checkpoint-500", "/nowhere/m", "~/m", "./m/model.safetensors/x"])
    def test_what_is_not_there(self, tmp_path: Path, gone: str) -> None:
        put(tmp_path / "cwd/m/model.safetensors")
        with pytest.raises(NotFoundError, match="no such file or directory"):
            folder_of(gone)

    @pytest.mark.parametrize("name", ["model.safetensors", "tuned.safetensors", "x.gguf", "config.json"])
    def test_file(self, tmp_path: Path, name: str) -> None:
        put(tmp_path / "cwd/m/model.safetensors")
        path = put(tmp_path / "cwd/m" / name)
        for reference in (path, str(path), f"m/{name}"):
            with pytest.raises(InvalidReferenceError, match=f"{name}: is a file, where a folder or org/name"):
                folder_of(reference)

    def test_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        snapshot = TestCache.add(tmp_path / "hub", "org/name", COMMIT, "main")
        assert folder_of("org/name").samefile(snapshot)
        with pytest.raises(NotFoundError, match="hf download org/gone`"):
            folder_of("org/gone")


class TestOpenSources:
    @staticmethod
    def one(path: Path) -> Resolved:
        return Resolved("x", (ReferencedFile("vae", "m", path),))

    def test_identity_and_close(self, tmp_path: Path) -> None:
        for name in ("vae/a.safetensors", "vae-2/b.safetensors"):
            put(tmp_path / name, name)
        put(tmp_path / "model_index.json", {"vae": ["x", "y"], "vae-2": ["x", "y"]})
        with open_sources(resolve(tmp_path)) as opened:
            fds = opened.fds
            assert [(source.component, source.file) for source in opened.sources] == [
                ("vae", "a.safetensors"),
                ("vae-2", "b.safetensors"),
            ]
            assert [os.pread(fd, 99, 0) for fd in fds] == [b"vae/a.safetensors", b"vae-2/b.safetensors"]
            for fd, source in zip(fds, opened.sources, strict=True):
                status = os.fstat(fd)
                assert source.identity.inode == status.st_ino
                assert source.identity.size == status.st_size
                assert source.identity.mtime_ns == status.st_mtime_ns
                assert not os.get_inheritable(fd)
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        opened.close()
        assert opened.fds == ()

    def test_nothing_stays_open_after_a_failure(self, tmp_path: Path) -> None:
        path = put(tmp_path / "a.safetensors")
        before = open_descriptors()
        with pytest.raises(NotFoundError, match=r"gone\.safetensors: no such file"):
            open_sources(
                Resolved("x", (ReferencedFile("", "a", path), ReferencedFile("", "b", tmp_path / "gone.safetensors")))
            )
        assert open_descriptors() == before

    def test_not_regular(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "socket"))
            for path in (tmp_path / "fifo", tmp_path / "socket", tmp_path, Path("/dev/null")):
                with pytest.raises(InvalidReferenceError, match="not a regular file"):
                    open_sources(self.one(path))

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, flags: int) -> int:
            raise PermissionError(13, "Permission denied")

        path = put(tmp_path / "a.safetensors")
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(PermissionDeniedError, match=r"a\.safetensors"):
            open_sources(self.one(path))

    def test_a_file_that_another_process_holds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A lease (F_SETLEASE): the kernel would have us wait until it is given up."""
        path = put(tmp_path / "m.safetensors")

        def held(*_: object) -> int:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        monkeypatch.setattr(os, "open", held)
        with pytest.raises(WeightdError, match=r"m\.safetensors: is in use by another process.*; try again") as caught:
            open_sources(resolve(path))
        assert type(caught.value) is WeightdError

    def test_too_many_open_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, flags: int) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(ResourceLimitError, match="this process has all the descriptors") as caught:
            open_sources(self.one(tmp_path))
        assert caught.value.limit == "RLIMIT_NOFILE"


def test_standard_library_only() -> None:
    code = "import sys, weightd.resolve; sys.exit(bool({'grpc', 'torch', 'google', 'numpy'} & set(sys.modules)))"
    root = str(Path(module.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": root}, timeout=60)
