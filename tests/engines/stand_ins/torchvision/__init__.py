"""Stand-in for torchvision: the names that SGLang and transformers import, and nothing that works on an image.

PyPI's torchvision is a CUDA build, whose operators the CPU build of torch does not know; text models use none of them.
"""

__version__ = "0.28.0"
