"""The seam: a subclass of the attention module's class whose one attention call is diverted.

Nothing of the upstream forward is copied by hand. The call goes to a mechanism by the cheapest way
that fits:

- `source`: the class's own forward calls `scaled_dot_product_attention`. It is compiled again from
  its own source with that one call turned into `self._mitaswap_attend`, once per class.
- `interface`: a Hugging Face module asks its config which attention function to use. It gets a
  shadow config that names ours, which is the library's own sdpa function, diverted in the same way.
- `mode`: anywhere else a TorchFunctionMode diverts the call while the module's forward runs.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mitaswap.errors import MitaswapError, SwapError
from mitaswap.mechanisms import Mechanism
from mitaswap.surgery.divert import divert
from mitaswap.surgery.grid import GridTracker
from mitaswap.surgery.interface import no_map, register_interface, uses_interface
from mitaswap.surgery.tap import InputTap
from mitaswap.tokens import TokenLayout

if TYPE_CHECKING:
    from mitaswap.surgery.sites import Site

Observer = Callable[[str, Mechanism, Tensor, Tensor, TokenLayout, float], None]


class Shared:
    """What the seams of one swapped model share: at most one observer of (path, mechanism, q, k,
    layout, scale).
    """

    observer: Observer | None = None


class Seam:
    """The state of one swapped module.

    Args:
        site: the site as it was found.
        tracker: tells the grid of the forward under way.
        shared: common to all seams of the model.
        config: the module's own Hugging Face config, put back by revert; None elsewhere.
        tap: holds the module's input, where the mechanism needs it.
    """

    def __init__(
        self,
        site: Site,
        tracker: GridTracker,
        shared: Shared,
        config: Any = None,
        tap: InputTap | None = None,
    ) -> None:
        assert site.layout is not None
        self.site = site
        self.tracker = tracker
        self.shared = shared
        self.config = config
        self.tap = tap
        self.layout = self.checked = site.layout
        self.tokens = site.layout.tokens

    def layout_now(self, tokens: int) -> TokenLayout:
        """The layout of a sequence of `tokens` tokens in this forward.

        Raises:
            SwapError: tokens were dropped, merged or added since the patches were cut.
        """
        grid = self.tracker.grid
        if grid is not None and grid != self.layout.grid:
            self.layout = TokenLayout(self.layout.prefix, grid, self.layout.suffix)
            self.tokens = self.layout.tokens
        if tokens != self.tokens:
            raise SwapError(
                f"{self.site.path}: got {tokens} tokens, but the image was cut into {self.layout} "
                f"= {self.tokens}. Patch dropout, token merging and packed images change the "
                "sequence behind the grid; switch them off (timm: patch_drop_rate=0), or revert "
                "this layer."
            )
        return self.layout

    def check(self, mechanism: Mechanism, head_dim: int) -> None:
        """Whether the mechanism's options fit the layout; asked once for each new layout."""
        try:
            mechanism.check(self.layout, head_dim)
        except MitaswapError as error:
            raise SwapError(f"{self.site.path}: {error}") from None
        self.checked = self.layout


class Swapped:
    """Mixed into the class of a swapped module."""

    _mitaswap: Seam
    _mitaswap_original: type[nn.Module]
    mitaswap: Mechanism

    @property
    def fused_attn(self) -> bool:
        """timm's switch between sdpa and hand-written softmax: always on here, the latter would
        bypass the seam.
        """
        return True

    @fused_attn.setter
    def fused_attn(self, value: bool) -> None:
        if not value:
            raise SwapError(
                f"{self._mitaswap.site.path} is swapped to {self.mitaswap.spec}: fused_attn=False "
                "would bypass it. Call mitaswap.revert(model) first."
            )

    def _mitaswap_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Takes the place of `scaled_dot_product_attention`, with its signature."""
        seam, mechanism = self._mitaswap, self.mitaswap
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        layout = seam.layout_now(query.shape[2])
        if layout is not seam.checked:
            seam.check(mechanism, query.shape[3])
        extra: dict[str, Any] = {}
        if attn_mask is not None:
            self._mitaswap_require("bias", "an attention mask or bias")
            extra["attn_mask"] = attn_mask
        if is_causal:
            self._mitaswap_require("causal", "is_causal=True")
            extra["is_causal"] = True
        if dropout_p > 0.0:
            self._mitaswap_require("dropout", f"attention dropout p={dropout_p}")
            extra["dropout_p"] = dropout_p
        if seam.tap is not None:
            extra["x"] = seam.tap.take(query)
        if scale is None:
            scale = 1.0 / math.sqrt(query.shape[3])
        if seam.shared.observer is not None:
            seam.shared.observer(seam.site.path, mechanism, query, key, layout, scale)
        # `run`, not a call: what a call would check is checked above, and small models feel it
        return mechanism.run(query, key, value, layout, scale, extra)

    def _mitaswap_require(self, part: str, what: str) -> None:
        if part not in self.mitaswap.supports:
            raise SwapError(
                f"{self._mitaswap.site.path}: this forward brings {what}, which "
                f"{self.mitaswap.spec} cannot honour. {_INSTEAD.get(part, '')}"
                "Mechanisms that can: see `mitaswap ls`; or leave this layer out with layers=..."
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._mitaswap_original,), self.__dict__


#: what switches off what a mechanism cannot honour
_INSTEAD = {
    "dropout": "Build the network without it (timm: attn_drop_rate=0; transformers: "
    "attention_probs_dropout_prob=0). "
}


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls: Any = seam_class(original)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def seam_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` with its attention call diverted; one per class, picklable."""
    members: dict[str, Any] = {
        "_mitaswap_original": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    if uses_interface(original):
        register_interface()
    else:
        forward = divert(original.forward, "_mitaswap_attend") or _diverting(original)
        names = list(inspect.signature(original.forward).parameters)
        if "output_attentions" in names:
            forward = _without_map(forward, names.index("output_attentions") - 1)
        members["forward"] = forward
    return type(f"Swapped{original.__name__}", (Swapped, original), members)


class _Divert(TorchFunctionMode):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.module._mitaswap_attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _diverting(original: type[nn.Module]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Divert(self):
            return original.forward(self, *args, **kwargs)

    return forward


def _without_map(forward: Callable[..., Any], position: int) -> Callable[..., Any]:
    """`forward`, refusing output_attentions=True, which it takes at `position` after self."""

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions") or (len(args) > position and args[position]):
            raise no_map(self)
        return forward(self, *args, **kwargs)

    return checked
