"""Laws over the registry of mechanisms: a new mechanism is tested by being there.

Symmetries and algebra are in `test_traits.py`; the numbers themselves are compared with
transcriptions of the formulas in `test_formulas.py`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_laws import (
    LAYOUT,
    LAYOUTS,
    SPECS,
    accepted,
    accepts,
    attend,
    differ,
    draw,
    each,
    featured,
    given_to,
    innermost,
    same,
    site_of,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mitaswap import Spec, TokenLayout, mechanism
from mitaswap.mechanisms import MECHANISMS, Mechanism, Routing, SiteShape, Wrapper

FEW = settings(max_examples=5, deadline=None, derandomize=True)

# --------------------------------------------------------------------------------- shapes and types


@each
@FEW
@given(data=st.data())
def test_any_size(spec: str, data: st.DataObject) -> None:
    """Odd sizes: the output is finite and has q's dtype, batch, heads and tokens, and v's width."""
    sizes = {"batch": (1, 3), "heads": (1, 3), "dim": (1, 9), "width": (1, 9), "prefix": (0, 5)}
    n = {name: data.draw(st.integers(*limits), label=name) for name, limits in sizes.items()}
    grid = data.draw(st.tuples(st.integers(7, 10), st.integers(7, 10)), label="grid")
    layout = TokenLayout(n["prefix"], grid, data.draw(st.integers(0, 3), label="suffix"))
    assume(accepts(spec, layout, n["dim"]))
    q, k, _ = draw(layout, n["batch"], n["heads"], n["dim"])
    _, _, v = draw(layout, n["batch"], n["heads"], n["width"], seed=1)
    out = attend(mechanism(spec), q, k, v, layout)
    assert out.shape == v.shape
    assert out.dtype == q.dtype
    assert out.isfinite().all()


@each
def test_empty_batch(spec: str) -> None:
    q, k, v = draw(batch=0)
    assert attend(mechanism(spec), q, k, v).shape == v.shape


DIMS = (24, 64, 72)
#: every head dim with every prefix in single precision; in half precision one prefix for each
PRECISIONS = [(torch.float32, layout, dim) for layout in LAYOUTS for dim in DIMS]
PRECISIONS += [
    (dtype, layout, dim)
    for dtype in (torch.bfloat16, torch.float16)
    for layout, dim in zip(LAYOUTS, DIMS, strict=True)
]


@each
@pytest.mark.parametrize(("dtype", "layout", "dim"), PRECISIONS, ids=str)
def test_low_precision(spec: str, dtype: torch.dtype, layout: TokenLayout, dim: int) -> None:
    """Against fp64 on the same rounded inputs: sums of D and N terms, and the result's rounding."""
    layout = layout if accepts(spec, layout, dim) else accepted(spec)[0]
    part = mechanism(spec)
    q, k, v = draw(layout, dim=dim, dtype=dtype)
    out = attend(part, q, k, v, layout)
    assert out.dtype == dtype
    wide = [x.double() for x in (q, k, v)]
    want = attend(part, *wide, layout)
    chose = torch.ones(want.shape[:-1], dtype=torch.bool)
    if part.routes:  # where queries chose alike, or the outputs may differ by whole values
        routings = [part.route(*x, layout=layout, scale=dim**-0.5) for x in ((q, k), wide[:2])]
        chose = chose_alike(*routings)
        assert chose.double().mean() > 0.98  # near ties fall one way or the other
        moved = torch.zeros(())
    else:  # what a rounding of the inputs moves: an ill-conditioned formula's own share
        eps, noises = torch.finfo(torch.float32).eps, draw(layout, dim=dim, seed=1)
        near = [x * (1 + eps * noise) for x, noise in zip(wide, noises, strict=True)]
        moved = (attend(part, *near, layout) - want).abs().amax(dim=(-2, -1), keepdim=True)
    # torch's own softmax attention may round its weights to the input's dtype; ours do not
    inner = dtype if part.name == "standard" else torch.float32
    terms = 2 if inner != torch.float32 else dim + layout.tokens
    # sums that are no averages may cancel: their terms are larger than what is left
    largest = v.abs().max().double() if "convex" in part.traits else 30 * want.abs().max()
    room = terms * (torch.finfo(inner).eps * largest + moved)
    room = room + torch.finfo(dtype).eps / 2 * want.abs()
    if isinstance(part, Wrapper):  # the inner mechanism's output was rounded before
        room = room + torch.finfo(dtype).eps / 2 * largest
    assert ((out.double() - want).abs() <= room)[chose].all()


