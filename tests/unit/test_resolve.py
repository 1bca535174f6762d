"""weightd.resolve: files, directories, pipelines and the Hugging Face cache, turned into sources."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from support.malformed import VALID
from weightd import resolve as module
from weightd.errors import FormatError, InvalidReferenceError, NotFoundError, PermissionDeniedError, WeightdError
from weightd.resolve import Resolved, SourcePath, folder_of, is_path, open_sources, reference_name, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, home and cache."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
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


def found(reference: str | os.PathLike[str]) -> list[str]:
    return [f"{component}:{file}" for component, file, _ in resolve(reference).sources]


class TestNames:
    def test_paths_become_absolute(self, tmp_path: Path) -> None:
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
        assert resolve(str(path)) == Resolved(str(path), (SourcePath("", "m.safetensors", path),))

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
    def test_plain_files_are_sorted(self, tmp_path: Path) -> None:
        for name in ("b.safetensors", "a.safetensors", "config.json", "pytorch_model.bin", ".hidden.safetensors"):
            put(tmp_path / "m" / name)
        assert found(tmp_path / "m") == [":a.safetensors", ":b.safetensors"]

    def test_index(self, tmp_path: Path) -> None:
        shards = ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"]
        put(tmp_path / "m/model.safetensors.index.json", index(*shards, shards[0]))
        for name in (*shards, "consolidated.safetensors"):
            put(tmp_path / "m" / name)
        assert found(tmp_path / "m") == [":" + name for name in sorted(shards)]

    @pytest.mark.parametrize("variant", ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"])
    def test_variant_index_is_skipped(self, tmp_path: Path, variant: str) -> None:
        put(tmp_path / "model.safetensors.index.json", index("model-00001-of-00001.safetensors"))
        put(tmp_path / variant, index("model.fp16-00001-of-00001.safetensors"))
        put(tmp_path / "model-00001-of-00001.safetensors")
        put(tmp_path / "model.fp16-00001-of-00001.safetensors")
        assert found(tmp_path) == [":model-00001-of-00001.safetensors"]
        (tmp_path / "model.safetensors.index.json").unlink()
        assert found(tmp_path) == [":model.fp16-00001-of-00001.safetensors"]
        put(tmp_path / "model.safetensors")
        (tmp_path / "model-00001-of-00001.safetensors").unlink()
        assert found(tmp_path) == [":model.safetensors"]

    def test_several_indexes(self, tmp_path: Path) -> None:
        for stem in ("a", "b"):
            put(tmp_path / f"{stem}.safetensors.index.json", index(f"{stem}.safetensors"))
            put(tmp_path / f"{stem}.safetensors")
        with pytest.raises(InvalidReferenceError, match=r"several indexes \(a\.safe.*, b\.safe"):
            resolve(tmp_path)
        put(tmp_path / "diffusion_pytorch_model.safetensors.index.json", index("b.safetensors"))
        assert found(tmp_path) == [":b.safetensors"]

    def test_missing_shard(self, tmp_path: Path) -> None:
        put(tmp_path / "model.safetensors.index.json", index("model-1.safetensors", "model-2.safetensors"))
        put(tmp_path / "model-1.safetensors")
        (tmp_path / "model-2.safetensors").symlink_to("gone")
        with pytest.raises(NotFoundError) as caught:
            resolve(tmp_path)
        assert str(tmp_path / "model-2.safetensors") in str(caught.value)
        assert "model.safetensors.index.json" in str(caught.value)

    @pytest.mark.parametrize(
        "shard", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "", ".", "..", "a\0"]
    )
    def test_shard_that_leads_away(self, tmp_path: Path, shard: str) -> None:
        put(tmp_path / "x.safetensors")
        put(tmp_path / "m/model.safetensors.index.json", index(shard))
        with pytest.raises(FormatError, match="not a plain file name"):
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
        os.truncate(path, module.MAX_JSON_BYTES + 1)
        with pytest.raises(FormatError, match="over the limit"):
            resolve(tmp_path)

    def test_index_that_is_a_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "model.safetensors.index.json")
        with pytest.raises(InvalidReferenceError, match="not a regular file"):
            resolve(tmp_path)

    def test_variants(self, tmp_path: Path) -> None:
        for name in (
            "model.safetensors",
            "model.fp16.safetensors",
            "model.fp16.ema.safetensors",
            "other.fp16.safetensors",
            "big-00001-of-00002.safetensors",
            "big-00002-of-00002.safetensors",
            "big.fp16-00001-of-00001.safetensors",
            "old-00001-of-00001.safetensors",
            "old-00001-of-00001.fp16.safetensors",
        ):
            put(tmp_path / name)
        assert found(tmp_path) == [
            ":big-00001-of-00002.safetensors",
            ":big-00002-of-00002.safetensors",
            ":model.safetensors",
            ":old-00001-of-00001.safetensors",
            ":other.fp16.safetensors",
        ]

    def test_components(self, tmp_path: Path) -> None:
        for name in ("model", "vae/v", "unet/u", "text/encoder/t", ".git/g", "1/2/3/4/deep", "1/2/3/4/5/deeper"):
            put(tmp_path / f"{name}.safetensors")
        assert found(tmp_path) == [
            ":model.safetensors",
            "1/2/3/4:deep.safetensors",
            "text/encoder:t.safetensors",
            "unet:u.safetensors",
            "vae:v.safetensors",
        ]

    def test_symlinked_folders(self, tmp_path: Path) -> None:
        put(tmp_path / "m/vae/v.safetensors")
        put(tmp_path / "elsewhere/u.safetensors")
        (tmp_path / "m/unet").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "m/vae/up").symlink_to("..")
        (tmp_path / "m/self").symlink_to("self")
        assert found(tmp_path / "m") == ["unet:u.safetensors", "vae:v.safetensors"]

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "vae/m.ckpt"])
    def test_only_pickles(self, tmp_path: Path, name: str) -> None:
        put(tmp_path / name)
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
            resolve(tmp_path)
        (tmp_path / "vae").chmod(0o700)


class TestGguf:
    PARTS = ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf")

    def put_parts(self, folder: Path) -> list[Path]:
        return [put(folder / name) for name in self.PARTS]

    def test_file(self, tmp_path: Path) -> None:
        path = put(tmp_path / "m.Q4_K.gguf")
        assert resolve(path) == Resolved(str(path), (SourcePath("", "m.Q4_K.gguf", path),))

    def test_any_part_is_all_by_the_name_of_the_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        paths = self.put_parts(tmp_path)
        put(tmp_path / "other.gguf")
        expected = Resolved(str(paths[0]), tuple(SourcePath("", path.name, path) for path in paths))
        assert [resolve(path) for path in paths] == [expected] * 3
        monkeypatch.chdir(tmp_path)
        assert resolve(self.PARTS[1]) == expected

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

    def test_directory_with_one_below(self, tmp_path: Path) -> None:
        self.put_parts(tmp_path / "Q4_K")
        assert found(tmp_path) == [f"Q4_K:{name}" for name in self.PARTS]

    def test_directory_with_several(self, tmp_path: Path) -> None:
        self.put_parts(tmp_path)
        put(tmp_path / "mmproj.gguf")
        put(tmp_path / "Q8/m.gguf")
        with pytest.raises(InvalidReferenceError) as caught:
            resolve(tmp_path)
        listed = "m-00001-of-00003.gguf, mmproj.gguf, Q8/m.gguf"
        assert str(caught.value) == f"{tmp_path}: holds several GGUF files ({listed}); give one of them"

    def test_directory_with_many(self, tmp_path: Path) -> None:
        for number in range(30):
            put(tmp_path / f"m{number:02}.gguf")
        with pytest.raises(InvalidReferenceError, match=r"m09\.gguf and 20 more\); give one of them"):
            resolve(tmp_path)

    @pytest.mark.parametrize("name", ["model.safetensors", "vae/model.safetensors"])
    def test_safetensors_win(self, tmp_path: Path, name: str) -> None:
        put(tmp_path / "m.gguf")
        put(tmp_path / "vae/n.gguf")
        put(tmp_path / name)
        assert [source.path for source in resolve(tmp_path).sources] == [tmp_path / name]


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
        assert found(tmp_path) == ["vae:diffusion_pytorch_model.safetensors"]

    def test_missing_component(self, tmp_path: Path) -> None:
        put(tmp_path / "model_index.json", self.INDEX)
        put(tmp_path / "vae/diffusion_pytorch_model.safetensors")
        with pytest.raises(NotFoundError, match=r"model_index\.json: lists component 'scheduler'"):
            resolve(tmp_path)

    def test_component_that_leads_away(self, tmp_path: Path) -> None:
        put(tmp_path / "m/model_index.json", {"../x": ["a", "b"]})
        put(tmp_path / "m/y.safetensors")
        put(tmp_path / "x/y.safetensors")
        with pytest.raises(NotFoundError, match=r"'\.\./x'"):
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
        assert found(tmp_path) == [":m.safetensors", "vae:y.safetensors"]


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
        expected = (SourcePath("", "model.safetensors", snapshot / "model.safetensors"),)
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
        snapshot = self.add(cache, "org/name")
        assert resolve("org/name").sources[0].path.parent == snapshot
        with pytest.raises(NotFoundError):
            resolve("org/name@main")
        self.add(cache, "org/name", "f" * 40)
        with pytest.raises(NotFoundError):
            resolve("org/name")

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

    @pytest.mark.parametrize("content", ["", "../..", "a/b", "..", "a" * 200 + "\nb"])
    def test_hostile_ref(self, cache: Path, content: str) -> None:
        self.add(cache, "org/name")
        put(cache / "models--org--name/refs/main", content)
        with pytest.raises(FormatError, match="does not hold a commit"):
            resolve("org/name")

    @pytest.mark.parametrize(
        "bad",
        ["a/b/c", "org/", "org/na me", "a--b/c", "org/..", "a..b/c", "-a/b", "a/b.", "müller/x", "org/name\n", "@main"],
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
        monkeypatch.setenv("HF_HUB_CACHE", "$HOME/hub")
        assert looked_in() == str(tmp_path / "home/hub")


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
            with pytest.raises(InvalidReferenceError, match=f"{name}: is a file, and a folder is needed"):
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
        return Resolved("x", (SourcePath("vae", "m", path),))

    def test_identity_and_close(self, tmp_path: Path) -> None:
        for name in ("a.safetensors", "vae/b.safetensors"):
            put(tmp_path / name, name)
        with open_sources(resolve(tmp_path)) as opened:
            fds = opened.fds
            assert [(source.component, source.file) for source in opened.sources] == [
                ("", "a.safetensors"),
                ("vae", "b.safetensors"),
            ]
            assert [os.pread(fd, 99, 0) for fd in fds] == [b"a.safetensors", b"vae/b.safetensors"]
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
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(NotFoundError, match=r"gone\.safetensors: no such file"):
            open_sources(Resolved("x", (SourcePath("", "a", path), SourcePath("", "b", tmp_path / "gone.safetensors"))))
        assert set(os.listdir("/proc/self/fd")) == before

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

    def test_too_many_open_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, flags: int) -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(WeightdError, match="Too many open files") as caught:
            open_sources(self.one(tmp_path))
        assert caught.value.exit_code == 1


def test_standard_library_only() -> None:
    code = "import sys, weightd.resolve; sys.exit(bool({'grpc', 'torch', 'google', 'numpy'} & set(sys.modules)))"
    root = str(Path(module.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": root}, timeout=30)
