"""Python imports this at its start where this folder is on the path: the process then ends when its parent does."""

from __future__ import annotations

from support import leash

leash.hold()
