"""Keeping what follows from parameters: when it was made, and how to tell that they changed."""

import contextlib

import torch
from torch import Tensor


def state_of(*tensors: Tensor) -> tuple:
    """Differs after a tensor was replaced or changed in place.

    A change through ``.data`` and a step of a fused optimiser leave it as it is.  Inference tensors
    do not count their changes, and compiled code cannot ask: it notices other tensors by itself.
    """
    if torch.compiler.is_compiling():
        return ()
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)


@contextlib.contextmanager
def to_be_kept():
    """What is computed inside may be used by a later call that trains."""
    if torch.compiler.is_compiling():
        with torch.no_grad():
            yield
    else:  # a tensor made in inference mode may not be saved for a backward
        with torch.inference_mode(False), torch.no_grad():
            yield
