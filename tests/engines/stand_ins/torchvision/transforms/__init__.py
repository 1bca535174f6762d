"""Stand-in: transforms that are named, and not made."""

from . import functional
from .functional import InterpolationMode

__all__ = ["InterpolationMode", "functional"]
