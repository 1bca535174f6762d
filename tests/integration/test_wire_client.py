"""The example client without weightd, with stubs made by the recipe in its docstring, and nothing of ours beside it."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from support import checkpoints
from support.daemon import ROOT, Daemon

EXAMPLE = ROOT / "examples" / "wire_client.py"
VENV = Path(os.environ.get("WEIGHTD_PROTOS_VENV", ROOT / ".venv-protos")).absolute()
MIB = 1 << 20


def test_it_is_short_and_imports_nothing_of_weightd() -> None:
    tree = ast.parse(EXAMPLE.read_text())
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("weightd")} == {"weightd_wire"}
    code = EXAMPLE.read_text().partition('"""\n\n')[2].splitlines()
    assert len([line for line in code if line.strip() and not line.strip().startswith("#")]) <= 60


@pytest.mark.skipif(not (VENV / ".installed").exists(), reason=f"{VENV.name} is absent; `make {VENV.name}/.installed`")
def test_it_lists_attaches_and_reads(daemon: Daemon, tmp_path: Path) -> None:
    recipe = re.findall(r"^    (\S.*)$", EXAMPLE.read_text().partition('"""\n\n')[0], re.MULTILINE)
    *steps, run = recipe
    variables = {"PATH": f"{VENV}/bin:/usr/bin:/bin"}
    script = " && ".join(steps).replace("PROTOS", str(ROOT / "protos"))
    subprocess.run(["/bin/sh", "-c", script], cwd=tmp_path, env=variables, check=True, timeout=60)
    run = run.replace("wire_client.py", str(EXAMPLE)).replace("/run/weightd/weightd.sock", str(daemon.socket))
    path = checkpoints.write_random(tmp_path / "m.safetensors", 3, MIB)
    with daemon.connect() as client:
        client.load(path, name="m")
        done = subprocess.run(
            ["/bin/sh", "-c", run.replace("NAME", "m")],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        listed, tensor = done.stdout.splitlines()
        assert listed == f"m: 3 tensors, {3 * MIB} bytes"
        with client.attach("m") as attached:
            (info,) = [one for one in attached.tensors.values() if tensor.startswith(f"{one.name}: ")]
            digest = hashlib.sha256(attached.buffer(info.name)).hexdigest()
        assert tensor == f"{info.name}: {info.dtype} {list(info.shape)}, sha256 {digest}"
        missing = subprocess.run(
            ["/bin/sh", "-c", run.replace("NAME", "nothing")],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (missing.returncode, missing.stderr.split(":")[0]) == (1, "NOT_FOUND")
