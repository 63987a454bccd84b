"""MiTA's kernels against the reference in float64: under Triton's interpreter on any machine, and
(marked gpu) on a CUDA device at lengths that fill it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import mechanism
from mitaswap.tokens import TokenLayout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="test_under_the_interpreter runs these in a process of their own"
)

#: unit roundoff; interpreted bfloat16 is truncated, not rounded
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Case(NamedTuple):
    spec: str
    layout: TokenLayout
    dim: int = 16
    dtype: torch.dtype = torch.float32
    projected: bool = False
    batch: int = 1
    heads: int = 2
    scale: float | None = None


SMALL = [
    Case("mita(m=9,k=7)", TokenLayout(0, (7, 9)), 24, heads=1),
    Case("mita(m=9,k=7)", TokenLayout(1, (6, 7)), 64, torch.float16, projected=True),
    Case("mita(m=6,k=5)", TokenLayout(5, (5, 9), 2), 72, torch.bfloat16),
    Case("mita(m=6,k=5,s=3)", TokenLayout(1, (7, 8), 1), 16),
    Case("mita(m=6,k=5,s=2)", TokenLayout(1, (7, 8), 1), 16, torch.float16, projected=True),
    Case("mita(m=9,k=8,variant=route-only)", TokenLayout(1, (6, 7)), 16),
    Case("mita(m=9,k=8,s=2,variant=route-only)", TokenLayout(0, (6, 7)), 24, torch.float16),
    Case("mita(m=8,k=5,variant=compress-only,pool=2x4)", TokenLayout(1, (5, 9)), 16),
    Case(
        "mita(m=4,k=6,shared_scale=released,landmark_tokens=released)",
        TokenLayout(1, (6, 6)),
        32,
    ),
    # experts wider than a block of entries, more of them than a block, and all keys in each
    Case("mita(m=4,k=70)", TokenLayout(0, (8, 9)), 16, heads=1),
    Case("mita(m=66,k=3,s=2)", TokenLayout(1, (6, 11)), 16, heads=1),
    # short halves of 64 features: gradients by all keys and a mask
    Case("mita(m=25,k=30)", TokenLayout(5, (9, 11), 2), 64, torch.bfloat16, projected=True),
    Case("mita(m=9,k=8,variant=route-only)", TokenLayout(1, (6, 7)), 64, torch.float16, True),
    Case("mita(m=32,k=1,pool=4x8)", TokenLayout(0, (8, 8)), 64, torch.float16),
    Case(
        "mita(m=4,k=37,shared_scale=released,landmark_tokens=released)",
        TokenLayout(1, (6, 6)),
        64,
        torch.bfloat16,
    ),
    Case("mita(m=6,k=5)", TokenLayout(1, (5, 9)), 64, torch.float16, scale=-0.3),
    # the smallest scores are the largest then; or all are equal, and the first keys are taken
    Case("mita(m=6,k=5)", TokenLayout(1, (5, 9)), 16, scale=-0.3),
    Case("mita(m=6,k=5)", TokenLayout(1, (5, 9)), 16, torch.float16, scale=0.0),
    Case("mita(m=2,k=20,pool=1x2)", TokenLayout(0, (4, 5)), 16, heads=1),
    # long enough for a first choice among groups of keys, for two tiles of the sort and of V~
    Case("mita(m=4,k=9)", TokenLayout(1, (24, 25)), 16, heads=1),
    # windows wider than the programs that pool several
    Case("mita(m=20,k=9,pool=10x2)", TokenLayout(0, (10, 40)), 16, heads=1),
]

LONG = [
    Case("mita(m=72,k=3)", TokenLayout(0, (8, 9)), 16, heads=1),
    Case("mita", TokenLayout(0, (14, 14)), 64, torch.float16, True, 8, 3),
    Case("mita", TokenLayout(1, (14, 14)), 64, torch.bfloat16, True, 8, 3),
    Case("mita", TokenLayout(0, (16, 16)), 64, torch.float16, False, 8, 3),
    Case("mita(m=16,k=30,variant=route-only)", TokenLayout(0, (10, 12)), 64, torch.float16),
    Case("mita", TokenLayout(1, (14, 14)), 64, torch.float32, True, 8, 3),
    Case("mita", TokenLayout(1, (32, 33), 2), 64, torch.bfloat16, True, 2, 3),
    Case("mita", TokenLayout(0, (64, 64)), 72, torch.float16, False, 1, 2),
    Case("mita(m=128,k=128)", TokenLayout(0, (64, 64)), 64, torch.float16, False, 1, 2),
    Case("mita(m=144,k=100,s=2)", TokenLayout(5, (40, 30), 1), 80, torch.float16, False, 1, 2),
    Case("mita", TokenLayout(0, (40, 30)), 128, torch.float32, False, 1, 2),
    Case("mita(m=16,k=16)", TokenLayout(0, (20, 30)), 256, torch.bfloat16, True, 1, 2),
    Case("mita(m=49,k=49)", TokenLayout(0, (100, 100)), 64, torch.float32, False, 1, 1),
]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors hold NaN, or whole numbers that are no position: what nobody writes shows."""
    fresh = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size: object, **options: object) -> Tensor:
        made = fresh(self, *size, **options)  # type: ignore[arg-type]
        return made.fill_(float("nan") if made.is_floating_point() else 1234)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield


