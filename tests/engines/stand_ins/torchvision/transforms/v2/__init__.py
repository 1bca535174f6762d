"""Stand-in: the second version of the transforms, as little as the first."""

from . import functional

__all__ = ["functional"]
