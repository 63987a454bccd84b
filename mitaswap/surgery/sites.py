"""Attention sites: what the dry forward saw, judged. A site is swappable, or it says why not and
what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mitaswap.errors import SwapError
from mitaswap.surgery.interface import has_interface, is_shadow
from mitaswap.surgery.known import refusal, suffix_tokens
from mitaswap.surgery.projections import Projections
from mitaswap.surgery.seam import Swapped
from mitaswap.surgery.witness import Call, example_input, witness
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class Site:
    """One attention module of a network.

    Args:
        path: qualified module name.
        module: class name of the module.
        heads: number of heads.
        head_dim: width of one head's queries and keys.
        tokens: length of the sequence on the example.
        value_dim: width of one head's values.
        width: channels of the module's input.
        layout: token layout on the example; None where the grid is not known.
        bias: "none", "bias" (additive, e.g. relative positions), "mask" or "causal".
        scale: factor of q k^T, None for 1 / sqrt(head_dim).
        grid_from: module whose feature map tells the grid at run time (the site itself, or a
            convolution).
        channels_last: layout of that feature map.
        reason: why the site cannot be swapped; None when it can.
        mechanism: spec of the mechanism that is swapped in now, if any.
        gridless: whether all that is missing is the grid: mechanisms that need none run here where
            the layer is asked for by name.
        projections: which of its submodules make keys and values of the module's input; None where
            no submodule alone does.
    """

    path: str
    module: str
    heads: int
    head_dim: int
    tokens: int
    layout: TokenLayout | None = None
    bias: str = "none"
    scale: float | None = None
    grid_from: str = ""
    channels_last: bool = False
    reason: str | None = None
    mechanism: str | None = None
    value_dim: int = 0
    width: int = 0
    gridless: bool = False
    projections: Projections | None = None

    @property
    def swappable(self) -> bool:
        """Whether some mechanism can run here."""
        return self.reason is None

    def as_one_row(self) -> Site:
        """A site without a grid as mechanisms see it that need none: as many tokens as its input
        has.
        """
        return replace(
            self, layout=TokenLayout(0, (1, self.tokens)), grid_from=self.path, reason=None
        )


def walk(
    model: nn.Module,
    example: Tensor | Mapping[str, Any] | None = None,
    img_size: tuple[int, int] | None = None,
) -> list[Site]:
    """The attention sites of `model`, in the order of its forward pass.

    Args:
        model: a timm or Hugging Face vision transformer, or any network that computes attention
            through `torch.nn.functional.scaled_dot_product_attention`. It is run once, and left
            unchanged.
        example: an input batch, or keyword arguments of the forward; by default random images of
            the model's size.
        img_size: height and width of those random images in pixels.

    Returns:
        Sites that can be swapped and sites that cannot, each of the latter with its reason. Sites
        that are swapped already are reported as they were when they were swapped.

    Raises:
        MitaswapError: the input size is unknown, or the model does not run on an image of
            `img_size`.
    """
    if example is None:
        example = example_input(model, img_size)
    images = _images(example)
    try:
        calls = witness(model, example)
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise SwapError(
            f"{type(model).__name__} does not run on an input of shape {list(images.shape)}: "
            f"{str(error).rstrip('.')}. Fixed-size models need their own size; timm's take "
            "img_size=H,W or dynamic_img_size=true. Models with other inputs need "
            "example={name: tensor, ...}."
        ) from error
    modules = dict(model.named_modules())
    count = Counter(call.path for call in calls)
    judged: dict[str, Site] = {}
    for call in calls:
        if isinstance(modules[call.path.partition(".mitaswap")[0]], Swapped):
            continue  # what a mechanism does inside is no site
        if call.path not in judged:
            judged[call.path] = _judge(model, modules, call, count[call.path], len(images))
    for path, module in modules.items():
        if ".mitaswap" in path and isinstance(modules[path.partition(".mitaswap")[0]], Swapped):
            continue
        if isinstance(module, Swapped):
            judged[path] = replace(module._mitaswap.site, mechanism=str(module.mitaswap.spec))
        elif path not in judged and (what := _unseen(module)):
            judged[path] = _by_hand(model, module, path, 0, what)
        elif path not in judged and (known := refusal(module)):
            # by hand, with a map that is not square: the witness does not know it for attention
            judged[path] = replace(
                _by_hand(model, module, path, 0, "its map by hand"), reason=known
            )
    order = {path: i for i, path in enumerate(modules)}
    return sorted(judged.values(), key=lambda site: order[site.path])


def _images(example: Tensor | Mapping[str, Any]) -> Tensor:
    if not isinstance(example, Mapping):
        return example
    tensors = [value for value in example.values() if isinstance(value, Tensor)]
    if not tensors:
        raise SwapError(
            f"the example {dict(example)!r} holds no tensor; give {{name: tensor, ...}}"
        )
    return max(tensors, key=lambda tensor: tensor.ndim)  # pixels, beside tokens and masks


def _judge(
    model: nn.Module, modules: dict[str, nn.Module], call: Call, times: int, batch: int
) -> Site:
    module = modules[call.path]
    what = _unseen(module) or ("its attention map by hand" if call.by_hand else None)
    if what:
        site = _by_hand(model, module, call.path, call.q[-2], what)
        return replace(site, reason=refusal(module) or site.reason)
    site = Site(
        path=call.path,
        module=type(module).__name__,
        heads=call.q[1] if len(call.q) == 4 else 0,
        head_dim=call.q[-1],
        tokens=call.q[-2],
        bias="causal" if call.causal else call.mask,
        scale=call.scale,
        value_dim=call.v[-1],
        width=call.inputs[-1] if len(call.inputs) == 3 else 0,
        projections=call.projections,
    )
    reason = refusal(module) or _call_reason(call, times, batch)
    if reason:
        return replace(site, reason=reason)
    return _with_grid(site, model, modules, call)


def _call_reason(call: Call, times: int, batch: int) -> str | None:
    if call.causal:
        return "causal attention: a text tower, whose tokens have no grid"
    if len(call.q) != 4:
        return f"its attention call is {len(call.q)}-dimensional {list(call.q)}, not [B, H, N, D]"
    if call.q[2] != call.k[2]:
        return f"{call.q[2]} queries but {call.k[2]} keys: pooling, cross or class attention"
    if call.q[1] != call.k[1]:
        return f"{call.q[1]} query heads but {call.k[1]} key heads"
    if times > 1:
        return f"{times} attention calls in one forward"
    if call.q[0] != batch:
        windows = call.q[0] // max(batch, 1)
        return f"attention inside windows ({windows} sequences of {call.q[2]} per image)"
    return None


def _with_grid(site: Site, model: nn.Module, modules: dict[str, nn.Module], call: Call) -> Site:
    """Find the feature map whose size explains the number of tokens, and where it stands."""
    shape = call.inputs
    if len(shape) == 4:  # attention on feature maps: [B, h, w, C], or [B, C, h, w]
        for channels_last, (h, w) in ((True, shape[1:3]), (False, shape[2:4])):
            if h * w == site.tokens:
                layout = TokenLayout(0, (h, w))
                return replace(
                    site,
                    layout=layout,
                    grid_from=site.path,
                    channels_last=channels_last,
                    width=shape[3] if channels_last else shape[1],
                )
    suffix, unplaced = suffix_tokens(model, modules[site.path]), None
    for path, h, w in reversed(call.features):
        special = site.tokens - h * w
        if call.place is not None:
            before, first, count, after = call.place
            if (first, count) == (0, h * w):
                return replace(site, layout=TokenLayout(before, (h, w), after), grid_from=path)
        elif special == 0 or _stated(model, suffix, special):
            behind = (suffix or 0) if special else 0
            layout = TokenLayout(special - behind, (h, w), behind)
            return replace(site, layout=layout, grid_from=path)
        elif 0 < special <= _MOST_SPECIAL and unplaced is None:
            unplaced = (
                f"{site.tokens} tokens for a feature map of {h} x {w}: whether the {special} "
                "special tokens stand before or behind the patches cannot be seen, and the model "
                "does not say (num_prefix_tokens)"
            )
    return replace(
        site,
        reason=unplaced
        or f"no feature map explains its {site.tokens} tokens as prefix + h x w: grid unknown",
        gridless=len(shape) == 3 and shape[1] == site.tokens,
    )


#: more special tokens than any network has: with more, the feature map is another one
_MOST_SPECIAL = 32


def _stated(model: nn.Module, suffix: int | None, special: int) -> bool:
    """Whether it is known how many of the special tokens stand in front: by the table of known
    networks, or by timm's own word.
    """
    if suffix is not None:
        return 0 <= special - suffix <= _MOST_SPECIAL
    return getattr(model, "num_prefix_tokens", None) == special


def _unseen(module: nn.Module) -> str | None:
    """What an attention module does instead of a plain sdpa call; None for any other module."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention inside nn.MultiheadAttention"
    if has_interface(module):
        used = getattr(module.config, "_attn_implementation", None)
        return None if used == "sdpa" or is_shadow(module.config) else f"attention by {used!r}"
    return None


def _by_hand(model: nn.Module, module: nn.Module, path: str, tokens: int, what: str) -> Site:
    remedy = "it needs an adapter"
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if has_interface(module):
        remedy = (
            "load the model with attn_implementation='sdpa' or call "
            "model.set_attn_implementation('sdpa')"
        )
    elif used == "eager" and getattr(model, "_supports_sdpa", False):
        remedy = "load the model with attn_implementation='sdpa'"
    elif isinstance(module, nn.MultiheadAttention):
        remedy = "that class has no seam"
    return Site(
        path=path,
        module=type(module).__name__,
        heads=0,
        head_dim=0,
        tokens=tokens,
        reason=f"computes {what}, past scaled_dot_product_attention; {remedy}",
    )
