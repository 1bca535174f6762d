"""What engines load as plugins in each of their processes when tests run them."""

from __future__ import annotations

from pathlib import Path

ENTRY_POINTS = """\
[vllm.general_plugins]
weightd_tests = support.plugins:for_tests
"""


def install(folder: Path) -> Path:
    """Have a distribution with these plugins in a folder, which is to be on the path of Python's modules."""
    distribution = folder / "weightd_tests-0.dist-info"
    distribution.mkdir(parents=True, exist_ok=True)
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: weightd-tests\nVersion: 0\n")
    (distribution / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def for_tests() -> None:
    """Called by vLLM in each process: oneDNN is off there, and the process ends with the one that started it."""
    import multiprocessing

    from support import leash

    without_onednn()
    if multiprocessing.parent_process() is not None:
        leash.hold()


def without_onednn() -> None:
    """Have vLLM's CPU backend multiply with the weights as they are loaded, and not with a packed copy of them."""
    import vllm._custom_ops as operations

    operations._supports_onednn = False
