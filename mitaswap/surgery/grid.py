"""The patch grid of the forward pass under way, read from a feature map rather than guessed from a
token count.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mitaswap.surgery.tap import InputTap, first_tensor


class GridTracker:
    """Remembers the last (h, w) that one module saw.

    Hooked to the convolution that cuts the image into patches (its output is [B, C, h, w]), or, for
    attention that works on feature maps, to the attention module itself (whose input is [B, h, w,
    C] or [B, C, h, w]). Its hooks are bound methods, so that copies and unpickled models keep their
    own tracker.

    Args:
        channels_last: whether the watched feature map is [B, h, w, C].
    """

    def __init__(self, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.grid: tuple[int, int] | None = None

    def _read(self, feature: Tensor) -> None:
        shape = feature.shape
        self.grid = (shape[1], shape[2]) if self.channels_last else (shape[2], shape[3])

    def after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook: the output is the feature map."""
        self._read(output)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: the first tensor that the module is given is the feature map."""
        self._read(first_tensor(args, kwargs))


def untrack(module: nn.Module) -> None:
    """Remove every hook of a swap from `module`, also on a copy whose hook handles are gone."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), (GridTracker, InputTap))
