"""Mutations of checkpoint files' headers: refused clearly, or read as the formats' own packages read them."""

from __future__ import annotations

import pytest

from support.fuzzing.mutation_runs import run_mutations
from support.gguf_files import VALID as GGUF
from support.malformed import VALID as SAFETENSORS


@pytest.mark.parametrize(("target", "valid"), [("safetensors", SAFETENSORS), ("gguf", GGUF)])
def test_mutations(target: str, valid: bytes) -> None:
    run_mutations(target, 3000, valid)
