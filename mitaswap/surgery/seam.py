"""The seam: a subclass of the attention module's class whose one attention call is diverted.

Nothing of the upstream forward is copied by hand. The call goes to a mechanism by the cheapest way
that fits:

- `source`: the class's own forward calls `scaled_dot_product_attention`. It is compiled again from
  its own source with that one call going to our `attend`, once per class and `Way`.
- `interface`: a Hugging Face module asks its config which attention function to use. It gets a
  shadow config that names ours, which is the library's own sdpa function, diverted in the same way.
- `mode`: anywhere else a TorchFunctionMode diverts the call while the module's forward runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from mitaswap.errors import SwapError
from mitaswap.mechanisms import Mechanism
from mitaswap.surgery.attend import Attend, Way, attend_by, way_of
from mitaswap.surgery.divert import divert
from mitaswap.surgery.grid import GridTracker
from mitaswap.surgery.interface import interface, is_shadow, name_in, no_map, uses_interface
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

    What every eager forward reads stands beside `_mitaswap` in the module's own `__dict__`, where a
    compiled one that has to read it finds plain values and objects that all layers have in common.
    """

    _mitaswap_original: type[nn.Module]
    #: how its attention calls go to the mechanism; None until the state of a copy is there
    _mitaswap_way: Way | None
    _mitaswap: Seam
    _mitaswap_tracker: GridTracker
    _mitaswap_tap: InputTap | None
    mitaswap: Mechanism
    _modules: dict[str, Any]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fused_attn" and not value:
            raise SwapError(
                f"{self._mitaswap.site.path} is swapped to {self.mitaswap.spec}: fused_attn=False "
                "would bypass it. Call mitaswap.revert(model) first."
            )
        if name == "mitaswap":
            self._mitaswap_keep(value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "mitaswap":
            self._mitaswap_keep(None)
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if name == "mitaswap":
            self._mitaswap_keep(module)
        super().add_module(name, module)  # type: ignore[misc]

    def _mitaswap_keep(self, value: Any) -> None:
        """Raise if `value` cannot stand in for the mechanism: what its calls take and need is
        settled, and so is the mechanism where compiled forwards know it by the module's class.
        """
        own, way = self._modules.get("mitaswap"), self._mitaswap_way
        if own is None or way is None:
            return
        other = isinstance(value, Mechanism) and type(value) is not type(own)
        if way.fixed is not None or value is None or other:
            raise SwapError(
                f"{self._mitaswap.site.path} is swapped to {self.mitaswap.spec}; what calls of it "
                "take and need is settled by the module's class, which something else set here "
                "would not change. Call mitaswap.revert(model) and swap again."
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._mitaswap_original,), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        way = way_of(self.mitaswap, self._mitaswap.site)
        self.__class__ = seam_class(self._mitaswap_original, way)  # type: ignore
        config = state.get("config")
        if is_shadow(config):  # our function may have had another name where it was pickled
            name_in(config, interface(attend_by(way)))


def install(module: Any, mechanism: Mechanism, way: Way, seam: Seam, config: Any) -> None:
    """Make `module` a swapped one, in place. `config` is its shadow config, None for a module that
    is not Hugging Face's.
    """
    put: dict[str, Any] = {
        # timm's switch between sdpa and hand-written softmax, which would bypass the seam
        "fused_attn": True,
        "_mitaswap": seam,
        "_mitaswap_tracker": seam.tracker,
        "_mitaswap_tap": seam.tap,
    }
    if config is not None:
        put["config"] = config
    seam.covered = {name: vars(module)[name] for name in put if name in vars(module)}
    module.__class__ = seam_class(type(module), way)
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


def _rebuild(original: type[nn.Module]) -> nn.Module:
    cls: Any = seam_class(original, None)
    return cls.__new__(cls)


def seam_class(original: type[nn.Module], way: Way | None) -> type[nn.Module]:
    """The subclass of `original` with its attention call going `way`, picklable; without a way one
    for modules that still wait for their state. A forward that was patched makes another one.
    """
    return _seam_class(original, original.forward, way)  # type: ignore[arg-type]


# never forgotten: Dynamo tells classes by `id`, and one that is used again would be mistaken
@functools.cache
def _seam_class(
    original: type[nn.Module], _forward: Callable[..., Any], way: Way | None
) -> type[nn.Module]:
    members: dict[str, Any] = {
        "_mitaswap_original": original,
        "_mitaswap_way": way,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    if uses_interface(original):
        # in the class itself: where Dynamo has to pass a base class without it, it guards on that
        members["forward"] = original.forward
    elif way is not None:
        attend = attend_by(way)
        forward = divert(original.forward, attend) or _diverting(original, attend)
        names = list(inspect.signature(original.forward).parameters)
        if "output_attentions" in names:
            forward = _without_map(forward, names.index("output_attentions") - 1)
        members["forward"] = forward
    return type(f"Swapped{original.__name__}", (Swapped, original), members)


class _Divert(TorchFunctionMode):
    def __init__(self, module: Any, attend: Attend) -> None:
        super().__init__()
        self.module = module
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(self.module, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _diverting(original: type[nn.Module], attend: Attend) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Divert(self, attend):
            return original.forward(self, *args, **kwargs)

    return forward


def _without_map(forward: Callable[..., Any], position: int) -> Callable[..., Any]:
    """`forward`, refusing output_attentions=True, which it takes at `position` after self."""

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions") or (len(args) > position and args[position]):
            raise no_map(self)
        return forward(self, *args, **kwargs)

    return checked
