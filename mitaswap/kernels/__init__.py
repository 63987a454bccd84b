"""Triton kernels, one operation per file, imported when one is first called: they know tensors,
never mechanisms or models. Three are in CUDA C++ (`nvrtc.py`), for what Triton cannot say.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

#: what the kernels compute in; sums and scores are float32 in all
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unfit(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What no kernel can take of q, k, v [B, H, N, D], in words; empty where they are fine."""
    dim = q.shape[3]
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors on {q.device.type}, only for CUDA"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"{q.dtype}, {k.dtype}, {v.dtype}, only for one of float16, bfloat16, float32"
    if v.shape[3] != dim or dim % 8 or not 16 <= dim <= 256:
        return f"head dimensions {dim}, {v.shape[3]}, only for one multiple of 8 from 16 to 256"
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_get_level(q) >= 0:
        return "tensors under a function transform (vmap, jvp)"
    return ""
