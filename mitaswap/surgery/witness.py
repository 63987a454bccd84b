"""One dry forward, watched: every attention call with the module that made it, and every feature
map before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from mitaswap.errors import MitaswapError
from mitaswap.surgery.places import Place, Places
from mitaswap.surgery.projections import Projections, find
from mitaswap.surgery.tap import first_tensor

_DROPOUT = {F.dropout, torch.dropout}
_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax}


@dataclass
class Call:
    """One `scaled_dot_product_attention` call, or a softmax over a square map computed by hand.

    Args:
        path: module that made the call (the innermost one running).
        q, k, v: shapes; for a softmax by hand q is the shape of the map.
        mask: "none", "bias" (float, additive) or "mask" (boolean).
        features: (path, h, w) of the convolutions that the queries were computed from, the latest
            last.
        inputs: shape of the module's first input.
        place: where the patches stand among the queries; None where that cannot be seen.
        projections: which of the module's submodules k and v come from; None where that cannot be
            seen.
    """

    path: str
    q: tuple[int, ...]
    k: tuple[int, ...] = ()
    v: tuple[int, ...] = ()
    mask: str = "none"
    causal: bool = False
    scale: float | None = None
    by_hand: bool = False
    features: list[tuple[str, int, int]] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    place: Place | None = None
    projections: Projections | None = None


@dataclass
class _Frame:
    """A module whose forward is under way.

    Args:
        path: the module.
        x: its first tensor.
        alone: whether x is all that it was called with.
        outputs: what it has made of x so far by submodules that it called itself, by their names
            inside it, and how often each had been written to by then.
    """

    path: str = ""
    x: Tensor | None = None
    alone: bool = True
    outputs: list[tuple[str, Tensor, int]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.x is None else tuple(self.x.shape)

    def note(self, child: _Frame, output: Any) -> None:
        """What a submodule has returned to this one."""
        prefix = f"{self.path}." if self.path else ""
        fits = isinstance(output, Tensor) and output.ndim in (3, 4) and child.alone
        if fits and self.x is not None and child.x is self.x and child.path.startswith(prefix):
            self.outputs.append((child.path.removeprefix(prefix), output, _writes(output)))

    def untouched(self) -> list[tuple[str, Tensor]]:
        """Those of its outputs that are as the submodules returned them."""
        return [(name, y) for name, y, writes in self.outputs if _writes(y) == writes]


def _writes(x: Tensor) -> int:
    """How often x has been written to, as far as PyTorch counts."""
    return 0 if x.is_inference() else x._version


class _Recorder(TorchFunctionMode):
    def __init__(self, image_only: bool) -> None:
        super().__init__()
        self.image_only = image_only
        self.marks = WeakTensorKeyDictionary()
        self.places = Places()
        self.stack = [_Frame()]
        self.features: list[tuple[str, int, int]] = []
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._attention(*args, **kwargs)
        elif func in _SOFTMAX and args[0].ndim >= 3 and args[0].shape[-1] == args[0].shape[-2]:
            on = self.stack[-1]
            shape = tuple(args[0].shape)
            self.calls.append(Call(on.path, shape, by_hand=True, inputs=on.shape))
        result = func(*args, **kwargs)
        if func in _DROPOUT and (kwargs.get("p", args[1] if len(args) > 1 else 0.5)) > 0:
            result = result.clone()  # in training it is no view of its input
        # what is computed from a feature map inherits its number (an assignment returns None)
        self._mark(result if result is not None else args[:1], self._marks_of((args, kwargs)))
        self.places.follow(func, args, kwargs, result)
        return result

    def _marks_of(self, tensors: Any) -> set[int]:
        """Numbers of the feature maps that any of these tensors was computed from."""
        leaves = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
        return set().union(*(self.marks.get(leaf, ()) for leaf in leaves))

    def _mark(self, tensors: Any, marks: set[int]) -> None:
        if marks:
            for leaf in tree_leaves(tensors):
                if isinstance(leaf, Tensor):
                    self.marks[leaf] = marks

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        on = self.stack[-1]
        mask = "none"
        if attn_mask is not None:
            mask = "mask" if attn_mask.dtype == torch.bool else "bias"
            is_causal = is_causal or _hides_the_future(attn_mask)
        flown: Any = sorted(self._marks_of(query))
        if not flown and self.image_only:  # lost in an operator that the mode does not see
            flown = range(len(self.features))
        q, k, v = (tuple(t.shape) for t in (query, key, value))
        features = [self.features[i] for i in flown]
        place = self.places.of(query)
        place = place if place and place.total == q[-2] else None
        found = find(on.untouched(), key, value)
        self.calls.append(
            Call(on.path, q, k, v, mask, is_causal, scale, False, features, on.shape, place, found)
        )


def _hides_the_future(mask: Tensor) -> bool:
    """Whether no query sees a later key, as in a text decoder."""
    tokens = mask.shape[-1]
    if mask.is_meta or tokens < 2 or mask.shape[-2] != tokens:
        return False
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).triu(1)
    return bool(hidden[..., later].all())


def witness(model: nn.Module, example: Tensor | Mapping[str, Any]) -> list[Call]:
    """Run `model` once on `example` in eval mode without gradients and report its attention calls
    in order.

    The model is left as it was: training flags, hooks, buffers untouched.

    Args:
        model: any network.
        example: an input batch, or the keyword arguments of the forward.
    """
    recorder = _Recorder(image_only=isinstance(example, Tensor))
    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(_enter(recorder, path), with_kwargs=True))
        hooks.append(module.register_forward_hook(_leave(recorder, path), always_call=True))
    # timm's hand-written path bypasses the seam; a swapped module always takes the other one
    unfused: list[Any] = [m for m in model.modules() if getattr(m, "fused_attn", None) is False]
    for module in unfused:
        module.fused_attn = True
    try:
        with recorder:
            dry_run(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        for module in unfused:
            module.fused_attn = False
    return recorder.calls


def dry_run(model: nn.Module, example: Tensor | Mapping[str, Any]) -> None:
    """One forward in eval mode without gradients; training flags and random state are put back."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            model(**example) if isinstance(example, Mapping) else model(example)
    finally:
        for module in training:
            module.training = True


def _enter(recorder: _Recorder, path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        alone = len(args) == 1 and not kwargs
        recorder.stack.append(_Frame(path, first_tensor(args, kwargs), alone))

    return hook


def _leave(recorder: _Recorder, path: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        left = recorder.stack.pop()
        recorder.stack[-1].note(left, output)
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor) and output.ndim == 4:
            recorder._mark(output, recorder._marks_of(output) | {len(recorder.features)})
            recorder.places.start(output)
            recorder.features.append((path, output.shape[2], output.shape[3]))

    return hook


def example_input(model: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    """Two random images of the size that the model was built for, on its device and in its dtype.

    Raises:
        MitaswapError: the model does not say its input size.
    """
    embed = getattr(model, "patch_embed", None)
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    timm_size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, None))
    known = size or getattr(embed, "img_size", None) or getattr(config, "image_size", None)
    known = known or tuple(timm_size[1:])
    if isinstance(known, int):
        known = (known, known)
    if not known or None in known:
        raise MitaswapError(
            f"{type(model).__name__} does not say its input size; give example=, a batch of its "
            "input"
        )
    channels = getattr(config, "num_channels", None) or timm_size[0]
    weight = next(model.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    # two images, so that windows folded into the batch are told apart; a generator keeps the global
    # seed untouched
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, *known, generator=generator)
    return images.to(device=weight.device, dtype=dtype)
