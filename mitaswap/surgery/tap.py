"""The input of an attention module, kept from the start of its forward to its attention call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mitaswap.errors import SwapError


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first tensor among the arguments of a forward, None where there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class InputTap:
    """Holds x between the module's pre-hook and the mechanism that reads it, no longer.

    Its hook is a bound method, so that copies and unpickled models keep their own tap.

    Args:
        path: the site, for error messages.
        channels_last: layout of feature maps where the module works on them, [B, h, w, C] or
            [B, C, h, w].
    """

    def __init__(self, path: str, channels_last: bool) -> None:
        self.path = path
        self.channels_last = channels_last
        self.x: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: the first tensor that the module is given is x."""
        self.x = first_tensor(args, kwargs)

    def take(self, like: Tensor) -> Tensor:
        """x as [B, N, C], in the dtype of `like` [B, H, N, D], and forgotten here.

        Raises:
            SwapError: the module's input is not one row per token.
        """
        x, self.x = self.x, None
        if x is not None and x.ndim == 4:
            x = x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2)
        if x is None or x.ndim != 3 or x.shape[:2] != (like.shape[0], like.shape[2]):
            got = "none" if x is None else str(list(x.shape))
            raise SwapError(
                f"{self.path}: its mechanism needs the module's input, one row for each of the "
                f"{like.shape[2]} tokens, got {got}; choose a mechanism that reads q, k, v alone "
                "(`mitaswap ls` says which)"
            )
        return x.to(like.dtype)
