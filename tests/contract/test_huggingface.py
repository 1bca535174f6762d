"""The Hugging Face cache means what huggingface_hub says that it means, offline: where it is, and what a revision is.

weightd reads it without the package, which the client does not need; here the package itself is asked.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weightd._references.huggingface import _cache_of_environment
from weightd.errors import WeightdError
from weightd.resolve import folder_of

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")
utils = pytest.importorskip("huggingface_hub.utils")

A, B = "a" * 40, "b" * 40
FILE = "model.safetensors"
COMMITS = [A, B, "c0ffee", "main", "v1"]
CONTENTS = [A, B, "c0ffee", f"{A}\n", f" {A}", "", ".", "gone", "main"]
REVISIONS = ["main", "v1", "refs/pr/1", "feature/x", A, B, A[:7], "c0ffee", A.upper(), "HEAD"]
REFS = ["main", "v1", "refs/pr/1", "feature/x", A]


def lay_out(cache: Path, snapshots: set[str], refs: dict[str, str], *, folders: bool) -> None:
    """The repository org/name: a file in each snapshot, refs with any content, or folders where refs should be."""
    repository = cache / "models--org--name"
    for commit in snapshots:
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / FILE).write_text(commit)
    for name, content in refs.items():
        path = repository / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if folders:
            path.mkdir()
        else:
            path.write_text(content)


def theirs(cache: Path, revision: str | None) -> str | None:
    """What huggingface_hub has for a file of that revision."""
    try:
        path = hub.hf_hub_download("org/name", FILE, revision=revision, cache_dir=cache, local_files_only=True)
    except (errors.LocalEntryNotFoundError, IsADirectoryError):
        return None
    return Path(path).read_text()


def ours(revision: str | None) -> str | None:
    try:
        folder = folder_of("org/name" if revision is None else f"org/name@{revision}")
    except WeightdError:
        return None
    return (folder / FILE).read_text()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    snapshots=st.sets(st.sampled_from(COMMITS)),
    refs=st.dictionaries(st.sampled_from(REFS), st.sampled_from(CONTENTS)),
    folders=st.booleans(),
)
@example(snapshots={A}, refs={}, folders=False)
@example(snapshots={"main"}, refs={}, folders=False)
@example(snapshots={A, B}, refs={"main": B, A: B}, folders=False)
@example(snapshots={A}, refs={"main": f"{A}\n"}, folders=False)
def test_every_state_of_a_repository(
    snapshots: set[str], refs: dict[str, str], folders: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
        cache = Path(folder)
        patch.setattr(constants, "HF_HUB_CACHE", folder)
        patch.chdir(folder)
        lay_out(cache, snapshots, refs, folders=folders)
        for revision in (None, *REVISIONS):
            assert ours(revision) == theirs(cache, revision), revision


VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")
VALUES = (None, "", "/somewhere/$NAME", "~/x", "relative/../y")
ASK = """
import importlib, json, os, sys
from huggingface_hub import constants
found = []
for environment in json.load(sys.stdin):
    os.environ.clear()
    os.environ.update(environment)
    found.append(importlib.reload(constants).HF_HUB_CACHE)
print(json.dumps(found))
"""


def test_every_variable_says_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"HOME": "/home/ada", "NAME": "$HOME", "PATH": os.environ["PATH"]}
    environments = [
        base | {variable: value for variable, value in zip(VARIABLES, values, strict=True) if value is not None}
        for values in itertools.product(VALUES, repeat=len(VARIABLES))
    ]
    asked = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(environments),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    expected = json.loads(asked.stdout)
    assert len(set(expected)) > 10
    for environment, folder in zip(environments, expected, strict=True):
        with monkeypatch.context() as patch:
            for variable in VARIABLES:
                patch.delenv(variable, raising=False)
            for variable, value in environment.items():
                patch.setenv(variable, value)
            assert _cache_of_environment() == folder, environment


@pytest.mark.parametrize(
    "name",
    ["gpt2", "org/name", "a/b/c", "org/", "/x", "a--b/c", "org/..", "a..b/c", "-a/b", "a/b.", "m\u00fc/x", "a.git",
     "_a/b_", "a" * 97, "a" * 96, "a b/c", "a/b\n", "o.r.g/n_a-m.e", "org/name.git", "x" * 96 + "/" + "y" * 96,
     "org/m.gguf", "m.safetensors", "org/m--n"],
)  # fmt: skip
def test_every_name_of_a_repository(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    try:
        utils.validate_repo_id(name)
        valid = True
    except errors.HFValidationError:
        valid = False
    with pytest.raises(WeightdError) as caught:
        folder_of(name)
    assert (caught.value.reason == "NOT_FOUND") == (valid or name.startswith("/"))
