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
from torch.compiler import is_compiling
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


class Seam:
    """The state of one swapped module.

    Args:
        site: the site as it was found.
        tracker: tells the grid of the forward under way.
        tap: holds the module's input, where the mechanism needs it.
    """

    def __init__(self, site: Site, tracker: GridTracker, tap: InputTap | None) -> None:
        self.site = site
        self.tracker = tracker
        self.tap = tap
        #: the last layout and number of tokens that were found to fit
        self.checked: tuple[TokenLayout, int] | None = None
        #: attributes of the module that the swap covers
        self.covered: dict[str, Any] = {}


class Swapped:
    """Mixed into the class of a swapped module.

    What every forward reads stands beside `_mitaswap` in the module's own `__dict__`. In a compiled
    model Dynamo looks at each object on the way to a value again before every call: at the members
    of a `Seam` in each layer, but only once at objects that all layers have in common. A layer
    whose modules hold nothing but plain values and such objects may even be skipped whole.
    """

    _mitaswap_original: type[nn.Module]
    _mitaswap: Seam
    _mitaswap_tracker: GridTracker
    _mitaswap_tap: InputTap | None
    #: what the mechanism takes besides q, k, v; as a tuple, which Dynamo takes for a plain value
    _mitaswap_supports: tuple[str, ...]
    #: whether a compiled forward goes to the mechanism at once
    _mitaswap_straight: bool
    mitaswap: Mechanism
    _modules: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fused_attn" and not value:
            raise SwapError(
                f"{self._mitaswap.site.path} is swapped to {self.mitaswap.spec}: fused_attn=False "
                "would bypass it. Call mitaswap.revert(model) first."
            )
        super().__setattr__(name, value)

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
        mechanism = self._modules["mitaswap"]  # nn.Module's own attribute access is slow
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        extra: dict[str, Any] = {}
        if attn_mask is not None:
            _require(self, "bias", "an attention mask or bias")
            extra["attn_mask"] = attn_mask
        if is_causal:
            _require(self, "causal", "is_causal=True")
            extra["is_causal"] = True
        if dropout_p > 0.0:
            _require(self, "dropout", f"attention dropout p={dropout_p}")
            extra["dropout_p"] = dropout_p
        if scale is None:
            scale = 1.0 / math.sqrt(query.shape[3])
        compiling = is_compiling()
        if compiling and self._mitaswap_straight:
            # no layout: the mechanism does not read it, and each layer would be guarded on it
            return mechanism.reference(query, key, value, layout=None, scale=scale, **extra)
        tracker = self._mitaswap_tracker
        layout = tracker.new_layout() if compiling else tracker.layout()
        if compiling or (layout, query.shape[2]) != self._mitaswap.checked:
            _check(self, layout, query)
        if self._mitaswap_tap is not None:
            extra["x"] = self._mitaswap_tap.take(query)
        if tracker.observer is not None:
            tracker.observer(self._mitaswap.site.path, mechanism, query, key, layout, scale)
        # `run`, not a call: what a call would check is checked above, and small models feel it
        return mechanism.run(query, key, value, layout, scale, extra)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._mitaswap_original,), self.__dict__


#: what switches off what a mechanism cannot honour
_INSTEAD = {
    "dropout": "Build the network without it (timm: attn_drop_rate=0; transformers: "
    "attention_probs_dropout_prob=0). "
}


# functions, not methods: Dynamo guards in each layer on the way to a method


def _require(module: Swapped, part: str, what: str) -> None:
    if part not in module._mitaswap_supports:
        raise SwapError(
            f"{module._mitaswap.site.path}: this forward brings {what}, which "
            f"{module.mitaswap.spec} cannot honour. {_INSTEAD.get(part, '')}"
            "Mechanisms that can: see `mitaswap ls`; or leave this layer out with layers=..."
        )


def _check(module: Swapped, layout: TokenLayout, query: Tensor) -> None:
    """Whether sequence, layout and the mechanism's options fit each other; asked once for each new
    layout, and by compiled forwards while they are traced.
    """
    tokens = query.shape[2]
    if tokens != layout.tokens:
        raise SwapError(
            f"{module._mitaswap.site.path}: got {tokens} tokens, but the image was cut into "
            f"{layout} = {layout.tokens}. Patch dropout, token merging and packed images change "
            "the sequence behind the grid; switch them off (timm: patch_drop_rate=0), or revert "
            "this layer."
        )
    try:
        module.mitaswap.check(layout, query.shape[3])
    except MitaswapError as error:
        raise SwapError(f"{module._mitaswap.site.path}: {error}") from None
    if not is_compiling():
        module._mitaswap.checked = layout, tokens


def install(module: Any, mechanism: Mechanism, seam: Seam, config: Any) -> None:
    """Make `module` a swapped one, in place. `config` is its shadow config, None for a module that
    is not Hugging Face's.
    """
    put: dict[str, Any] = {
        # timm's switch between sdpa and hand-written softmax, which would bypass the seam
        "fused_attn": True,
        "_mitaswap": seam,
        "_mitaswap_tracker": seam.tracker,
        "_mitaswap_tap": seam.tap,
        "_mitaswap_supports": tuple(sorted(mechanism.supports)),
        "_mitaswap_straight": goes_straight(mechanism),
    }
    if config is not None:
        put["config"] = config
    seam.covered = {name: vars(module)[name] for name in put if name in vars(module)}
    module.__class__ = seam_class(type(module))  # type: ignore[arg-type]
    vars(module).update(put)
    module.mitaswap = mechanism


def uninstall(module: Any) -> None:
    """Make a swapped module what it was, also where `install` stopped half way."""
    module.__class__ = module._mitaswap_original
    state = vars(module)
    seam = state.get("_mitaswap")
    if seam is not None:
        for name in [name for name in state if name.startswith("_mitaswap")]:
            del state[name]
        if "fused_attn" not in seam.covered:
            del state["fused_attn"]
        state.update(seam.covered)
    module._modules.pop("mitaswap", None)


def goes_straight(mechanism: Mechanism) -> bool:
    """Whether a mechanism reads q, k and v alone, so that a compiled forward has nothing to find
    out or to check for it.
    """
    cls = type(mechanism)
    plain = cls.check is Mechanism.check and cls.run is Mechanism.run
    return plain and not mechanism.needs and mechanism.options.impl != "fused"


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