def tensors(case: Case) -> list[Tensor]:
    """q, k, v and an output gradient; q, k, v as views of one projection where asked for."""
    generator = torch.Generator().manual_seed(1)
    batch, heads, tokens, dim = case.batch, case.heads, case.layout.tokens, case.dim
    if case.projected:
        joint = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
        q, k, v = joint.to(DEVICE, case.dtype).permute(2, 0, 3, 1, 4)
    else:
        shape = (3, batch, heads, tokens, dim)
        q, k, v = torch.randn(shape, generator=generator).to(DEVICE, case.dtype)
    grad = torch.randn(q.shape, generator=generator).to(DEVICE, case.dtype)
    return [q, k, v, grad]


def both(case: Case, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients by the kernels, and by the reference in float64."""
    part = mechanism(case.spec)
    found = []
    for impl, dtype in (("fused", case.dtype), ("reference", torch.float64)):
        run = mechanism(part.spec.with_options(impl=impl))
        q, k, v = (x.to(dtype).detach().requires_grad_() for x in inputs[:3])
        out = run(q, k, v, layout=case.layout, scale=case.scale)
        found.append([out, *torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))])
    return found[0], found[1]


def agree(case: Case) -> None:
    q, k, v, grad = tensors(case)
    ours, exact = both(case, q, k, v, grad)
    with torch.no_grad():  # inference takes another operator
        part = mechanism(mechanism(case.spec).spec.with_options(impl="fused"))
        assert torch.equal(part(q, k, v, layout=case.layout, scale=case.scale), ours[0])
    # halves: one rounding each of weights, V~, landmarks and the result (or of their gradients);
    # float32: sums of up to some hundred terms, whose errors grow like the root of their number
    bound = UNIT[case.dtype] * (16 if case.dtype == torch.float32 else 4)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert a.dtype == case.dtype and a.shape == b.shape
        error, size = (a.double() - b).norm().item(), b.norm().item()
        assert error <= bound * size, f"{name}: {error:.2e} of {bound:.2e} times {size:.2e}"


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted run itself")
def test_under_the_interpreter() -> None:
    # Triton looks at the variable when it is imported, which other tests may have done already
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@on_interpreter
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.spec} {case.layout} {case.dim}")
def test_small(case: Case, poisoned: None) -> None:
    agree(case)


@on_interpreter
@pytest.mark.parametrize(
    "case",
    [
        Case("mita(m=4,k=6)", TokenLayout(0, (24, 25)), 16, heads=1),
        Case("mita(m=4,k=6)", TokenLayout(1, (7, 8)), 16, torch.float16, heads=1),
    ],
    ids=["in groups", "at once"],
)
def test_equal_keys_are_chosen_by_position(case: Case, poisoned: None) -> None:
    q, k, v, grad = tensors(case)
    # all scores of a landmark are equal, to the bit in any order of summing (one term each): every
    # expert has keys 0..5
    k = torch.zeros_like(k)
    k[..., 0] = 1.0
    ours, exact = both(case, q, k, v, grad)
    bound = UNIT[case.dtype] * (16 if case.dtype == torch.float32 else 4)
    for a, b in ((ours[0], exact[0]), (ours[3], exact[3])):
        assert (a.double() - b).norm() <= bound * b.norm()


@on_interpreter
def test_values_that_are_no_numbers_stay_in_bounds() -> None:
    case = Case("mita(m=4,k=6)", TokenLayout(0, (6, 7)), 16)
    q, k, v, _ = tensors(case)
    for bad in (float("nan"), float("inf")):
        k[0, 0, 3] = bad
        part = mechanism("mita(m=4,k=6,impl=fused)")
        assert part(q, k, v, layout=case.layout).shape == q.shape


@on_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["long", "short"])
def test_operators_keep_the_rules(dtype: torch.dtype) -> None:
    from mitaswap.kernels import mita as kernels

    case = Case("mita(m=4,k=6)", TokenLayout(0, (6, 7)), 64, dtype, heads=1)
    q, k, v, _ = tensors(case)
    arguments = [0, 6, 7, 2, 2, 6, 1, 1], 0.25, 0.25
    torch.library.opcheck(kernels.mita, (q, k, v, *arguments))
    wanted = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(kernels.mita_training, (*wanted, *arguments))


@on_interpreter
def test_short_sequences_take_their_own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from mitaswap.kernels import mita_plan

    taken = []
    whole = mita_plan.short_backward
    monkeypatch.setattr(
        mita_plan, "short_backward", lambda *a, **kw: taken.append(1) or whole(*a, **kw)
    )
    case = Case("mita(m=9,k=7)", TokenLayout(1, (6, 7)), 64, torch.float16)
    agree(case)
    assert taken


@on_interpreter
@pytest.mark.parametrize(
    "case",
    [
        Case("mita(m=6,k=5,s=2)", TokenLayout(1, (7, 8), 1), 16, projected=True, batch=3, heads=1),
        Case("mita(m=6,k=5)", TokenLayout(1, (7, 8)), 24, torch.float16),
        Case("mita(m=9,k=7)", TokenLayout(1, (6, 7)), 64, torch.float16, True, 3, 1),
        Case("mita(m=8,k=5,variant=compress-only)", TokenLayout(0, (5, 9)), 16, batch=2, heads=1),
    ],
    ids=["batch", "heads", "short", "compress-only"],
)
def test_halves_of_a_call_are_the_whole(
    case: Case, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mitaswap.kernels import halves

    inputs = tensors(case)
    whole, _ = both(case, *inputs)
    monkeypatch.setattr(halves, "LEAST", 0)
    parts, _ = both(case, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    "shape, cuts",
    [
        ((1, 1), [(0, 1)]),
        ((1, 5), [(0, 2), (2, 5)]),
        ((3, 2), [(0, 1), (1, 3)]),
        ((47, 2), [(0, 16), (16, 47)]),
    ],
    ids=["one head", "heads", "few images", "eights of many images"],
)
def test_where_calls_are_cut(
    shape: tuple[int, int], cuts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mitaswap.kernels import halves

    q, parts = torch.arange(shape[0] * shape[1] * 12).view(*shape, 3, 4), []
    halves.in_halves(q, parts.append)
    assert [part[1:3] for part in parts] == [(0, max(shape) if 1 in shape else shape[0])]
    monkeypatch.setattr(halves, "LEAST", 0)
    parts.clear()
    halves.in_halves(q, parts.append)
    assert [part[1:3] for part in parts] == cuts
    flat = q.flatten(0, 1)
    assert torch.equal(torch.cat([part.flat(flat) for part in parts]), flat)
    for part in parts:
        assert torch.equal(part.flat(flat), part.of(q).flatten(0, 1))


@on_interpreter
@pytest.mark.parametrize("kind", ["normal", "equal", "zeros", "wide", "tiny", "infinite", "nan"])
def test_the_largest_are_chosen_by_value_then_position(kind: str) -> None:
    from chosen_rows import choose

    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 31, 64, 100, 256, 700, 1100):
        x = torch.randn(size, generator=generator)
        x = {
            "normal": x,
            "equal": x.round(),
            "zeros": torch.where(x > 0, 0.0, -0.0),
            "wide": torch.exp(30 * x) * x.sign(),
            "tiny": x * 1e-42,
            "infinite": torch.where(x > 1, float("inf"), torch.where(x < -1, -float("inf"), x)),
            "nan": torch.where(x > 0, float("nan"), x),
        }[kind]
        for count in {1, size // 3, size} - {0}:
            chosen = choose(x, count)
            assert chosen.sum() == count  # also of what is no number, or places stay unwritten
            if kind != "nan":
                first = sorted(range(size), key=lambda i: (-float(x[i]), i))[:count]
                assert chosen.nonzero().flatten().tolist() == sorted(first)


@on_interpreter
def test_what_the_short_backward_leaves_to_the_long_one() -> None:
    from mitaswap.kernels.mita_call import Sizes
    from mitaswap.kernels.mita_short import fits

    q, sizes = torch.empty(1, 2, 43, 64, dtype=torch.float16), Sizes(1, 6, 7, 3, 3, 7, 1, 1)
    assert fits(q, sizes, 0.125, 0.125)
    assert not fits(q.float(), sizes, 0.125, 0.125)
    assert not fits(q[..., :32], sizes, 0.125, 0.125)
    assert not fits(q.expand(1, 2, 43, 64).repeat(1, 1, 6, 1), sizes, 0.125, 0.125)
    assert not fits(q, sizes._replace(s=2), 0.125, 0.125)
    assert not fits(q, sizes._replace(top=0), 0.125, 0.125)
    assert not fits(q, sizes._replace(a=6, b=6), 0.125, 0.125)
    assert not fits(q, sizes, -0.125, -0.125) and not fits(q, sizes, 0.0, 0.0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands for the device there")
def test_without_a_device_the_kernels_are_refused() -> None:
    q = torch.randn(1, 2, 42, 16)
    layout = TokenLayout(0, (6, 7))
    with pytest.raises(MitaswapError, match="no kernel for tensors on cpu, only for CUDA; use"):
        mechanism("mita(m=4,k=6,impl=fused)")(q, q, q, layout=layout)
    auto, reference = (mechanism(f"mita(m=4,k=6,impl={i})") for i in ("auto", "reference"))
    assert torch.equal(auto(q, q, q, layout=layout), reference(q, q, q, layout=layout))


@pytest.fixture
def without_kernels_in_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from mitaswap.kernels import mita_plan

    monkeypatch.setattr(mita_plan, "WHOLE_HEADS", ())
    monkeypatch.setattr(mita_plan, "fits_head_backward", lambda *_: False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL + LONG, ids=str)
def test_on_the_device(case: Case, poisoned: None) -> None:
    agree(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [x for x in SMALL + LONG if x.dim == 64], ids=str)
def test_on_the_device_without_kernels_in_cuda(
    case: Case, poisoned: None, without_kernels_in_cuda: None
) -> None:
    agree(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_auto_takes_the_kernel_where_it_can(dtype: torch.dtype) -> None:
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(1, 2, 42, 16, device="cuda", dtype=dtype)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        mechanism("mita(m=4,k=6)")(q, q, q, layout=TokenLayout(0, (6, 7)))
    names = {event.key for event in seen.key_averages()}
    assert ("probe_kernel" in names) == (dtype != torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("spec, side", [("mita(m=16,k=30,s=2)", 30), ("mita", 14)], ids=str)
def test_gradients_are_the_same_every_time(spec: str, side: int) -> None:
    case = Case(spec, TokenLayout(1, (side, side)), 64, torch.float16, True, 64, 3)
    inputs = tensors(case)
    first, second = both(case, *inputs)[0], both(case, *inputs)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["plain", "captured"])
def test_halves_on_two_streams_are_the_whole(
    captured: bool,
    poisoned: None,
    without_kernels_in_cuda: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mitaswap.kernels import halves

    case = Case("mita", TokenLayout(1, (14, 14)), 64, torch.float16, True, 1000, 6)
    q, k, v, grad = tensors(case)
    part = mechanism("mita(impl=fused)")

    def step() -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = part(*inputs, layout=case.layout)
        return [out, *torch.autograd.grad(out, inputs, grad)]

    assert q.numel() // case.dim >= halves.LEAST
    if captured:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours = step()
        for _ in range(3):
            graph.replay()
    else:
        for _ in range(3):  # a second call takes what the first has left to each stream
            ours = step()
    monkeypatch.setattr(halves, "LEAST", 2**62)
    assert all(torch.equal(a, b) for a, b in zip(ours, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("side", [20, 14], ids=["long", "short"])
def test_compiles_whole_and_is_captured(side: int) -> None:
    case = Case("mita(m=16,k=16)", TokenLayout(1, (side, side)), 64, torch.float16, True, 2, 3)
    q, k, v, grad = tensors(case)
    part = mechanism(case.spec)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = part(q, k, v, layout=case.layout)
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    eager = step(q, k, v)
    whole = torch.compile(lambda *x: part(*x, layout=case.layout), fullgraph=True)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = whole(*inputs)
    for a, b in zip((out, *torch.autograd.grad(out, inputs, grad)), eager, strict=True):
        assert torch.equal(a, b)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(q, k, v)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


@on_interpreter
def test_offsets_of_32_bits_only_where_they_fit() -> None:
    from mitaswap.kernels.mita_plan import near

    rows = torch.empty(2, 3, 4096, 64, device="meta")
    apart = torch.empty_strided((1, 1, 4096, 64), (0, 0, 2**19, 1), device="meta")
    assert near(rows, apart[:, :, :4095])
    assert not near(rows, torch.empty_strided((1, 1, 4097, 64), (0, 0, 2**19, 1), device="meta"))


@on_interpreter
@pytest.mark.parametrize(
    ("tokens", "tile", "tiles"),
    [(1, 64, 1), (197, 256, 1), (576, 576, 1), (577, 320, 2), (1024, 512, 2), (1025, 576, 2),
     (4097, 576, 8), (65536, 512, 128), (65537, 576, 114), (2**20, 8192, 128)],
)  # fmt: skip
def test_tiles_cover_all_tokens_and_spare_a_class_token(tokens: int, tile: int, tiles: int) -> None:
    from mitaswap.kernels.mita_plan import token_tiles

    assert token_tiles(tokens) == (tile, tiles)
    assert tile * (tiles - 1) < tokens <= tile * tiles
