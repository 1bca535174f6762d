"""A Hugging Face cache with one revision, as huggingface_hub lays it out: blobs by digest, links by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def blob_name(content: bytes, *, lfs: bool) -> str:
    """SHA-256 of what is stored with LFS, git's SHA-1 of the rest."""
    if lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def put(cache: Path, repository: str, folder: Path) -> Path:
    """Enter the files of a folder as a revision of a repository; returns the revision's folder."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    (home / "blobs").mkdir()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        blob = home / "blobs" / blob_name(content, lfs=path.suffix in (".safetensors", ".gguf"))
        blob.write_bytes(content)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
