"""Stand-in: functions that are named, and refuse."""

import enum


class InterpolationMode(enum.Enum):
    """Named in signatures and tables."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def pil_to_tensor(image: object) -> None:
    """Refuse to convert an image."""
    raise NotImplementedError("torchvision is a stand-in")
