"""Protect shared weights and frameworks from each other: serialise loads, refuse writes, explain failed training."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from weightd.errors import SharedWeightsError

from .sharing import is_shared, shared_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

log = logging.getLogger(__name__)

_PRIVATE = "call make_private on that model first"


# -- one load at a time ------------------------------------------------------------------------------------------------

_loading = threading.RLock()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Let one thread of the process load at a time, for frameworks replace parts of torch while they do.

    accelerate's `init_empty_weights` replaces `register_parameter` of all modules, and transformers the default dtype
    and initialisers: what another thread loads meanwhile stays without memory.
    """
    with _loading:
        yield


def _new_lock() -> None:
    """In a forked child, for the thread that had the lock is not there."""
    global _loading
    _loading = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)


# -- writers -----------------------------------------------------------------------------------------------------------


def refuse_while_shared(cls: Any, method: str, concerned: Callable[..., Iterable[torch.nn.Module]]) -> None:
    """Let a method that writes into weights refuse while they are shared.

    They are those of the modules that `concerned`, which is called as the method is, names. On the class: what an
    instance keeps would be pickled and copied with it.
    """
    original = getattr(cls, method)

    @functools.wraps(original)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module in concerned(self, *args, **kwargs):
            if is_shared(module):
                raise SharedWeightsError(
                    f"{method} writes into weights, and those of {type(module).__name__} are shared with other "
                    f"processes: {_PRIVATE}"
                )
        return original(self, *args, **kwargs)

    setattr(cls, method, guarded)


def loaded_in_place(
    module: torch.nn.Module, state_dict: object = None, strict: bool = True, assign: bool = False
) -> list[torch.nn.Module]:
    """What `Module.load_state_dict` writes to, called with these arguments."""
    return [] if assign else [module]


# -- training ----------------------------------------------------------------------------------------------------------

_told: WeakSet[torch.nn.Module] = WeakSet()


def explain_training(cls: Any) -> None:
    """Let modules of a class say that shared weights cannot be trained, where training begins.

    `train()` warns, once for each module: adapters and new heads may be trained on top of what is shared.
    `requires_grad_()` refuses, for an optimiser's step would write.
    """
    original = cls.train

    @functools.wraps(original)
    def train(self: Any, mode: bool = True) -> Any:
        if mode and self not in _told and is_shared(self):
            _told.update(self.modules())  # which `train` comes to next
            log.warning(
                "%s: its weights are shared with other processes and stay as they are; only what is private is "
                "trained. To train them, %s",
                type(self).__name__,
                _PRIVATE,
            )
        return original(self, mode)

    cls.train = train
    refuse_while_shared(cls, "requires_grad_", lambda module, requires_grad=True: [module] if requires_grad else [])


def _explain_backward() -> None:
    """Add our words to torch's where a loss needs no gradient because all weights are shared."""
    original = torch.autograd.backward

    @functools.wraps(original)
    def backward(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except RuntimeError as error:
            shared = shared_modules() if "does not require grad" in str(error) else []
            if not shared:
                raise
            names = ", ".join(sorted({type(module).__name__ for module in shared}))
            raise SharedWeightsError(
                f"nothing here can be trained: weights of {names} are shared with other processes; {_PRIVATE}, or "
                f"train an adapter on top of it ({error})"
            ) from error

    torch.autograd.backward = backward


_explain_backward()
