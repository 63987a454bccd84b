"""What `route` tells is what the output uses, and no efficient mechanism makes an N x N tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from attention_laws import LAYOUT, LAYOUTS, ROUTED, SPECS, attend, draw, each
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mitaswap import TokenLayout, mechanism
from mitaswap.mechanisms import Mechanism, Routing

# ----------------------------------------------------------------------------------------- routing


def routing_of(part: Mechanism, q: Tensor, k: Tensor, layout: TokenLayout) -> Routing:
    routing = part.route(q, k, layout=layout, scale=q.shape[3] ** -0.5)
    assert routing is not None
    return routing


@each
def test_routes_says_whether_route_answers(spec: str) -> None:
    q, k, _ = draw()
    part = mechanism(spec)
    assert (part.route(q, k, layout=LAYOUT, scale=0.3) is not None) == part.routes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("spec", ROUTED)
def test_routing_is_sets_of_keys_and_distinct_experts(spec: str, layout: TokenLayout) -> None:
    q, k, _ = draw(layout)
    part = mechanism(spec)
    routing = routing_of(part, q, k, layout)
    experts = routing.members.shape[2]
    assert routing.members.shape[:2] == (2, 3)
    assert routing.choice.shape[:3] == (2, 3, layout.tokens)
    for index, limit in ((routing.members, layout.tokens), (routing.choice, experts)):
        assert index.dtype == torch.int64 and not index.requires_grad
        assert index.min() >= -1 and index.max() < limit, "-1 fills what is not used"
        ordered = index.sort(-1).values
        used = ordered[..., 1:] >= 0
        assert (ordered[..., 1:] > ordered[..., :-1])[used].all(), "no key, no expert twice"
        assert (index >= 0).any(-1).all(), "no expert and no query without any"


@pytest.mark.parametrize("spec", [s for s in ROUTED if mechanism(s).name == "mita"])
def test_routing_has_the_options_sizes(spec: str) -> None:
    q, k, _ = draw()
    part = mechanism(spec)
    options: Any = part.options
    routing = routing_of(part, q, k, LAYOUT)
    assert routing.members.shape[2:] == (options.m, options.k)
    assert routing.choice.shape[3] == options.s


@pytest.mark.parametrize("spec", ROUTED)
def test_queries_that_all_choose_one_expert(spec: str) -> None:
    """All other experts stay empty: outputs and gradients are finite."""
    q, k, v = draw()
    strength = torch.rand(
        LAYOUT.tokens, 1, dtype=q.dtype, generator=torch.Generator().manual_seed(3)
    )
    crowd = q[:, :, :1] * (0.2 + strength)
    part = mechanism(spec)
    choice = routing_of(part, crowd, k, LAYOUT).choice
    if part.name == "mita":
        assert (choice == choice[:, :, :1]).all(), "the premise: all queries choose alike"
    leaves = tuple(x.requires_grad_() for x in (crowd, k, v))
    out = attend(part, *leaves)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


# ------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Remembers the largest storage that any operation returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def largest_per_head(run: Callable[..., Tensor], layout: TokenLayout) -> float:
    """Bytes of the largest tensor that forward and backward create, per batch element and head."""
    leaves = tuple(x.requires_grad_() for x in draw(layout, 1, 2, 16, torch.float32))
    with Largest() as mode:
        run(*leaves, layout).sum().backward()
    return mode.bytes / 2


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


BIG = TokenLayout(1, (32, 32))


@pytest.mark.parametrize("spec", [s for s in SPECS if "every-pair" not in mechanism(s).traits])
def test_no_n_by_n_tensor(spec: str) -> None:
    """Neither floats nor indices nor masks: nothing has N x N elements, even of one byte each."""
    assert largest_per_head(partial(attend, mechanism(spec)), BIG) < BIG.tokens**2


@pytest.mark.parametrize("spec", ["mita(m=25,k=25)", "agent(n=49)", "linear"])
def test_memory_grows_linearly(spec: str) -> None:
    run = partial(attend, mechanism(spec))
    small = largest_per_head(run, TokenLayout(1, (32, 32)))
    large = largest_per_head(run, TokenLayout(1, (64, 64)))
    assert large < 4.4 * small  # four times the tokens


def test_memory_check_sees_softmax() -> None:
    """Negative control: softmax by hand makes N x N matrices, and the check sees them."""
    assert largest_per_head(softmax_by_hand, BIG) >= 4 * BIG.tokens**2
