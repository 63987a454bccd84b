"""Laws over the registry of mechanisms: a new mechanism is tested by being there.

The numbers themselves are compared with transcriptions of the formulas in `test_formulas.py`.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_laws import EXACT, LAYOUT, LAYOUTS, differ, draw, each, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mitaswap import Spec, TokenLayout, mechanism
from mitaswap.mechanisms import MECHANISMS

FEW = settings(max_examples=6, deadline=None, derandomize=True)

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
    q, k, _ = draw(layout, n["batch"], n["heads"], n["dim"])
    _, _, v = draw(layout, n["batch"], n["heads"], n["width"], seed=1)
    out = mechanism(spec)(q, k, v, layout=layout)
    assert out.shape == v.shape
    assert out.dtype == q.dtype
    assert out.isfinite().all()


@each
def test_empty_batch(spec: str) -> None:
    q, k, v = draw(batch=0)
    assert mechanism(spec)(q, k, v, layout=LAYOUT).shape == v.shape


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_low_precision(spec: str, dtype: torch.dtype, layout: TokenLayout) -> None:
    """Against fp64 on the same rounded inputs: sums of D and N terms, and the result's rounding."""
    part = mechanism(spec)
    q, k, v = draw(layout, dtype=dtype)
    out = part(q, k, v, layout=layout)
    assert out.dtype == dtype
    wide = [x.double() for x in (q, k, v)]
    want = part(*wide, layout=layout)
    if part.routes:  # equal choices, or the outputs may differ by whole values
        ours = part.route(q, k, layout=layout, scale=8**-0.5)
        exact = part.route(*wide[:2], layout=layout, scale=8**-0.5)
        assert ours is not None and exact is not None
        assert torch.equal(ours.members, exact.members) and torch.equal(ours.choice, exact.choice)
    # torch's own softmax attention may round its weights to the input's dtype; ours do not
    inner = dtype if part.name in EXACT else torch.float32
    terms = 2 if inner != torch.float32 else q.shape[3] + layout.tokens
    room = terms * torch.finfo(inner).eps * v.abs().max().double()
    room = room + torch.finfo(dtype).eps / 2 * want.abs()
    assert ((out.double() - want).abs() <= room).all()


@each
def test_autocast_changes_no_output_in_half_precision(spec: str) -> None:
    """Sites hand over bfloat16 there; scores, and so the top k, stay in working precision."""
    q, k, v = draw(dtype=torch.bfloat16)
    part = mechanism(spec)
    want, routing = part(q, k, v, layout=LAYOUT), part.route(q, k, layout=LAYOUT, scale=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part(q, k, v, layout=LAYOUT), want)
        again = part.route(q, k, layout=LAYOUT, scale=0.4)
        # a site with q/k norms hands over float32 beside bfloat16
        mixed = part(q.float(), k.float(), v, layout=LAYOUT)
    assert (mixed - want).abs().max() < 0.05
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
    same(part(*strided, layout=LAYOUT), part(q, k, v, layout=LAYOUT), 1e-13)


@each
def test_inputs_are_left_alone_and_results_repeat(spec: str) -> None:
    tensors = draw()
    before = [x.clone() for x in tensors]
    part = mechanism(spec)
    first = part(*tensors, layout=LAYOUT)
    assert torch.equal(part(*tensors, layout=LAYOUT), first)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@each
def test_meta_tensors(spec: str) -> None:
    """No shape depends on the data, so shapes can be had without any."""
    q, k, v = (x.to("meta") for x in draw())
    assert mechanism(spec)(q, k, v, layout=LAYOUT).shape == v.shape


@pytest.mark.parametrize("spec", [str(Spec(n, c.samples[0])) for n, c in MECHANISMS.items()])
def test_compiles_in_one_graph(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw()
    compiled = torch.compile(part, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, layout=LAYOUT), part(q, k, v, layout=LAYOUT))


