"""Working precision of the references."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def working(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype to compute in: float32 for half precisions, their own otherwise.

    Scores decide which keys are the top k; in bfloat16 many tie and the set would depend on the
    order of summation.
    """
    low = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t.dtype in low else t for t in tensors)


def outside_autocast(method: Callable[..., R]) -> Callable[..., R]:
    """A mechanism's method (self, q, ...) with autocast switched off inside.

    Autocast would take the matrix products of `working` tensors back to half precision, and with
    them the scores that decide the top k: MiTA's outputs would depend on the ties.
    """

    @functools.wraps(method)
    def run(self: Any, q: Tensor, *args: Any, **kwargs: Any) -> R:
        device = q.device.type
        if device == "meta":  # knows no autocast, and asking it raises
            return method(self, q, *args, **kwargs)
        # a compiler traces the context but, in some versions, not the question
        if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device):
            return method(self, q, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(self, q, *args, **kwargs)

    return run
