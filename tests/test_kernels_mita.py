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
    Case("mita(m=72,k=3)", TokenLayout(0, (8, 9)), 16, heads=1),
    Case("mita(m=66,k=3,s=2)", TokenLayout(1, (11, 12)), 16, heads=1),
    # the smallest scores are the largest then; or all are equal, and the first keys are taken
    Case("mita(m=6,k=5)", TokenLayout(1, (5, 9)), 16, scale=-0.3),
    Case("mita(m=6,k=5)", TokenLayout(1, (5, 9)), 16, torch.float16, scale=0.0),
    Case("mita(m=2,k=20,pool=1x2)", TokenLayout(0, (4, 5)), 16, heads=1),
    # long enough for a first choice among groups of keys, and for two tiles of the sort
    Case("mita(m=4,k=9)", TokenLayout(1, (23, 25)), 16, heads=1),
]

LONG = [
    Case("mita", TokenLayout(0, (14, 14)), 64, torch.float16, True, 8, 3),
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
def test_equal_keys_are_chosen_by_position(poisoned: None) -> None:
    case = Case("mita(m=4,k=6)", TokenLayout(0, (24, 25)), 16, heads=1)
    q, k, v, grad = tensors(case)
    k = k[:, :, :1].expand_as(k)  # all scores of a landmark are equal: every expert has keys 0..5
    ours, exact = both(case, q, k, v, grad)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[3].double(), exact[3], rtol=1e-4, atol=1e-5)


@on_interpreter
def test_values_that_are_no_numbers_stay_in_bounds() -> None:
    case = Case("mita(m=4,k=6)", TokenLayout(0, (6, 7)), 16)
    q, k, v, _ = tensors(case)
    for bad in (float("nan"), float("inf")):
        k[0, 0, 3] = bad
        part = mechanism("mita(m=4,k=6,impl=fused)")
        assert part(q, k, v, layout=case.layout).shape == q.shape


@on_interpreter
def test_operators_keep_the_rules() -> None:
    from mitaswap.kernels import mita as kernels

    case = Case("mita(m=4,k=6)", TokenLayout(0, (6, 7)), 16)
    q, k, v, _ = tensors(case)
    arguments = [0, 6, 7, 2, 2, 6, 1, 1], 0.25, 0.25
    torch.library.opcheck(kernels.mita, (q, k, v, *arguments))
    wanted = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(kernels.mita_training, (*wanted, *arguments))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands for the device there")
def test_without_a_device_the_kernels_are_refused() -> None:
    q = torch.randn(1, 2, 42, 16)
    layout = TokenLayout(0, (6, 7))
    with pytest.raises(MitaswapError, match="no kernel for tensors on cpu, only for CUDA; use"):
        mechanism("mita(m=4,k=6,impl=fused)")(q, q, q, layout=layout)
    auto, reference = (mechanism(f"mita(m=4,k=6,impl={i})") for i in ("auto", "reference"))
    assert torch.equal(auto(q, q, q, layout=layout), reference(q, q, q, layout=layout))


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL + LONG, ids=str)
def test_on_the_device(case: Case, poisoned: None) -> None:
    agree(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_auto_takes_the_kernel_where_it_can(dtype: torch.dtype) -> None:
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(1, 2, 42, 16, device="cuda", dtype=dtype)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        mechanism("mita(m=4,k=6)")(q, q, q, layout=TokenLayout(0, (6, 7)))
    names = {event.key for event in seen.key_averages()}
    assert ("probe_kernel" in names) == (dtype == torch.float32)


@pytest.mark.gpu
def test_gradients_are_the_same_every_time() -> None:
    case = Case("mita(m=16,k=30,s=2)", TokenLayout(1, (30, 30)), 64, torch.float16, True, 4, 3)
    inputs = tensors(case)
    first, second = both(case, *inputs)[0], both(case, *inputs)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_compiles_whole_and_is_captured() -> None:
    case = Case("mita(m=16,k=16)", TokenLayout(1, (20, 20)), 64, torch.float16, True, 2, 3)
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
