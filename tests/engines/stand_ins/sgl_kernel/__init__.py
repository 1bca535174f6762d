"""Stand-in for SGLang's kernels: on a CPU, with attention in torch, it calls none of them.

PyPI's package of that name needs CUDA's libraries to be imported. A kernel can be imported from this one, and refuses
to be called.
"""

from collections.abc import Callable


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel is a stand-in: {name} was called")

    return refuse