def chose_alike(one: Routing | None, other: Routing | None) -> Tensor:
    """Whether a query has the same experts in both, with the same keys: bool [B, H, N]."""
    assert one is not None and other is not None
    keys = (one.members == other.members).all(dim=-1)  # [B, H, M]
    experts = (one.choice == other.choice).all(dim=-1)
    held = one.choice.clamp_min(0)  # -1 is no expert
    return experts & keys.gather(2, held.flatten(2)).view_as(held).all(dim=-1)


@each
def test_autocast_changes_no_output_in_half_precision(spec: str) -> None:
    """Sites hand over bfloat16 there; scores, and so the top k, stay in working precision."""
    q, k, v = draw(dtype=torch.bfloat16)
    part = mechanism(spec)
    want, routing = attend(part, q, k, v), part.route(q, k, layout=LAYOUT, scale=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(part, q, k, v), want)
        again = part.route(q, k, layout=LAYOUT, scale=0.4)
        # a site with q/k norms hands over float32 beside bfloat16
        mixed = attend(part, q.float(), k.float(), v)
    assert (mixed - want).abs().max() <= 0.02 * want.abs().max()
    if routing is not None:
        assert again is not None
        assert torch.equal(again.members, routing.members)
        assert torch.equal(again.choice, routing.choice)


@each
def test_strided_inputs(spec: str) -> None:
    """q, k, v as projections leave them, [B, N, 3, H, D] unbound, give what contiguous ones do."""
    q, k, v = draw()
    packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()  # [B, N, 3, H, D]
    strided = packed.permute(2, 0, 3, 1, 4).unbind()
    assert not strided[0].is_contiguous()
    part = mechanism(spec)
    same(attend(part, *strided), attend(part, q, k, v))


@each
def test_inputs_are_left_alone_and_results_repeat(spec: str) -> None:
    tensors = draw()
    before = [x.clone() for x in tensors]
    part, state = mechanism(spec), torch.get_rng_state()
    first = attend(part, *tensors)
    assert torch.equal(attend(part, *tensors), first)
    assert torch.equal(torch.get_rng_state(), state), "drew from the global generator"
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@each
def test_meta_tensors(spec: str) -> None:
    """No shape depends on the data, so shapes can be had without any."""
    q, k, v = (x.to("meta") for x in draw())
    assert attend(mechanism(spec), q, k, v).shape == v.shape


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "+" not in spec])
def test_compiles_in_one_graph(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw()
    want = attend(part, q, k, v)  # attaches
    torch.compiler.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(part, q, k, v), want)


@pytest.mark.parametrize("spec", ["mita(m=9,k=8)", "dat(stride=2)"])
def test_compiles_again_at_other_sizes(spec: str) -> None:
    """A second compilation has sizes that vary, and looks for windows and groups that fit them."""
    torch.compiler.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for layout in accepted(spec):
        part = mechanism(spec)
        q, k, v = draw(layout)
        want = attend(part, q, k, v, layout)  # attaches
        assert torch.equal(compiled(part, q, k, v, layout), want)


@each
def test_copies_and_pickles(spec: str) -> None:
    """A mechanism of the same options starts as its twin did: nothing is drawn at random."""
    part = mechanism(spec)
    q, k, v = draw()
    want = attend(part, q, k, v)
    for twin in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), mechanism(part.spec)):
        assert twin.spec == part.spec and twin.options == part.options
        assert torch.equal(attend(twin, q, k, v), want)


@each
def test_attaching_in_other_modes(spec: str) -> None:
    """Neither inference mode nor a default device reaches what a mechanism starts with."""
    q, k, v = draw()
    want = attend(mechanism(spec), q, k, v)
    part = mechanism(spec)
    with torch.inference_mode():
        same(attend(part, q, k, v), want)
    assert not any(x.is_inference() for x in (*part.parameters(), *part.buffers()))
    if any(True for _ in part.parameters()):
        attend(part, q, k, v).sum().backward()
    part = mechanism(spec)
    with torch.device("meta"):
        part.attach(site_of(part))
    same(attend(part.double(), q, k, v), want)


@each
def test_a_site_settles_a_mechanism(spec: str) -> None:
    """Two attached at the same site agree at any other grid; to ask for a routing attaches none."""
    one, other = mechanism(spec), mechanism(spec)
    q, k, v = draw()
    one.route(q, k, layout=LAYOUT, scale=0.4)
    assert one.site is None
    attend(one, q, k, v)
    other.attach(site_of(other))
    other.double()
    layout = TokenLayout(1, (9, 10))
    if accepts(spec, layout):
        tensors = draw(layout)
        assert torch.equal(attend(one, *tensors, layout), attend(other, *tensors, layout))
        routings = [x.route(*tensors[:2], layout=layout, scale=0.4) for x in (one, other)]
        if all(routings):
            assert torch.equal(routings[0].members, routings[1].members)