@each
def test_copies_and_pickles(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw()
    want = part(q, k, v, layout=LAYOUT)
    for twin in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), mechanism(part.spec)):
        assert twin.spec == part.spec and twin.options == part.options
        assert torch.equal(twin(q, k, v, layout=LAYOUT), want)


# --------------------------------------------------------------------------------------- symmetries


@each
def test_batch_elements_and_heads_are_independent(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw(batch=3)
    out = part(q, k, v, layout=LAYOUT)
    turned = part(*(x[[2, 0, 1]][:, [1, 2, 0]] for x in (q, k, v)), layout=LAYOUT)
    same(turned, out[[2, 0, 1]][:, [1, 2, 0]])
    same(part(q[1:2], k[1:2], v[1:2], layout=LAYOUT), out[1:2])
    one_head = part(*(x[:, 2:] for x in (q, k, v)), layout=LAYOUT)
    if "norm=rms" in spec:
        assert differ(one_head, out[:, 2:]), "the released baseline's norm spans all heads"
    else:
        same(one_head, out[:, 2:])


@each
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_order_of_keys_does_not_matter(spec: str, layout: TokenLayout) -> None:
    """Keys and values move together: every mechanism reads them as a set (without ties)."""
    part = mechanism(spec)
    q, k, v = draw(layout)
    turn = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(1))
    out = part(q, k, v, layout=layout)
    same(part(q, k[:, :, turn], v[:, :, turn], layout=layout), out)
    assert differ(part(q, k[:, :, turn], v, layout=layout), out)


@each
def test_token_order(spec: str) -> None:
    """Pointwise mechanisms follow any permutation of the tokens; landmarks depend on the raster."""
    part = mechanism(spec)
    tensors = draw()
    turn = torch.randperm(LAYOUT.tokens, generator=torch.Generator().manual_seed(1))
    moved = part(*(x[:, :, turn] for x in tensors), layout=LAYOUT)
    want = part(*tensors, layout=LAYOUT)[:, :, turn]
    if part.name in ("standard", "linear"):
        same(moved, want)
    else:
        assert differ(moved, want)


@each
def test_order_of_special_tokens(spec: str) -> None:
    """Prefix and suffix tokens are queries and keys, never landmarks: they may change places."""
    layout = TokenLayout(3, (7, 8), suffix=2)
    turn = torch.arange(layout.tokens)
    turn[[0, 1, 2, -2, -1]] = turn[[-1, 0, -2, 2, 1]]
    part = mechanism(spec)
    tensors = draw(layout)
    moved = part(*(x[:, :, turn] for x in tensors), layout=layout)
    want = part(*tensors, layout=layout)[:, :, turn]
    if "landmark_tokens=released" in spec:
        assert differ(moved, want), "the released code pools the first h * w tokens"
    else:
        same(moved, want)


@each
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_mirror_images(spec: str, axis: int) -> None:
    """Adaptive windows are symmetric: mirrored patches give mirrored outputs."""
    layout = TokenLayout(2, (9, 10))
    turn = torch.arange(layout.tokens)
    raster = turn[layout.patch_slice].view(layout.grid)
    turn[layout.patch_slice] = raster.flip(axis).flatten()
    part = mechanism(spec)
    tensors = draw(layout)
    moved = part(*(x[:, :, turn] for x in tensors), layout=layout)
    want = part(*tensors, layout=layout)[:, :, turn]
    if "landmark_tokens=released" in spec:
        assert differ(moved, want), "its windows start at the class token"
    else:
        same(moved, want)


# --------------------------------------------------------------------------------------- algebra


