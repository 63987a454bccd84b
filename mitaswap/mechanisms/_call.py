"""What a call of a mechanism by itself must bring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mitaswap.errors import MitaswapError, unknown
from mitaswap.tokens import TokenLayout

if TYPE_CHECKING:
    from mitaswap.mechanisms._base import Mechanism

#: keyword of an attention call -> the entry of `supports` or `needs` that allows it
PART = {
    "attn_mask": "bias",
    "is_causal": "causal",
    "dropout_p": "dropout",
    "x": "x",
    "project": "project",
}


def check_call(
    part: Mechanism, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, extra: dict[str, Any]
) -> None:
    """Raise `MitaswapError` if shapes, layout and options do not fit, or `extra` holds what the
    mechanism cannot honour, or lacks the x or the projections that it needs.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise MitaswapError(
            "q, k, v must be [B, H, N, D] of one shape (v may have its own D), got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    layout.check(q.shape[2], "q")
    part.fit(layout, q.shape[3])
    for name in extra:
        if name not in PART:
            raise unknown("argument of an attention call", name, PART)
        if PART[name] not in part.supports | part.needs:
            raise MitaswapError(
                f"{part.spec} cannot honour {name}; only mechanisms that support it can"
            )
    x = extra.get("x")
    if "x" in part.needs and (x is None or x.shape[:2] != (q.shape[0], q.shape[2])):
        raise MitaswapError(
            f"{part.spec} needs the attention module's input x, [B, N, C] = "
            f"[{q.shape[0]}, {q.shape[2]}, C], got {'none' if x is None else list(x.shape)}; "
            "call it with x=..., or swap it into a model, which hands x over"
        )
    if "project" in part.needs and not callable(extra.get("project")):
        instead = part.spec.with_options(**part.unprojected) if part.unprojected else ""
        raise MitaswapError(
            f"{part.spec} needs the attention module's key and value projections, project(rows "
            "[B, M, C]) -> keys, values [B, H, M, D], got "
            f"{type(extra['project']).__name__ if 'project' in extra else 'none'}; call it "
            "with project=..., or swap it into a model, which hands them over"
            f"{instead and f', or use {instead}'}"
        )
