"""The patch grid of the forward pass under way, read from a feature map rather than guessed from a
token count, and the token layout that follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

from torch import Tensor, nn

from mitaswap.mechanisms import Mechanism
from mitaswap.surgery.tap import InputTap, first_tensor
from mitaswap.tokens import TokenLayout

Observer = Callable[[str, Mechanism, Tensor, Tensor, TokenLayout, float], None]


class GridTracker:
    """Remembers the last (h, w) that one module saw, for the seams that attend over its patches.

    Hooked to the convolution that cuts the image into patches (its output is [B, C, h, w]), or, for
    attention that works on feature maps, to the attention module itself (whose input is [B, h, w,
    C] or [B, C, h, w]). Its hooks are bound methods, so that copies and unpickled models keep their
    own tracker.

    Args:
        layout: token layout of the seams on the example.
        channels_last: whether the input feature map is [B, h, w, C].
    """

    def __init__(self, layout: TokenLayout, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.grid = layout.grid
        self.observer: Observer | None = None
        self._layout = layout

    def after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook: the output is the feature map."""
        self.grid = (output.shape[2], output.shape[3])

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: the first tensor that the module is given is the feature map, or tokens
        [B, N, C] without a grid, which are one row.
        """
        shape = first_tensor(args, kwargs).shape
        if len(shape) == 3:
            self.grid = (1, shape[1])
            return
        self.grid = (shape[1], shape[2]) if self.channels_last else (shape[2], shape[3])

    def layout(self) -> TokenLayout:
        """The layout of this forward's sequences, the same object until the grid changes."""
        if self.grid != self._layout.grid:
            self._layout = self.new_layout()
        return self._layout

    def new_layout(self) -> TokenLayout:
        """The same as a new object, for compiled forwards: nothing but this forward's own grid is
        read, whereas a look at the last one would be guarded on in each layer, and a recompilation
        whenever two image sizes take turns.
        """
        # in plain numbers also where shapes are dynamic: a mechanism is compiled anew for each grid
        grid = (index(self.grid[0]), index(self.grid[1]))
        return TokenLayout(self._layout.prefix, grid, self._layout.suffix)


def untrack(module: nn.Module) -> None:
    """Remove every hook of a swap from `module`, also on a copy whose hook handles are gone."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), (GridTracker, InputTap))
