"""What takes the place of `scaled_dot_product_attention` in a swapped module.

Dynamo looks again before every call of a compiled model at whatever was read of each layer. It
looks at the class of each module in any case, also of an untouched one. So all that a forward has
to know of a swap is settled by the class: as variables of a function that equal layers have in
common (`attend_by` their `Way`), of which a compiled forward reads nothing per layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from mitaswap.errors import MitaswapError, SwapError
from mitaswap.mechanisms import Mechanism, SiteShape
from mitaswap.surgery.projections import Projections, project
from mitaswap.tokens import TokenLayout

if TYPE_CHECKING:
    from mitaswap.surgery.sites import Site

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Way:
    """What the attention calls of equal layers have in common.

    Args:
        fixed: a mechanism equal to theirs, which compiled forwards call instead of each layer's
            own (what somebody sets on the own one later they do not see); None where a mechanism is
            more than its class, options and site.
        needs, supports: the mechanisms'.
        straight: their class's `reference` if they `goes_straight`.
        layout, head_dim: what they were found to fit at the swap.
        projections: which submodules make keys and values, where the mechanisms need to know.
    """

    fixed: Mechanism | None
    needs: frozenset[str]
    supports: frozenset[str]
    straight: Callable[..., Tensor] | None
    layout: TokenLayout
    head_dim: int
    projections: Projections | None


def way_of(mechanism: nn.Module, site: Site) -> Way:
    """The way of a site's attention call to its mechanism; equal for equal layers."""
    assert site.layout is not None
    fixed = None
    if not isinstance(mechanism, Mechanism):  # an adapter's module around it
        inner = next(m for m in mechanism.modules() if isinstance(m, Mechanism))
        return dataclasses.replace(way_of(inner, site), fixed=None)
    if is_stateless(mechanism):
        cls: Any = type(mechanism)
        fixed = _twin(cls, mechanism.options, mechanism.site)
    return Way(
        fixed,
        frozenset(mechanism.needs),
        frozenset(mechanism.supports),
        type(mechanism).reference if goes_straight(mechanism) else None,
        site.layout,
        site.head_dim,
        site.projections if "project" in mechanism.needs else None,
    )


def is_stateless(mechanism: Mechanism) -> bool:
    """Whether a mechanism is nothing but its class, options and site, whatever mode it is in.

    Only of this package's own classes that can be known: another's may read its mode, or an
    attribute that somebody sets later, in a helper far from its class.
    """
    parts = (mechanism._parameters, mechanism._buffers, mechanism._modules)
    plain = not any(parts) and vars(mechanism).keys() == vars(Mechanism()).keys()
    ours = Mechanism.__module__.rpartition(".")[0] + "."
    return plain and type(mechanism).__module__.startswith(ours)


def goes_straight(mechanism: Mechanism) -> bool:
    """Whether a mechanism reads q, k and v alone, so that a compiled forward has nothing to find
    out or to check for it.
    """
    cls = type(mechanism)
    plain = cls.check is Mechanism.check and cls.run is Mechanism.run
    return plain and not mechanism.needs and cls.fused is Mechanism.fused


@functools.cache
def _twin(cls: type[Mechanism], options: Any, site: SiteShape | None) -> Mechanism:
    twin = cls(options)
    twin.site = site
    return twin.eval()


#: how many models are being observed, and whether any is; the second is guarded on, once
_observers = 0
_observed = False


@contextmanager
def observing() -> Iterator[None]:
    """Compiled forwards inside the block, of any model, come past the observers: a compilation of
    its own.
    """
    global _observers, _observed
    _observers += 1
    _observed = True
    try:
        yield
    finally:
        _observers -= 1
        _observed = _observers > 0


@functools.cache
def attend_by(way: Way) -> Attend:
    """`scaled_dot_product_attention` for the modules of this way; the module comes first."""
    # plain variables: a look into `way` would be one more guard each
    fixed, supports, at_swap, head_dim = way.fixed, tuple(way.supports), way.layout, way.head_dim
    straight, needs_nothing, needs_x = way.straight, not way.needs, "x" in way.needs
    projections = way.projections

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        compiling = is_compiling()
        # not `module.mitaswap`: nn.Module's own attribute access is slow
        mechanism = module._modules["mitaswap"] if fixed is None or not compiling else fixed
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        extra: dict[str, Any] = {}
        if attn_mask is not None:
            if "bias" not in supports:
                raise _cannot(module, "bias", "an attention mask or bias")
            extra["attn_mask"] = attn_mask
        if is_causal:
            if "causal" not in supports:
                raise _cannot(module, "causal", "is_causal=True")
            extra["is_causal"] = True
        if dropout_p > 0.0:
            if "dropout" not in supports:
                raise _cannot(module, "dropout", f"attention dropout p={dropout_p}")
            extra["dropout_p"] = dropout_p
        if scale is None:
            scale = 1.0 / math.sqrt(query.shape[3])
        if compiling and needs_nothing and not _observed:
            # the tracker is not asked: it would be guarded on in each layer
            if straight is not None and fixed is not None:
                return straight(fixed, query, key, value, layout=None, scale=scale, **extra)
            if straight is not None:  # what stands in the module may be an adapter's by now
                return mechanism.reference(query, key, value, layout=None, scale=scale, **extra)
            if query.shape[2] == at_swap.tokens and query.shape[3] == head_dim:
                return mechanism.run(query, key, value, at_swap, scale, extra)
        tracker = module._mitaswap_tracker
        layout = tracker.new_layout() if compiling else tracker.layout()
        if compiling or (layout, query.shape[2]) != module._mitaswap.checked:
            _check(module, mechanism, layout, query)
        if needs_x:
            extra["x"] = module._mitaswap_tap.take(query)
        if projections is not None:
            extra["project"] = functools.partial(project, module, projections, query.dtype)
        if _observed and tracker.observer is not None:
            own = module._modules["mitaswap"]
            tracker.observer(module._mitaswap.site.path, own, query, key, layout, scale)
        # not a call: what it would check is checked above, and small models feel it
        if straight is not None:
            return mechanism.reference(query, key, value, layout=layout, scale=scale, **extra)
        return mechanism.run(query, key, value, layout, scale, extra)

    return attend


#: what switches off what a mechanism cannot honour
_INSTEAD = {
    "dropout": "Build the network without it (timm: attn_drop_rate=0; transformers: "
    "attention_probs_dropout_prob=0). "
}


def _cannot(module: Any, part: str, what: str) -> SwapError:
    return SwapError(
        f"{module._mitaswap.site.path}: this forward brings {what}, which "
        f"{module.mitaswap.spec} cannot honour. {_INSTEAD.get(part, '')}"
        "Mechanisms that can: see `mitaswap ls`; or leave this layer out with layers=..."
    )


def _check(module: Any, mechanism: Mechanism, layout: TokenLayout, query: Tensor) -> None:
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
        mechanism.fit(layout, query.shape[3])
    except MitaswapError as error:
        raise SwapError(f"{module._mitaswap.site.path}: {error}") from None
    if not is_compiling():
        module._mitaswap.checked = layout, tokens
