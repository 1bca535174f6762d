"""The committed stubs are what the protos generate, and import under every protobuf that pyproject.toml allows.

Needs the environment that `make .venv-protos/.installed` (a part of `make test`) makes: the pinned generator, and the
protobuf runtimes in folders of their own. A folder named by WEIGHTD_PROTOS_VENV is taken instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("WEIGHTD_PROTOS_VENV", ROOT / ".venv-protos")).absolute()
STUBS = {  # where the stubs of each folder of protos are
    "weightd/v1": ROOT / "client" / "weightd" / "_proto" / "v1",
    "weightd/internal": ROOT / "daemon" / "weightd_daemon" / "loader" / "_proto",
    "weightd_fleet/v1": ROOT / "fleet" / "weightd_fleet" / "_proto" / "v1",
}

needs_venv = pytest.mark.skipif(
    not (VENV / ".installed").exists(),
    reason=f"STUBS NOT CHECKED: {VENV.name} is absent; `make {VENV.name}/.installed` makes it",
)

USE = """
import importlib, sys
import google.protobuf
major, *modules = sys.argv[1:]  # of modules their full names
assert google.protobuf.__version__.split(".")[0] == major, (google.protobuf.__version__, google.protobuf.__file__)
for module in modules:
    importlib.import_module(module)
from weightd._proto.v1 import handles_pb2
manifest = handles_pb2.Manifest(
    content_digest="sha256:00", components=["vae"], names=["a", "b"], ranks=[2, 0], dimensions=[3, 4],
    dtypes=[handles_pb2.DTYPE_BF16, handles_pb2.DTYPE_F32], offsets=[0, 1 << 40], lengths=[24, 4], digests=bytes(32),
    files=[handles_pb2.ManifestFile(file="x.safetensors", metadata={"format": "pt"}, has_metadata=True)],
)
again = handles_pb2.Manifest.FromString(manifest.SerializeToString())
assert again == manifest
assert list(again.offsets) == [0, 1 << 40] and again.files[0].metadata["format"] == "pt"
from weightd_daemon.loader._proto import loader_pb2
message = loader_pb2.ToLoader(
    candidate=loader_pb2.Candidates(found=[True, False], blobs=[1 << 40, 0], segments=[1, 0], offsets=[256, 0]),
    segments=[loader_pb2.Segment(number=1, size=4096), loader_pb2.Segment(number=2, size=4096, handle=bytes(64))],
)
again = loader_pb2.ToLoader.FromString(message.SerializeToString())
assert (again, again.WhichOneof("body")) == (message, "candidate")
assert [segment.HasField("handle") for segment in again.segments] == [False, True]
print("ok", len(modules))
"""


@needs_venv
def test_stubs_are_what_the_protos_generate() -> None:
    done = subprocess.run(
        [VENV / "bin" / "python", ROOT / "tools" / "gen_protos.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_proto_has_its_stub() -> None:
    protos = ROOT / "protos"
    folders = {str(path.relative_to(protos)): path for path in protos.glob("*/*") if path.is_dir()}
    assert folders.keys() == STUBS.keys()
    for name, stubs in STUBS.items():
        stems = {path.stem for path in folders[name].glob("*.proto")}
        assert stems
        assert stems == {path.stem.removesuffix("_pb2") for path in stubs.glob("*_pb2.py")}


@needs_venv
@pytest.mark.parametrize("major", [5, 6, 7])
def test_stubs_import_under_protobuf(major: int) -> None:
    runtime = VENV / "runtimes" / f"protobuf-{major}"
    assert runtime.is_dir(), f"{runtime} is absent: remove {VENV.name}/.installed and run `make test` again"
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])
        for stubs in STUBS.values()
        for path in stubs.glob("*_pb2.py")
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE, str(major), *modules],
        env={"PYTHONPATH": f"{runtime}:{ROOT / 'client'}:{ROOT / 'daemon'}:{ROOT / 'fleet'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ok", str(len(modules))]