@each
def test_batch_elements_are_independent(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw(batch=3)
    out = attend(part, q, k, v)
    turned = attend(part, *(x[[2, 0, 1]] for x in (q, k, v)))
    same(turned, out[[2, 0, 1]])
    same(attend(part, q[1:2], k[1:2], v[1:2]), out[1:2])


# ------------------------------------------------------------------------------------ learned parts


def learned(part: Mechanism, layout: TokenLayout = LAYOUT, dim: int = 8) -> Mechanism:
    """Attached, its learned parts moved off their start."""
    if part.site is None:
        part.attach(site_of(part, layout, dim=dim))
    part.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in part.parameters():
            x += 0.3 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return part


def has_parts(spec: str) -> bool:
    part = mechanism(spec)
    part.attach(site_of(part))
    return any(True for _ in part.parameters())


LEARNED = [spec for spec in SPECS if has_parts(spec)]


@pytest.mark.parametrize("spec", LEARNED)
def test_every_learned_part_learns(spec: str) -> None:
    part = learned(mechanism(spec))
    q, k, v = draw()
    out = attend(part, q, k, v)
    (out * draw(seed=3)[0]).sum().backward()
    for name, x in part.named_parameters():
        assert x.grad is not None and x.grad.abs().max() > 0, name


@pytest.mark.parametrize("spec", ["spark(k=40)", "spark(k=40,select=exact,gate=exp)", "dsa(k=40)"])
def test_keys_per_query_follow_a_smaller_grid(spec: str) -> None:
    """A network swapped at one size runs at a smaller one, where every key is read."""
    part, layout = mechanism(spec), TokenLayout(1, (4, 5))
    part.attach(SiteShape(3, 8, TokenLayout(1, (7, 7))))
    tensors = draw(layout, dim=8)
    out = attend(part, *tensors, layout)
    all_keys = mechanism(Spec.parse(spec).with_options(k=layout.tokens))
    same(out, attend(all_keys, *tensors, layout))
    routing = part.route(*tensors[:2], layout=layout, scale=0.4)
    assert routing is not None and (routing.members.sort(-1)[0][0, 0, 0] == torch.arange(21)).all()
    assert part.cost(SiteShape(3, 8, layout)).flops > 0


@pytest.mark.parametrize("spec", LEARNED)
def test_learned_parts_follow_the_grid(spec: str) -> None:
    """Built for one image size, run at others, back at the first: nothing breaks or stays."""
    part = learned(mechanism(spec))
    q, k, v = draw()
    first = attend(part, q, k, v)
    # a mechanism without learned parts, inside a wrapper that has some, asks for what it was given
    bound = not any(True for _ in innermost(part).parameters())
    for grid in [(7, 9), (9, 8), (10, 9), (14, 14), (5, 5), (4, 4), (2, 6), (3, 1), (1, 1)]:
        layout = TokenLayout(1, grid)  # special tokens are the network's, not the image's
        if not bound or accepts(spec, layout):
            tensors = draw(layout)
            out = attend(part, *tensors, layout)
            assert out.isfinite().all()
            routing = part.route(*tensors[:2], layout=layout, scale=0.4)
            assert routing is None or routing.members.max() < layout.tokens
            assert part.cost(site_of(part, layout)).flops > 0
    assert torch.equal(attend(part, q, k, v), first)
    with pytest.raises(Exception, match="is attached already"):
        part.attach(site_of(part))


@pytest.mark.parametrize("spec", LEARNED)
def test_learned_parts_are_saved_by_name(spec: str) -> None:
    part, twin = learned(mechanism(spec)), mechanism(spec)
    q, k, v = draw()
    fresh = attend(twin, q, k, v)
    twin.load_state_dict(part.state_dict())
    want = attend(part, q, k, v)
    assert torch.equal(attend(twin, q, k, v), want)
    assert differ(fresh, want)


# ----------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and "expand" not in str(func)]
        self.size = max([self.size, *(x.numel() for x in made)])
        return out


def largest(part: Mechanism, layout: TokenLayout) -> int:
    tensors = [x.to("meta") for x in draw(layout, batch=1)]
    with torch.no_grad(), Largest() as seen:
        attend(part, *tensors, layout)
    return seen.size


# torch's own softmax attention is fused everywhere but on meta tensors
@pytest.mark.parametrize("name", [name for name in MECHANISMS.names() if name != "standard"])
def test_memory_at_inference_is_linear_in_the_tokens(name: str) -> None:
    """At default options, those that look at all pairs or whose experts grow with N among them."""
    few, many = (largest(mechanism(name), TokenLayout(1, (side, side))) for side in (64, 128))
    assert many <= 4.01 * few


# --------------------------------------------------------------------------------- a fresh start


def scene(layout: TokenLayout, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as networks have them: near tokens alike, queries near the keys of their place."""
    generator = torch.Generator().manual_seed(0)
    n, (h, w) = layout.tokens, layout.grid
    noise = torch.randn(4, 2, dim, 5, 5, generator=generator, dtype=torch.float64)
    maps = F.interpolate(noise.flatten(0, 1), (h, w), mode="bicubic").unflatten(0, (4, 2))
    shared, qs, ks, vs = (m.flatten(2).transpose(1, 2) for m in maps)

    def whole(patches: Tensor) -> Tensor:
        special = torch.randn(2, n - h * w, dim, generator=generator, dtype=torch.float64)
        return torch.cat([special[:, : layout.prefix], patches, special[:, layout.prefix :]], 1)

    q, k, v = (whole(x) for x in (shared + 0.3 * qs, shared + 0.3 * ks, vs))
    heads = (x.unflatten(2, (2, dim // 2)).transpose(1, 2) for x in (2.5 * q, 2.5 * k, v))
    q, k, v = heads
    return q, k, v


@pytest.mark.parametrize(
    "name", [n for n, c in MECHANISMS.items() if c.card.untrained == "usable" and n != "standard"]
)
def test_usable_untrained_means_near_softmax(name: str) -> None:
    """Nearer to softmax attention than the mean of all values is, by a quarter or more."""
    layout = TokenLayout(1, (14, 14))
    q, k, v = scene(layout)
    want = mechanism("standard")(q, k, v, layout=layout)
    part = mechanism(Spec(name, MECHANISMS.get(name).suggest(layout)))
    error = (attend(part, q, k, v, layout) - want).norm()
    assert error < 0.75 * (v.mean(2, keepdim=True) - want).norm()


# --------------------------------------------------------------------------------------- numerics


def test_eps_of_the_normaliser() -> None:
    """A query without any feature gives zeros, not NaN; weights of others sum to S / (S + eps)."""
    q, k, v = draw()
    q[:, :, 0] = -q[:, :, 0].abs()
    out = mechanism("linear(feature=relu)")(q, k, v, layout=LAYOUT)
    assert (out[:, :, 0] == 0).all() and out.isfinite().all()
    total = (F.elu(q) + 1) @ (F.elu(k) + 1).sum(2).unsqueeze(-1)
    ones = mechanism("linear(eps=3.0)")(q, k, torch.ones_like(v), layout=LAYOUT)
    same(ones, (total / (total + 3.0)).expand_as(ones))


@each
@pytest.mark.parametrize("dim", [3, 24])
def test_gradcheck(spec: str, dim: int) -> None:
    layout = TokenLayout(1, (7, 7))
    leaves = tuple(x.requires_grad_() for x in draw(layout, 1, 2, dim))
    part = mechanism(spec)
    run: Callable[..., Tensor] = lambda q, k, v: attend(part, q, k, v, layout)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


#: parts of theirs get another gradient by design: as a term of the logits, or as if not clipped
STRAIGHT_THROUGH = ("dsa", "sparsifiner", "mhla")


@pytest.mark.parametrize(
    "spec", [s for s in LEARNED if innermost(mechanism(s)).name not in STRAIGHT_THROUGH]
)
def test_gradcheck_of_learned_parts(spec: str) -> None:
    layout = TokenLayout(1, (7, 7))
    tensors = draw(layout, 1, 2, 3)
    part = mechanism(spec)
    part.attach(site_of(part, layout, 2, 3))
    names, leaves = zip(*learned(part).named_parameters(), strict=True)
    extra = given_to(part, *tensors)

    def run(*values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        called = torch.func.functional_call(part, state, tensors, {"layout": layout, **extra})
        assert isinstance(called, Tensor)
        return called

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_huge_scores(spec: str, dtype: torch.dtype) -> None:
    """Scores of 1e8 and more overflow a naive exponential."""
    part = mechanism(spec)
    q, k, v = draw(dtype=dtype)
    leaves = tuple(x.requires_grad_() for x in (q * 1e4, k * 1e4, v))
    out = attend(part, *leaves)
    assert not out.isnan().any()
    if "convex" in part.traits:
        assert out.isfinite().all()
        (out.float() ** 2).sum().backward()
        assert all(x.grad is not None and not x.grad.isnan().any() for x in leaves)


@each
def test_equal_tokens(spec: str) -> None:
    """All scores tie: what averages over a set of all keys gives the same mean to all queries."""
    part = mechanism(spec)
    q, k, v = draw()
    q, k = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    assert attend(part, q, k, v).isfinite().all()
    if {"averages", "key-set", "heads"} <= part.traits and not innermost(part).routes:
        out = attend(part, *featured(q, k), v)
        same(out, v.mean(2, keepdim=True).expand_as(v), 1e-5)


# ---------------------------------------------------------------------------------- declared limits


LIMITS = [limit for _, cls in MECHANISMS.items() for limit in cls.limits]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("spec", "limit"), LIMITS)
def test_declared_limits(spec: str, limit: str, layout: TokenLayout) -> None:
    """At these options a fresh mechanism is another one, to float64 precision."""
    tensors = draw(layout)
    dim = tensors[0].shape[3]
    sizes = {"tokens": layout.tokens, "patches": layout.patches, "dim": dim}
    part, other = (mechanism(text.format(**sizes)) for text in (spec, limit))
    same(attend(part, *tensors, layout), attend(other, *tensors, layout), 1e-10)


PAPERS = [cls.paper for _, cls in MECHANISMS.items() if cls.paper]


@pytest.mark.parametrize("spec", PAPERS)
def test_the_papers_own_module_runs(spec: str) -> None:
    """It is another one than the name alone, and runs where texts of its length would."""
    layout = TokenLayout(1, (64, 64))
    part = mechanism(spec)
    inner = part
    while isinstance(inner, Wrapper):
        inner = inner.inner
    assert type(inner).paper == spec and str(part.spec) != str(mechanism(inner.name).spec)
    part.attach(SiteShape(1, 32, layout))
    q, k, v = torch.randn(3, 1, 1, layout.tokens, 32)
    x = {"x": torch.randn(1, layout.tokens, 32)} if "x" in part.needs else {}
    with torch.no_grad():
        out = part(q, k, v, layout=layout, scale=32**-0.5, **x)
    assert out.shape == v.shape and out.isfinite().all()


def test_what_is_usable_untrained_declares_its_limit() -> None:
    """Nearly all that approximates softmax attention equals it at some options."""
    cards = {name: cls for name, cls in MECHANISMS.items() if cls.card.untrained == "usable"}
    without = {name for name, cls in cards.items() if not cls.limits}
    # nsa always adds three branches, standard is the limit
    assert without == {"nsa", "standard"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mita(m=9,k=7)", "mita(m=9,k=7,variant=route-only)"),
        ("mita(m=9,k=7)", "mita(m=9,k=7,variant=compress-only)"),
        ("mita(m=9,k=7)", "mita(m=9,k=8)"),
        ("mita(m=9,k=7)", "mita(m=8,k=7)"),
        ("mita(m=9,k=7)", "mita(m=9,k=7,s=2)"),
        ("mita(m=8,k=7)", "mita(m=8,k=7,pool=8x1)"),
        ("mita(m=9,k=7)", "mita(m=9,k=7,shared_scale=released)"),
        ("mita(m=9,k=7)", "mita(m=9,k=7,landmark_tokens=released)"),
        ("mita(m=9,k=56,variant=route-only)", "standard"),
        ("agent(n=9)", "agent(n=8)"),
        ("linear", "linear(feature=relu)"),
        ("linear", "linear(norm=rms)"),
        ("linear", "linear(eps=0.1)"),
    ],
)
def test_every_option_matters(one: str, other: str) -> None:
    """Negative control of the limits: neighbours of a spec give other outputs."""
    tensors = draw(LAYOUT)
    assert differ(attend(mechanism(one), *tensors), attend(mechanism(other), *tensors))


def test_standard_takes_what_torch_takes() -> None:
    q, k, v = draw()
    part = mechanism("standard")
    bias = torch.randn(1, 3, LAYOUT.tokens, LAYOUT.tokens, dtype=torch.float64)
    for extra in ({"attn_mask": bias}, {"attn_mask": bias > 0}, {"is_causal": True}):
        got = part(q, k, v, layout=LAYOUT, **extra)
        assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, **extra))
        assert differ(got, part(q, k, v, layout=LAYOUT))
    torch.manual_seed(0)
    got = part(q, k, v, layout=LAYOUT, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