@each
def test_output_is_linear_in_the_values(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw()
    _, _, u = draw(seed=7)
    run = lambda x: part(q, k, x, layout=LAYOUT)  # noqa: E731
    same(run(2.0 * v - 0.5 * u), 2.0 * run(v) - 0.5 * run(u))


@each
def test_constant_values_come_back(spec: str) -> None:
    """The weights of every query sum to one, up to the normaliser's eps where there is one."""
    part = mechanism(spec)
    q, k, v = draw()
    eps = getattr(part.options, "eps", None)
    if eps is not None:
        q, k = q.abs() + 0.1, k.abs() + 0.1  # no query whose features are all zero
        part = mechanism(part.spec.with_options(eps=0.0))
    constant = v[:, :, :1].expand_as(v)
    same(part(q, k, constant, layout=LAYOUT), constant, 1e-13)


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
def test_outputs_stay_within_the_values(spec: str) -> None:
    """Weights are not negative: no output leaves the range of the values."""
    q, k, v = draw()
    out = mechanism(spec)(q, k, v, layout=LAYOUT)
    low, high = (f(v, dim=2, keepdim=True) for f in (torch.amin, torch.amax))
    assert ((out >= low - 1e-12) & (out <= high + 1e-12)).all()


@each
def test_scale(spec: str) -> None:
    part = mechanism(spec)
    q, k, v = draw(dim=7)
    plain = part(q, k, v, layout=LAYOUT)
    assert torch.equal(plain, part(q, k, v, layout=LAYOUT, scale=1 / math.sqrt(7)))
    other = part(q, k, v, layout=LAYOUT, scale=0.9)
    if "norm=rms" in spec or "feature=relu" in spec:
        same(other, plain, 1e-5)  # a norm and ReLU's normaliser undo any scale, up to their eps
    else:
        assert differ(other, plain)
    if part.name in ("standard", "linear"):  # landmarks would be scaled as well
        same(part(q * (0.9 * 7**0.5), k, v, layout=LAYOUT), other)


@each
def test_gradcheck(spec: str) -> None:
    layout = TokenLayout(1, (7, 7))
    leaves = tuple(x.requires_grad_() for x in draw(layout, 1, 1, 3))
    part = mechanism(spec)
    run: Callable[..., Tensor] = lambda q, k, v: part(q, k, v, layout=layout)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_huge_scores(spec: str, dtype: torch.dtype) -> None:
    """Scores of 1e8 and more overflow a naive exponential."""
    q, k, v = draw(dtype=dtype)
    leaves = tuple(x.requires_grad_() for x in (q * 1e4, k * 1e4, v))
    out = mechanism(spec)(*leaves, layout=LAYOUT)
    assert out.isfinite().all()
    (out.float() ** 2).sum().backward()
    assert all(x.grad is not None and not x.grad.isnan().any() for x in leaves)


@each
def test_equal_tokens(spec: str) -> None:
    """All scores tie: every query gets an average of values, the same for all queries."""
    q, k, v = draw()
    q, k = q[:, :, :1].expand_as(q), k[:, :, :1].expand_as(k)
    out = mechanism(spec)(q, k, v, layout=LAYOUT)
    assert out.isfinite().all()
    if not mechanism(spec).routes and "feature=relu" not in spec:
        same(out, v.mean(2, keepdim=True).expand_as(v), 1e-6)


# ---------------------------------------------------------------------------------- declared limits


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        ("mita(m=1,k={tokens},variant=route-only)", "standard"),
        ("mita(m=9,k={tokens},variant=route-only)", "standard"),
        ("mita(m=9,k={tokens},s=9,variant=route-only)", "standard"),
        ("mita(m=9,k=5,variant=compress-only)", "agent(n=9)"),
        ("mita(m=8,k=5,variant=compress-only,pool=2x4)", "agent(n=8,pool=2x4)"),
    ],
)
def test_limits(spec: str, limit: str, layout: TokenLayout) -> None:
    tensors = draw(layout)
    part = mechanism(spec.format(tokens=layout.tokens))
    same(part(*tensors, layout=layout), mechanism(limit)(*tensors, layout=layout), 1e-13)


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
    assert differ(
        mechanism(one)(*tensors, layout=LAYOUT), mechanism(other)(*tensors, layout=LAYOUT)
    )


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
